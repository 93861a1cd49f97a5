"""Settings of LoRA training: what all families share, and what each kind of objective adds. Nothing is done here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gesso.devices import check_dtype, check_name
from gesso.errors import RequestError
from gesso.request import parse_request
from gesso.training.settings import check

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
GROUPS = (ATTENTION, FEED_FORWARD)
_MOST_RANK, _MOST_HELD_OUT, _MOST_SEEDS = 4096, 4096, 16
_LONGEST = 200  # characters of a trigger


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """`model` is a name or a path, `data` a folder or a file of JSON lines (`data`); both have options of their own.

    `width` and `height` are pixels that pictures are cut to, None the model's own size; none is enlarged by more than
    `most_enlarged`. `rank` and `alpha` are the LoRA's: what it adds is multiplied by alpha / rank, None is the rank.
    `targets` are groups of layers, or ends of layers' names (`layers`). `trigger` is put before captions that lack it;
    `caption`, if there is one, is that of all pictures. A share of `caption_drop` of captions is left out, so that
    guidance has something to push away from. The last `held_out` pictures are measured and never learned.
    Sheets show `sample_prompts`, or the first captions, with `sample_seeds` seeds each, and `generation` are fields of
    their requests. `device` and `dtype` are those of the base model, None what suits machine and model;
    `recompute` forgets what is inside blocks and computes it again on the way back, which saves memory.
    """

    model: str
    data: str
    width: int | None = None
    height: int | None = None
    most_enlarged: float = 2.0
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = GROUPS
    trigger: str = ""
    caption: str = ""
    caption_drop: float = 0.1
    held_out: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_seeds: int = 3
    generation: tuple[tuple[str, object], ...] = ()
    device: str | None = None
    dtype: str | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        check("rank", self.rank, 1 <= self.rank <= _MOST_RANK, f"from 1 to {_MOST_RANK}")
        scaled = self.alpha is None or (math.isfinite(self.alpha) and 0 < self.alpha <= _MOST_RANK)
        check("alpha", self.alpha, scaled, f"a number above 0 and at most {_MOST_RANK}")
        check(
            "targets", self.targets, bool(self.targets), f"a list of {', '.join(GROUPS)}, or of ends of layers' names"
        )
        check("most_enlarged", self.most_enlarged, 1 <= self.most_enlarged <= 1000, "from 1 to 1000")
        check("caption_drop", self.caption_drop, 0 <= self.caption_drop <= 1, "from 0 to 1")
        check("held_out", self.held_out, 0 <= self.held_out <= _MOST_HELD_OUT, f"from 0 to {_MOST_HELD_OUT}")
        check("sample_seeds", self.sample_seeds, 1 <= self.sample_seeds <= _MOST_SEEDS, f"from 1 to {_MOST_SEEDS}")
        trigger = self.trigger
        check("trigger", trigger, len(trigger) <= _LONGEST and trigger.isprintable(), f"at most {_LONGEST} characters")
        if self.device is not None:
            check_name(self.device)
        if self.dtype is not None and check_dtype(self.dtype) == "float16":
            raise RequestError("dtype", self.dtype, "float32 or bfloat16", "in float16 small gradients are lost")
        asked = {"prompt": "-", "width": self.width, "height": self.height, **dict(self.generation)}
        parse_request({name: value for name, value in asked.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class FlowLoraSettings(LoraSettings):
    """Of flow matching: the normal whose sigmoid is sigma (1 is noise), bent towards noise by `time_shift`.

    `guidance` is what networks that embed it (FLUX.1 dev, HunyuanVideo) are told.
    """

    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 3.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check("time_mean", self.time_mean, math.isfinite(self.time_mean), "a number")
        for name in ("time_std", "time_shift"):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and 0 < value <= 100, "a number above 0 and at most 100")
        check("guidance", self.guidance, 0 <= self.guidance <= 100, "from 0 to 100")


@dataclass(frozen=True, kw_only=True)
class NoiseLoraSettings(LoraSettings):
    """Of predicting noise, or velocity, as the model's own schedule says: times are drawn evenly."""


@dataclass(frozen=True, kw_only=True)
class BitsLoraSettings(LoraSettings):
    """Of Infinity's bits, with self-correction; as in `training/infinity`."""

    flip_strength: float = 0.2
    flip_scales: int = 6
    reweight: bool = True
    weigh_margins: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check("flip_strength", self.flip_strength, 0 <= self.flip_strength <= 1, "from 0 to 1")
        check("flip_scales", self.flip_scales, self.flip_scales >= 0, "at least 0")
