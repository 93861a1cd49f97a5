"""What a cache does at the modules where it sits: keeps on full steps, forecasts on others.

A site is called instead of its module's forward. All sites of an attached cache share one `Board`, which says what the
running evaluation of the network is to do; where none is running for this cache, a site calls its module and nothing
else.
Not here: names (`placement`), the network as a whole and its decisions (`attach`), tokens (`sites_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from gesso.caching.parts import Division, SpanDivision
from gesso.caching.placement import Slot, Table
from gesso.caching.policy import Action
from gesso.caching.policy_change import relative_change
from gesso.caching.policy_choice import Policy
from gesso.caching.policy_speculation import error_of
from gesso.caching.store import TOGETHER, Store
from gesso.errors import RunError

Forward = Callable[..., Any]
Refuses = Callable[[list[float]], bool]


@dataclass
class Evaluation:
    """One call of the network: what it does, for whom; and what is known only while it runs.

    `refuses` says whether measurements, one a part, call the forecast off.
    """

    action: Action
    division: Division
    refuses: Refuses
    check: bool = False
    grids: tuple[tuple[int, int] | None, ...] = ()
    measured: list[float] = field(default_factory=list)
    first_input: Tensor | None = None
    tail_input: Tensor | None = None

    @property
    def full(self) -> bool:
        return self.action is Action.COMPUTE

    @property
    def order(self) -> int | None:
        """Up to which order features are forecast."""
        return 0 if self.action is Action.REUSE else None

    def division_of(self, slot: Slot) -> Division:
        """How what a slot returns is divided."""
        pictures = self.division.pictures
        return self.division if pictures is None or slot.streams != ("image",) else pictures

    def measure(self, errors: list[float]) -> None:
        """Of several measurements of a part the largest counts."""
        pairs = zip(self.measured or errors, errors, strict=True)
        self.measured = [max(pair) for pair in pairs]


@dataclass
class Board:
    """What the sites of one attached cache share."""

    policy: Policy
    table: Table
    store: Store
    running: Evaluation | None = None

    def keep(self, site: str, tensor: Tensor, division: Division) -> None:
        """A feature of the running full step, divided among its parts."""
        rule, whole = self.policy.rule, self._together(site, division)
        if whole is not None:
            self.store.extend(whole.run, TOGETHER, site, tensor, whole.parts[0].step, rule, whole)
            return
        for part, piece in zip(division.parts, division.split(tensor), strict=True):
            self.store.extend(part.run, part.branch, site, piece, part.step, rule)

    def forecast(self, site: str, division: Division) -> Tensor:
        """A feature at the running step, of all parts."""
        rule, whole = self.policy.rule, self._together(site, division)
        if whole is not None:
            return self.store.predict(whole.run, TOGETHER, site, whole.parts[0].step, rule, self.now.order)
        return division.join(self.pieces(site, division))

    def pieces(self, site: str, division: Division) -> list[Tensor]:
        """A feature at the running step, one piece a part."""
        order, rule = self.now.order, self.policy.rule
        return [self.store.predict(part.run, part.branch, site, part.step, rule, order) for part in division.parts]

    def _together(self, site: str, division: Division) -> SpanDivision | None:
        """The division, if all its parts are one ladder of one run; else each is held by itself."""
        plain = not (self.policy.selects_tokens or self.policy.speculates)
        if plain and isinstance(division, SpanDivision) and division.run is not None:
            return division if self.store.together(division.run, site, division) else None
        for run in {part.run for part in division.parts}:
            self.store.apart(run, site)
        return None

    @property
    def now(self) -> Evaluation:
        assert self.running is not None
        return self.running


def opened(output: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of a module's output, and what puts such tensors into one like it.

    Raises RunError for an output with anything but tensors in it.
    """
    if isinstance(output, Tensor):
        return [output], lambda tensors: tensors[0]
    if isinstance(output, Mapping):  # diffusers' outputs
        values, make = list(output.values()), partial(_named, type(output), tuple(output))
    else:
        values, make = list(output), type(output)
    if not all(isinstance(value, Tensor) for value in values):
        raise RunError(f"a step cache cannot keep what a module returns, {type(output).__name__} of other than tensors")
    return values, make


def _named(kind: type, names: tuple[str, ...], tensors: list[Tensor]) -> Any:
    return kind(**dict(zip(names, tensors, strict=True)))


