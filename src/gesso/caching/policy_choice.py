"""From a request's cache settings to the policy they mean: its rule of forecasting, and a course for each run.

Not here: the fields (`gesso.cache_settings`), the courses' own files (`policy_…`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from gesso.cache_settings import CacheSettings
from gesso.caching.policy import Action, Course, Decision, PlannedCourse
from gesso.caching.policy_change import ChangeCourse
from gesso.caching.policy_interval import Kind, planned_steps
from gesso.caching.policy_speculation import SpeculationCourse
from gesso.caching.predictor import Rule, Smoothing
from gesso.errors import RequestError

_ACTIONS = {
    Kind.FULL: Action.COMPUTE,
    Kind.SKIPPED: Action.FORECAST,
    Kind.TOKENS: Action.TOKENS,
    Kind.REUSED: Action.REUSE,
}
_TOKEN_POLICIES = ("toca", "duca", "random", "clusca")
_CHANGE_POLICIES = ("first_block", "accumulated")


@dataclass(frozen=True)
class Policy:
    """A step cache's settings without blanks, and what follows from them. `order_given` says it was no blank."""

    settings: CacheSettings
    order_given: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "order_given", self.settings.order is not None)
        object.__setattr__(self, "settings", self.settings.filled())

    @cached_property
    def rule(self) -> Rule:
        """How features are forecast."""
        settings = self.settings
        assert settings.order is not None
        smoothing = None
        if settings.smoothing is not None:
            form = "as_run" if settings.original else "filter"
            smoothing = Smoothing(method=settings.smoothing, alpha=settings.alpha, hybrid=settings.hybrid, form=form)
        return Rule(
            order=settings.order,
            since=self._since,
            spacing="last_gap" if settings.original else "exact",
            expansion=settings.expansion,
            smoothing=smoothing,
        )

    @property
    def _since(self) -> int:
        """The first step that makes a derivative.

        Guarded, the full steps that begin a run are not held against one another: they change fast, and lie closer
        together than the forecasts that follow reach. The published guard lets the last of them through, and is lifted
        where features are smoothed.
        """
        settings = self.settings
        assert settings.warmup is not None
        if not settings.guarded or (settings.original and settings.smoothing is not None):
            return 0
        if settings.original:
            return settings.warmup - 1
        return settings.warmup if settings.mask is None else (*settings.mask, False).index(False)

    @property
    def selects_tokens(self) -> bool:
        return self.settings.policy in _TOKEN_POLICIES

    @property
    def probes(self) -> bool:
        return self.settings.policy in _CHANGE_POLICIES

    @property
    def speculates(self) -> bool:
        return self.settings.policy == "speca"

    @property
    def adapts(self) -> bool:
        """Whether what is measured decides which steps are full."""
        return self.probes or self.speculates

    def course(self, steps: int) -> Course:
        """The decisions of a run of so many steps.

        Raises RequestError for a mask of another length, an order that so few full steps can never have, and settings
        under which every step would be full.
        """
        settings = self.settings
        if settings.mask is not None and len(settings.mask) != steps:
            hint = f"it has {len(settings.mask)} values"
            raise RequestError("cache.mask", len(settings.mask), f"one value for each of {steps} steps", hint)
        kinds = planned_steps(settings, steps)
        if self.probes:
            course: Course = ChangeCourse.of(settings, kinds)
        elif self.speculates:
            course = SpeculationCourse.of(settings, kinds)
        else:
            self._check_order(steps)
            course = PlannedCourse([Decision(_ACTIONS[kind]) for kind in kinds])
        return course

    def full_steps(self, steps: int, since: int = 0) -> int:
        """How many of so many steps, from one on, are full whatever is measured."""
        return planned_steps(self.settings, steps)[since:].count(Kind.FULL)

    def settled(self, steps: int) -> CacheSettings:
        """The settings without blanks, for so many steps: given again, they mean the same.

        An order that was left blank is no higher than it can get.
        """
        if self.order_given or self.adapts:
            return self.settings
        return self.settings.model_copy(update={"order": min(self.rule.order, self._reached(steps))})

    def _reached(self, steps: int) -> int:
        """The highest order that any forecast has: of the full steps before it, those that make a derivative."""
        kinds = planned_steps(self.settings, steps)
        last = max((step for step, kind in enumerate(kinds) if kind is not Kind.FULL), default=0)
        full = [step for step, kind in enumerate(kinds[:last]) if kind is Kind.FULL]
        return sum(step >= self.rule.since for step in full[1:])

    def _check_order(self, steps: int) -> None:
        order, reached = self.rule.order, self._reached(steps)
        if self.order_given and order > reached:
            allowed = f"at most {reached}, since so many computed steps after the first make derivatives"
            raise RequestError("cache.order", order, allowed, "take more steps, or a smaller warmup or interval")
