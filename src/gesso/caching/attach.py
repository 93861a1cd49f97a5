"""Putting a step cache on a network, its decisions, and taking it off: the one face of this room to the engine.

One `Attached` serves any number of runs (pictures) of one network under one policy::

    attached = attach(network, CacheSettings(policy="taylorseer"))
    decision = attached.begin_step(run, step, of)      # before grouping: it belongs in the batch key
    with attached.call(runs):                          # runs of equal decision, in the order of their states
        pipeline.step(states)                          # evaluates the network, naming branches (sampling.guidance)
    attached.free(run)                                 # done, cancelled or failed
    attached.detach()

Outside `call` the network computes what it always did. Features never live in arguments, on classes or on modules.
Not here: what happens at a module (`sites`), names (`placement`), when (`policy`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

from gesso.cache_settings import CacheSettings
from gesso.caching.hooks import unwrap, wrap
from gesso.caching.parts import Division, Part, RowDivision, packed_division, signatures
from gesso.caching.placement import table_of
from gesso.caching.policy import Action, Course, Decision
from gesso.caching.policy_choice import Policy
from gesso.caching.sites import Board, Evaluation, Forward, opened
from gesso.caching.sites_layout import policy_for, sites_of
from gesso.caching.store import Store
from gesso.errors import RunError
from gesso.sampling.forecasts import answering
from gesso.sampling.guidance import running_samples

TRUNK = "trunk"
_NUMBERS = count()

Grid = tuple[int, int]


@dataclass
class _Run:
    """One picture's place in its course. `taken` is what each step came to: `F` where any branch was full, else `T`."""

    course: Course
    of: int
    step: int
    decision: Decision
    grid: Grid | None
    taken: dict[int, str] = field(default_factory=dict)
    measured: dict[int, float] = field(default_factory=dict)


@dataclass
class _Call:
    """The runs that step together. The first evaluation settles what is open, for the branches after it too.

    `computed` and `forecast` say whether any branch was: both, where a branch begins late. `foretold` are branches for
    which somebody may have left work undone, being told that their output is forecast.
    """

    runs: tuple[Hashable, ...]
    decision: Decision
    computed: bool
    forecast: bool = False
    foretold: set[str] = field(default_factory=set)
    measured: dict[Hashable, float] = field(default_factory=dict)