@dataclass
class SlotSite:
    """Keeps what its module returns; on forecast steps the module is not called.

    A `verified` one is called on checked forecast steps too, and what it returns is compared with the forecast.
    """

    board: Board
    name: str
    slot: Slot
    verified: bool = False
    _rebuild: Callable[[list[Tensor]], Any] | None = None

    def __call__(self, original: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        running = self.board.running
        if running is None:
            return original(*args, **kwargs)
        if running.full:
            return self.keep(original(*args, **kwargs))
        if running.check and self.verified:
            return self._compare(original(*args, **kwargs))
        return self.forecast()

    def keep(self, output: Any) -> Any:
        tensors, self._rebuild = opened(output)
        for name, tensor in zip(self.names(len(tensors)), tensors, strict=True):
            self.board.keep(name, tensor, self._division)
        return output

    def forecast(self) -> Any:
        assert self._rebuild is not None
        return self._rebuild([self._forecast(name) for name in self.names(len(self.slot.streams))])

    def names(self, outputs: int) -> list[str]:
        """Under which each output is kept."""
        return [self.name] if outputs == 1 else [f"{self.name}:{number}" for number in range(outputs)]

    @property
    def _division(self) -> Division:
        return self.board.now.division_of(self.slot)

    def _forecast(self, name: str) -> Tensor:
        return self.board.forecast(name, self._division)

    def _compare(self, output: Any) -> Any:
        """The truth, or the forecast where the published code is repeated; measured are the picture's tokens."""
        running, settings = self.board.now, self.board.policy.settings
        tensors, rebuild = opened(output)
        names = self.names(len(tensors))
        assert settings.metric is not None
        for name, tensor, stream in zip(names, tensors, self.slot.streams, strict=False):
            if self.slot.kind == "attention" or stream == "text":
                continue
            pairs = zip(self.board.pieces(name, self._division), self._division.split(tensor), strict=True)
            running.measure([error_of(forecast, truth, settings.metric) for forecast, truth in pairs])
        return rebuild([self._forecast(name) for name in names]) if settings.original else output


@dataclass
class Placeholder:
    """On forecast steps returns nothing wide: what it makes is only read by a slot, which does not look."""

    board: Board
    verified: bool = False

    def __call__(self, original: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        running = self.board.running
        if running is None or running.full or (running.check and self.verified):
            return original(*args, **kwargs)
        streams = [kwargs.get(name) for name in ("hidden_states", "encoder_hidden_states")]
        empty = [tensor[..., :0] for tensor in (*args[:2], *streams) if isinstance(tensor, Tensor)]
        return empty[0] if len(empty) == 1 else tuple(empty)


@dataclass
class BlockSite:
    """One block of the stack whose residual is kept: blocks before `front` always run, those after only on full steps.

    The first block after the front remembers its input, the last makes the residual of the picture's tokens or adds its
    forecast. Whatever is added between blocks (a control network's residuals) is part of the residual. On probing steps
    the change of the front's own residual decides whether the rest runs.
    """

    board: Board
    index: int
    front: int
    last: int

    TAIL = "blocks"
    FRONT = "front"

    def __call__(self, original: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        running = self.board.running
        if running is None:
            return original(*args, **kwargs)
        picture, *text = _streams(args, kwargs)
        if self.index == 0:
            running.first_input = picture
        if self.index == self.front:
            running.tail_input = picture
            if self.front and self.board.policy.probes:
                self._probe(running, picture)
        if self.index < self.front or running.full:
            output = original(*args, **kwargs)
            if running.full and self.index == self.last:
                self.board.keep(self.TAIL, self._picture(output) - self._tail_input, running.division)
            return output
        if self.index == self.last:
            picture = self._tail_input + self.board.forecast(self.TAIL, running.division)
        return self._output(picture, *text)

    @property
    def _tail_input(self) -> Tensor:
        kept = self.board.now.tail_input
        assert kept is not None
        return kept

    def _probe(self, running: Evaluation, picture: Tensor) -> None:
        """Measure how far the front's residual has gone, and decide where that is still open."""
        assert running.first_input is not None
        division, store = running.division, self.board.store
        residuals = division.split(picture - running.first_input)
        if running.action is Action.PROBE:
            changes: list[float] = []
            for part, residual in zip(division.parts, residuals, strict=True):
                old = store.get(part.run, part.branch, self.FRONT)
                changes.append(
                    float("inf") if old is None or old.shape != residual.shape else relative_change(residual, old)
                )
            running.measure(changes)
            running.action = Action.COMPUTE if running.refuses(changes) else Action.FORECAST
        if running.full or self.board.policy.settings.policy == "accumulated":
            for part, residual in zip(division.parts, residuals, strict=True):
                store.put(part.run, part.branch, self.FRONT, residual.clone())

    def _picture(self, output: Any) -> Tensor:
        streams = self.board.table.block_output
        return output if len(streams) == 1 else output[streams.index("image")]

    def _output(self, picture: Tensor, *text: Tensor) -> Any:
        streams = self.board.table.block_output
        return picture if len(streams) == 1 else tuple(picture if stream == "image" else text[0] for stream in streams)


def _streams(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """A block's hidden states, and those of the text where they are given."""
    names = ("hidden_states", "encoder_hidden_states")
    for number, name in enumerate(names):
        value = args[number] if number < len(args) else kwargs.get(name)
        if isinstance(value, Tensor):
            yield value
