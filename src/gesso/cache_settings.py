"""What a request's `cache` says: one schema of step caches, for Python, the command line and metadata.

Here: the fields with their bounds, what each policy has use for, and the command line's spelling of them. Not here:
what a field does (`caching`), and limits of a model (`caching.attach`). Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gesso.errors import RequestError
from gesso.request_words import request_error

PolicyName = Literal[
    "taylorseer", "lite", "residual", "first_block", "accumulated", "toca", "duca", "random", "clusca", "speca"
]
Granularity = Literal["module", "block", "trunk"]
ScoreName = Literal["attention", "random", "norm"]
MetricName = Literal["l1", "l2", "relative_l1", "relative_l2", "cosine", "elementwise_l1", "elementwise_l2"]

RatioSchedule = Literal["constant", "linear", "exp", "linear-layerwise", "ToCa-ddim50", "ToCa-ddpm250"]

LONGEST_MASK = 1000
_TOKENS = ("toca", "duca", "random")
_GRANULARITIES: Mapping[str, tuple[Granularity, ...]] = {
    "taylorseer": ("module", "block", "trunk"),
    "lite": ("trunk",),
    "residual": ("block",),
    "first_block": ("block",),
    "accumulated": ("block",),
    "speca": ("module",),
} | dict.fromkeys((*_TOKENS, "clusca"), ("module",))
_USERS: Mapping[str, tuple[str, ...]] = {
    "front_blocks": ("taylorseer", "residual", "first_block", "accumulated"),
    "threshold": ("first_block", "accumulated", "speca"),
    "max_skips": ("first_block", "accumulated", "speca"),
    "min_skips": ("speca",),
    "decay": ("speca",),
    "floor": ("speca",),
    "metric": ("speca",),
    "ratio": _TOKENS,
    "ratio_schedule": _TOKENS,
    "score": ("toca", "duca"),
    "age_weight": ("toca", "duca"),
    "bonus": ("toca", "duca"),
    "clusters": ("clusca",),
    "propagation": ("clusca",),
}
"""Fields that only some policies have a use for."""
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "taylorseer": {"interval": 5, "order": 1, "warmup": 3},
    "lite": {"interval": 5, "order": 2, "warmup": 3},
    "residual": {"interval": 5, "order": 1, "warmup": 3},
    "first_block": {"order": 1, "warmup": 3, "threshold": 0.08, "max_skips": 5, "front_blocks": 1},
    "accumulated": {"order": 1, "warmup": 3, "threshold": 0.2, "max_skips": 5, "front_blocks": 1},
    "toca": {"interval": 5, "order": 0, "warmup": 3, "ratio": 0.1, "score": "attention"},
    "duca": {"interval": 5, "order": 0, "warmup": 3, "ratio": 0.1, "score": "attention"},
    "random": {"interval": 5, "order": 0, "warmup": 3, "ratio": 0.1, "score": "random"},
    "clusca": {"interval": 5, "order": 1, "warmup": 3, "clusters": 16, "propagation": 0.005},
    "speca": {
        "order": 2,
        "warmup": 3,
        "threshold": 0.3,
        "decay": 0.3,
        "floor": 0.02,
        "min_skips": 2,
        "max_skips": 8,
        "metric": "relative_l1",
    },
}


class CacheSettings(BaseModel):
    """A step cache. `None` means the policy's own default; `filled()` has no blanks left. Frozen and hashable.

    Text in the command line's spelling (`parse_cache`) stands for the whole of it.

    Raises:
        RequestError: on construction, for the first field that cannot be used; fields are named "cache.interval" etc.

    Example:
        >>> CacheSettings(policy="taylorseer", interval=4).filled().order
        1
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    policy: PolicyName = Field(description="When steps are forecast, and from what.")
    interval: int | None = Field(default=None, description="Full steps are this far apart.", ge=1, le=1000)
    order: int | None = Field(default=None, description="Order of the Taylor forecast.", ge=0, le=3)
    warmup: int | None = Field(default=None, description="First steps that are always full.", ge=1, le=1000)
    last_full: int = Field(default=0, description="Last steps that are always full.", ge=0, le=1000)
    schedule: Literal["even", "adaptive", "diffusers"] = Field(
        default="even",
        description="How intervals are counted: adaptive is ToCa's for DiT, diffusers is that library's.",
    )
    mask: tuple[bool, ...] | None = Field(
        default=None, description="One a step, true for full; stands over interval, warmup and last_full."
    )
    granularity: Granularity | None = Field(default=None, description="What is forecast: modules, blocks or the trunk.")
    front_blocks: int | None = Field(
        default=None, description="Blocks that are always computed, where blocks are forecast.", ge=0, le=1000
    )
    guarded: bool = Field(default=True, description="No derivatives from two steps of the warm-up.")
    expansion: Literal["taylor", "newton"] = Field(default="taylor", description="How orders are read.")
    smoothing: Literal["exponential", "moving_average"] | None = Field(default=None, description="Filter of features.")
    alpha: float = Field(default=0.8, description="Share of the newest, in smoothing.", gt=0, le=1, allow_inf_nan=False)
    hybrid: bool = Field(default=False, description="Smooth order 2 and above only.")
    threshold: float | None = Field(
        default=None, description="Relative change or error that calls for a full step.", gt=0, allow_inf_nan=False
    )
    decay: float | None = Field(
        default=None, description="SpeCa: the threshold's factor over the whole run.", gt=0, le=1, allow_inf_nan=False
    )
    floor: float | None = Field(default=None, description="SpeCa: least threshold.", ge=0, allow_inf_nan=False)
    min_skips: int | None = Field(default=None, description="SpeCa: forecasts before the first check.", ge=1, le=1000)
    max_skips: int | None = Field(default=None, description="Most forecasts in a row.", ge=1, le=1000)
    metric: MetricName | None = Field(default=None, description="SpeCa: how an error is measured.")
    ratio: float | None = Field(
        default=None, description="Share of tokens that stay fresh.", ge=0, le=1, allow_inf_nan=False
    )
    ratio_schedule: RatioSchedule | None = Field(default=None, description="How the ratio goes with step and layer.")
    score: ScoreName | None = Field(default=None, description="Which tokens matter.")
    age_weight: float | None = Field(default=None, description="Weight of a token's age.", ge=0, allow_inf_nan=False)
    bonus: float | None = Field(default=None, description="For the best token of a cell.", ge=0, allow_inf_nan=False)
    clusters: int | None = Field(default=None, description="ClusCa: groups of tokens.", ge=1, le=4096)
    propagation: float | None = Field(
        default=None,
        description="ClusCa: share of a fresh token that its group takes.",
        ge=0,
        le=1,
        allow_inf_nan=False,
    )
    store_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="What is kept is rounded to this; else as it comes."
    )
    offload: bool = Field(default=False, description="Keep features in main memory instead of the device's.")
    strict_shapes: bool = Field(
        default=False, description="Fail where shapes change within a run, instead of starting anew."
    )
    debug_shapes: bool = Field(default=False, description="Log the shape of everything that is kept.")
    original: bool = Field(default=False, description="As the published code runs, its defects included.")

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_our_words(cls, value: object, handler: Any) -> Self:
        try:
            return handler(_spelled_out(value) if isinstance(value, str) else value)
        except ValidationError as error:
            raise request_error(error, cls, "cache.") from None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        for name, users in _USERS.items():
            if getattr(self, name) is not None and self.policy not in users:
                raise RequestError(
                    f"cache.{name}", getattr(self, name), f"used by {self.policy}", f"it is for {_or(users)}"
                )
        allowed = _GRANULARITIES[self.policy]
        if self.granularity is not None and self.granularity not in allowed:
            raise RequestError("cache.granularity", self.granularity, f"what {self.policy} forecasts, {_or(allowed)}")
        if self.front_blocks and self.granularity not in (None, "block"):
            raise RequestError("cache.front_blocks", self.front_blocks, f"usable with granularity {self.granularity}")
        if self.front_blocks == 0 and self.policy in ("first_block", "accumulated"):
            raise RequestError("cache.front_blocks", 0, "at least 1", f"{self.policy} looks at what the first one does")
        if self.schedule == "adaptive" and self.policy not in _TOKENS:
            raise RequestError("cache.schedule", self.schedule, f"known to {self.policy}", f"it is for {_or(_TOKENS)}")
        for name in () if self.smoothing is not None else ("alpha", "hybrid"):
            if getattr(self, name) != type(self).model_fields[name].default:
                hint = "add smoothing=exponential, or leave it out"
                raise RequestError(f"cache.{name}", getattr(self, name), "usable without smoothing", hint)
        unused = self.smoothing == "moving_average" and self.alpha != type(self).model_fields["alpha"].default
        if unused and not self.original:  # published runs name one all the same
            hint = "take smoothing=exponential, or leave it out"
            raise RequestError("cache.alpha", self.alpha, "used by a moving average", hint)
        if self.mask is not None and not 1 <= len(self.mask) <= LONGEST_MASK:
            raise RequestError("cache.mask", len(self.mask), f"1 to {LONGEST_MASK} values, one a step")
        if self.mask is not None and not self.mask[0]:
            raise RequestError("cache.mask", False, "true for the first step", "nothing is known before it is computed")
        filled = self.filled()
        if filled.min_skips is not None and filled.max_skips is not None and filled.min_skips > filled.max_skips:
            raise RequestError("cache.min_skips", filled.min_skips, f"at most max_skips, {filled.max_skips}")
        return self

    def filled(self) -> CacheSettings:
        """With the policy's defaults in every blank that it has a use for."""
        own = dict(_DEFAULTS[self.policy]) | {"granularity": _GRANULARITIES[self.policy][0]}
        if self.policy in _TOKENS:
            own |= {"ratio_schedule": "constant"}
        if self.policy in ("toca", "duca"):
            own |= {"age_weight": 0.25, "bonus": 0.6}
        if self.front_blocks:
            own["granularity"] = "block"
        blanks = {name: value for name, value in own.items() if getattr(self, name) is None}
        return self.model_copy(update=blanks)