class Attached:
    """A step cache on a network; made by `attach`. Used from one thread, like the network."""

    def __init__(self, network: nn.Module, policy: Policy) -> None:
        settings = policy.settings
        dtype = None if settings.store_dtype is None else getattr(torch, settings.store_dtype)
        self.network, self.policy = network, policy
        self.store = Store(
            dtype=dtype, offload=settings.offload, strict=settings.strict_shapes, debug=settings.debug_shapes
        )
        self._board = Board(policy, table_of(network), self.store)
        self._runs: dict[Hashable, _Run] = {}
        self._call: _Call | None = None
        self._rebuild: dict[object, Callable[[list[torch.Tensor]], Any]] = {}
        self._name = f"gesso_cache_{next(_NUMBERS)}"
        self._wrapped: list[nn.Module] = []
        try:
            for module, site in sites_of(network, self._board):
                self._wrap(module, site)
            self._wrap(network, self._evaluate)
        except BaseException:
            self.detach()
            raise

    # ---- the loop's side --------------------------------------------------------------------------------------------

    def begin_step(self, run: Hashable, step: int, of: int, *, grid: Grid | None = None) -> Decision:
        """What a run's step will do; asked as often as wanted, it says the same.

        A run begins anew where the step is not the one after its last (0 above all). `grid` are rows and columns of the
        picture's tokens, for policies that look at neighbours. Raises RequestError where the policy does not fit `of`
        steps.
        """
        known = self._runs.get(run)
        if known is not None and known.of == of and known.step == step:
            return known.decision
        if known is not None and known.of == of and known.step + 1 == step and known.step in known.taken:
            known.step, known.decision = step, known.course.decide(step)
            return known.decision
        self.free(run)
        course = self.policy.course(of)
        self._runs[run] = _Run(course, of, step, course.decide(step), grid)
        return self._runs[run].decision

    @contextmanager
    def call(self, runs: Sequence[Hashable]) -> Iterator[None]:
        """While it lasts, the network is evaluated for these runs, whose decisions are equal, in this order.

        When it ends without an error, their courses learn what the step came to.
        """
        decisions = {self._runs[run].decision for run in runs}
        if len(decisions) != 1 or self._call is not None:
            raise RunError("states that step together must have one decision of their step cache, one call at a time")
        (decision,) = decisions
        call = self._call = _Call(tuple(runs), decision, computed=decision.full)
        try:
            with answering(partial(self._foretell, call)):
                yield
        finally:
            self._call = self._board.running = None
        for run in call.runs:
            known = self._runs.get(run)
            if known is None:  # freed while it ran
                continue
            measured = call.measured.get(run)
            known.course.settle(known.step, call.computed and not call.forecast, measured)
            known.taken[known.step] = "F" if call.computed else "T"
            if measured is not None:
                known.measured[known.step] = measured

    def free(self, run: Hashable) -> None:
        """Forget a run: it is done, cancelled or failed. Nothing happens if it is not known."""
        self._runs.pop(run, None)
        self.store.free(run)

    def detach(self) -> None:
        """Take everything off, last put on first, and forget every run. The network is as it was."""
        while self._wrapped:
            unwrap(self._wrapped.pop(), self._name)
        self._runs.clear()
        self.store.clear()
        self._rebuild.clear()
        self._call = self._board.running = None

    @property
    def runs(self) -> tuple[Hashable, ...]:
        return tuple(self._runs)

    def taken(self, run: Hashable) -> str:
        """What the run's steps came to so far, `F` where any branch was full, else `T`: for the result's record."""
        known = self._runs[run]
        return "".join(known.taken[step] for step in sorted(known.taken))

    def measured(self, run: Hashable) -> Mapping[int, float]:
        """Errors or changes by the step at which they were measured."""
        return dict(self._runs[run].measured)

    # ---- the network's side -----------------------------------------------------------------------------------------

    def _wrap(self, module: nn.Module, site: Callable[..., Any]) -> None:
        wrap(module, self._name, site)
        self._wrapped.append(module)

    def _evaluate(self, original: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The network's forward while the cache is on."""
        call = self._call
        if call is None:
            return original(*args, **kwargs)
        division = self._divide(call, args, kwargs)
        looks = signatures(division, args, kwargs, whole=self.policy.settings.granularity == TRUNK)
        known = zip(division.parts, looks, strict=True)
        decision = call.decision
        if not decision.full and not all(self.store.ready(part.run, part.branch, look) for part, look in known):
            if not call.foretold.isdisjoint(part.branch for part in division.parts):
                raise RunError("the inputs of a step cache changed within a step that was to be forecast")
            decision = Decision(Action.COMPUTE)  # a branch that begins late, or inputs that have changed
        running, output = self._attempt(decision, division, original, args, kwargs)
        if running.check and running.measured and running.refuses(running.measured):
            running, output = self._attempt(
                Decision(Action.COMPUTE), division, original, args, kwargs, running.measured
            )
        if call.decision.check or call.decision.action is Action.PROBE:  # settled, for the branches that follow too
            call.decision = Decision(running.action)
        call.computed |= running.full
        call.forecast |= not running.full
        for part, value in zip(division.parts, running.measured, strict=False):
            call.measured[part.run] = max(value, call.measured.get(part.run, value))
        if running.full:
            for part, look in zip(division.parts, looks, strict=True):
                self.store.complete(part.run, part.branch, look)
        return output

    def _foretell(self, call: _Call, branch: str) -> bool:
        """Whether this branch's output will be forecast as a whole; one who is told so may rely on it."""
        whole = self.policy.settings.granularity == TRUNK and not call.decision.full
        if not whole or not all(self.store.begun(run, branch) for run in call.runs):
            return False
        call.foretold.add(branch)
        return True

    def _attempt(
        self,
        decision: Decision,
        division: Division,
        original: Forward,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        measured: list[float] | None = None,
    ) -> tuple[Evaluation, Any]:
        grids = tuple(self._runs[part.run].grid for part in division.parts)
        running = Evaluation(
            decision.action,
            division,
            refuses=lambda values: self._refuses(division, values),
            check=decision.check,
            grids=grids,
            measured=measured or [],
        )
        self._board.running = running
        try:
            if self.policy.settings.granularity == TRUNK:
                return running, self._trunk(running, original, args, kwargs)
            return running, original(*args, **kwargs)
        finally:
            self._board.running = None

    def _trunk(self, running: Evaluation, original: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The whole network's output, kept or forecast."""
        form = kwargs.get("return_dict", True)
        if running.full or form not in self._rebuild:
            output = original(*args, **kwargs)
            tensors, self._rebuild[form] = opened(output)
            if self._board.table.packed:
                self._keep_samples(running, tensors)
            else:
                self._board.keep(TRUNK, tensors[0], running.division)
            return output
        packed, division = self._board.table.packed, running.division
        outputs = self._board.pieces(TRUNK, division) if packed else [self._board.forecast(TRUNK, division)]
        return self._rebuild[form](outputs)

    def _keep_samples(self, running: Evaluation, samples: list[torch.Tensor]) -> None:
        for part, sample in zip(running.division.parts, samples, strict=True):
            self.store.extend(part.run, part.branch, TRUNK, sample, part.step, self.policy.rule)

    def _refuses(self, division: Division, values: Sequence[float]) -> bool:
        """Any part's word is enough: what steps together is computed together."""
        pairs = zip(division.parts, values, strict=True)
        return any(self._runs[part.run].course.refuses(part.step, value) for part, value in pairs)

    def _divide(self, call: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Division:
        samples = running_samples(len(call.runs))
        parts: list[Part] = []
        for index, branch in samples:
            run = call.runs[index]
            parts.append(Part(run, branch, self._runs[run].step, self._runs[run].of))
        if not self._board.table.packed:
            return RowDivision(tuple(parts))
        return packed_division(tuple(parts), (kwargs["company"] if "company" in kwargs else args[2]).layout)


def attach(network: nn.Module, settings: CacheSettings) -> Attached:
    """Put a step cache on a network, until it is detached.

    `network` may be compiled; adapters and quantization come first, since they replace modules. Several caches may be
    on one network. Raises RequestError for a network that step caches do not know, or names that match nothing in it.
    """
    network = getattr(network, "_orig_mod", network)
    return Attached(network, policy_for(network, settings))
