"""What is kept between steps: ladders and other tensors, by run, guidance branch and site.

A ladder begins anew where the shape or dtype of its feature changes, since differences with what was before mean
nothing; with `strict` that is an error. `dtype` rounds what is kept, `offload` keeps it in main memory. The branches of
a run that steps alone may be held as one ladder a site, which takes a fraction of the operations; the numbers are the
same. Not here: the arithmetic (`predictor`), what is worth keeping (`sites`).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gesso.caching.parts import SpanDivision
from gesso.caching.predictor import Ladder, Rule, extend, predict
from gesso.devices import CPU
from gesso.errors import RunError

TOGETHER = "all branches"
_LOG = logging.getLogger(__name__)


@dataclass
class _Kept:
    """A ladder, and how its feature came; one of all branches is divided by `division`."""

    ladder: Ladder
    dtype: torch.dtype
    device: torch.device
    division: SpanDivision | None = None


@dataclass
class _Branch:
    """All of one branch of one run. `look` is what its inputs were when all of it was last computed, None before."""

    ladders: dict[str, _Kept] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    look: object = None

    def tensors(self) -> Iterator[Tensor]:
        for kept in self.ladders.values():
            yield from kept.ladder.tensors
        yield from self.others.values()


class Store:
    """Features of all runs of one attached cache."""

    def __init__(
        self, *, dtype: torch.dtype | None = None, offload: bool = False, strict: bool = False, debug: bool = False
    ) -> None:
        self.dtype, self.offload, self.strict, self.debug = dtype, offload, strict, debug
        self.restarts = 0
        self._runs: dict[Hashable, dict[str, _Branch]] = {}

    # ---- ladders ----------------------------------------------------------------------------------------------------

    def extend(
        self,
        run: Hashable,
        branch: str,
        site: str,
        feature: Tensor,
        step: int,
        rule: Rule,
        division: SpanDivision | None = None,
    ) -> None:
        """Keep the feature of a full step; one of all branches (`TOGETHER`) is divided by `division`.

        Raises RunError for another shape than before, where that is asked for.
        """
        ladders = self._branch(run, branch).ladders
        old = ladders.get(site)
        if old is not None and (old.ladder.factors[0].shape != feature.shape or old.dtype != feature.dtype):
            self._changed(site, old, feature)
            old = None
        ladder = extend(None if old is None else self._brought(old), feature.detach(), step, rule)
        ladders[site] = _Kept(self._stowed(ladder, feature), feature.dtype, feature.device, division)
        if self.debug:
            shape = tuple(feature.shape)
            _LOG.info(
                "step %d, %s, %s: %s %s, order %d", step, branch, site, shape, feature.dtype, len(ladder.factors) - 1
            )

    def predict(self, run: Hashable, branch: str, site: str, step: int, rule: Rule, order: int | None = None) -> Tensor:
        """The feature at a step, new, in the dtype and on the device that it came in. KeyError if none is kept."""
        kept = self._runs[run][branch].ladders[site]
        return predict(self._brought(kept), step, rule, order)

    def together(self, run: Hashable, site: str, division: SpanDivision) -> bool:
        """Hold a site's ladders of the division's parts, all of this run, as one; whether they can be, or none is kept.

        They cannot where a branch began later than another, or was of another length.
        """
        branches = self._runs.get(run, {})
        held = branches[TOGETHER].ladders.get(site) if TOGETHER in branches else None
        if held is not None and held.division is not None and held.division.place == division.place:
            return True
        self.apart(run, site)
        names = [part.branch for part in division.parts]
        kept = [branches[name].ladders.get(site) if name in branches else None for name in names]
        if all(each is None for each in kept):
            return True
        first = kept[0]
        if first is None or any(each is None or not _alike(each, first) for each in kept):
            return False
        if not division.fits([each.ladder.factors[0] for each in kept if each is not None]):
            return False
        ladders = [branches[name].ladders.pop(site).ladder for name in names]
        whole = replace(
            first.ladder,
            factors=tuple(map(division.join, zip(*(each.factors for each in ladders), strict=True))),
            older=tuple(map(division.join, zip(*(each.older for each in ladders), strict=True))),
        )
        self._branch(run, TOGETHER).ladders[site] = replace(first, ladder=whole, division=division)
        return True

    def apart(self, run: Hashable, site: str) -> None:
        """Hold a site's ladders of a run branch by branch, each with memory of its own: one may go before another."""
        branches = self._runs.get(run, {})
        kept = branches[TOGETHER].ladders.pop(site, None) if TOGETHER in branches else None
        if kept is None or kept.division is None:
            return
        factors = [kept.division.split(factor) for factor in kept.ladder.factors]
        older = [kept.division.split(tensor) for tensor in kept.ladder.older]
        for number, part in enumerate(kept.division.parts):
            own = replace(
                kept.ladder,
                factors=tuple(pieces[number].clone() for pieces in factors),
                older=tuple(pieces[number].clone() for pieces in older),
            )
            self._branch(run, part.branch).ladders[site] = _Kept(own, kept.dtype, kept.device)

    def amend(self, run: Hashable, branch: str, site: str, change: Tensor) -> None:
        """Add to order 0, for tokens that were computed between full steps."""
        kept = self._runs[run][branch].ladders[site]
        newest, *rest = self._brought(kept).factors
        kept.ladder = self._stowed(replace(kept.ladder, factors=(newest + change.to(newest), *rest)), change)

    def order0(self, run: Hashable, branch: str, site: str) -> Tensor:
        """The newest entry."""
        return self._brought(self._runs[run][branch].ladders[site]).factors[0]

    def ladder(self, run: Hashable, branch: str, site: str) -> Ladder:
        """What is kept of a site, to be looked at: held branch by branch from then on. KeyError if nothing is."""
        self.apart(run, site)
        return self._runs[run][branch].ladders[site].ladder

    def sites(self, run: Hashable, branch: str) -> tuple[str, ...]:
        """Names of sites of which a ladder is kept; they are held branch by branch from then on."""
        branches = self._runs.get(run, {})
        for site in [*branches[TOGETHER].ladders] if TOGETHER in branches else []:
            self.apart(run, site)
        return tuple(branches[branch].ladders) if branch in branches else ()

    # ---- everything else --------------------------------------------------------------------------------------------

    def put(self, run: Hashable, branch: str, name: str, tensor: Tensor) -> None:
        """Keep a tensor as it is: scores, ages, labels, the first block's residual."""
        self._branch(run, branch).others[name] = tensor.detach()

    def get(self, run: Hashable, branch: str, name: str) -> Tensor | None:
        """What `put` kept, None if nothing."""
        found = self._runs.get(run, {}).get(branch)
        return None if found is None else found.others.get(name)

    def complete(self, run: Hashable, branch: str, look: object) -> None:
        """Everything of a branch has been computed from inputs of this look."""
        self._branch(run, branch).look = look

    def begun(self, run: Hashable, branch: str) -> bool:
        """Whether all of a branch has been computed before, whatever its inputs looked like."""
        found = self._runs.get(run, {}).get(branch)
        return found is not None and found.look is not None

    def branches(self, run: Hashable) -> tuple[str, ...]:
        """The branches that are begun, by name: in company they may begin in another order."""
        return tuple(sorted(branch for branch in self._runs.get(run, {}) if self.begun(run, branch)))

    def ready(self, run: Hashable, branch: str, look: object) -> bool:
        """Whether a branch can be forecast for inputs of this look. Raises RunError where another look is an error."""
        found = self._runs.get(run, {}).get(branch)
        if found is None or found.look is None:
            return False
        if found.look != look and self.strict:
            raise RunError(f"strict_shapes: a step cache was made for inputs {found.look} and met {look}")
        return found.look == look

    # ---- bytes and ends ---------------------------------------------------------------------------------------------

    def free(self, run: Hashable) -> None:
        """Forget a run. Nothing happens if it is not known."""
        self._runs.pop(run, None)

    def clear(self) -> None:
        """Forget everything."""
        self._runs.clear()

    def bytes(self, run: Hashable | None = None) -> int:
        """Held for one run, or for all."""
        runs = self._runs.values() if run is None else [self._runs.get(run, {})]
        return sum(tensor.nbytes for branches in runs for held in branches.values() for tensor in held.tensors())

    @property
    def runs(self) -> tuple[Hashable, ...]:
        return tuple(self._runs)

    def _branch(self, run: Hashable, branch: str) -> _Branch:
        return self._runs.setdefault(run, {}).setdefault(branch, _Branch())

    def _changed(self, site: str, old: _Kept, feature: Tensor) -> None:
        before, now = (tuple(old.ladder.factors[0].shape), old.dtype), (tuple(feature.shape), feature.dtype)
        if self.strict:
            raise RunError(f"strict_shapes: {site} was {before} and is {now}")
        self.restarts += 1
        if self.debug:
            _LOG.info("%s was %s and is %s: begun anew", site, before, now)

    def _stowed(self, ladder: Ladder, feature: Tensor) -> Ladder:
        """Tensors of its own, in the dtype and at the place where they are kept; other modules may change `feature`."""
        device = torch.device(CPU) if self.offload else feature.device
        dtype = self.dtype or feature.dtype

        def stow(tensor: Tensor) -> Tensor:
            own = tensor.data_ptr() != feature.data_ptr()
            return tensor.to(device=device, dtype=dtype, copy=not own)

        return replace(
            ladder,
            factors=tuple(stow(tensor) for tensor in ladder.factors),
            older=tuple(stow(tensor) for tensor in ladder.older),
        )

    def _brought(self, kept: _Kept) -> Ladder:
        if self.dtype is None and not self.offload:
            return kept.ladder
        return replace(
            kept.ladder,
            factors=tuple(tensor.to(kept.device, kept.dtype) for tensor in kept.ladder.factors),
            older=tuple(tensor.to(kept.device, kept.dtype) for tensor in kept.ladder.older),
        )


def _alike(one: _Kept, other: _Kept) -> bool:
    """Whether two ladders are of the same steps and kind."""
    counts = [(len(each.ladder.factors), len(each.ladder.older)) for each in (one, other)]
    return (one.ladder.steps, one.dtype, counts[0]) == (other.ladder.steps, other.dtype, counts[1])