def granularities(policy: PolicyName) -> tuple[Granularity, ...]:
    """What a policy can forecast; the first is its default."""
    return _GRANULARITIES[policy]


def parse_cache(text: str) -> CacheSettings:
    """The command line's spelling, `POLICY[:key=value,...]`; a mask is written in noughts and ones.

    Example:
        >>> parse_cache("taylorseer:interval=5,order=2").interval
        5
        >>> parse_cache("taylorseer:mask=1101").mask
        (True, True, False, True)
    """
    return CacheSettings.model_validate(text)


def spelled(settings: CacheSettings) -> str:
    """The same in the command line's spelling, without what stands there by default.

    Example:
        >>> spelled(CacheSettings(policy="lite", interval=4, offload=True))
        'lite:interval=4,offload=true'
    """
    given: dict[str, str] = {}
    for name, value in settings.model_dump(mode="json", exclude_defaults=True, exclude={"policy"}).items():
        given[name] = "".join("01"[full] for full in value) if name == "mask" else str(value).lower()
    rest = ",".join(f"{name}={value}" for name, value in given.items())
    return f"{settings.policy}:{rest}" if rest else settings.policy


def _spelled_out(text: str) -> dict[str, object]:
    """The fields that `POLICY[:key=value,...]` gives. Raises RequestError for what is no key=value."""
    name, _, rest = text.partition(":")
    values: dict[str, object] = {"policy": name.strip()}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, given, value = part.partition("=")
        if not given:
            raise RequestError("cache", part, "key=value", "as in taylorseer:interval=5,order=2")
        key, value = key.strip().replace("-", "_"), value.strip()
        values[key] = [digit == "1" for digit in value] if key == "mask" and not set(value) - {"0", "1"} else value
    return values


def _or(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else str(last)
