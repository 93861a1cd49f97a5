"""The noise that a published diffusion model was trained with: the strict reading of its `scheduler_config.json`.

What would change the arithmetic and is not supported is refused, also where diffusers would take it; what belongs to
one solver only is left to whoever chooses another. Not here: the arithmetic (`sampling/noise_schedulers`), schedules of
flow models (`flow_schedule`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from gesso.errors import FileError
from gesso.weights.configuration import read_config
from gesso.weights.infinity import parse

NAME = "scheduler_config.json"

_MENDED = "fetch it again"
# Fields of diffusers' classes that may have one value each, which they are taken to have where they are absent.
_FIXED: dict[str, object] = {
    "trained_betas": None,
    "thresholding": False,
    "clip_sample": False,  # what is clipped there are pixels, and here are latents
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
}


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Names are those of diffusers' schedulers, defaults those of most of them.

    `timestep_spacing` None is each solver's own. `rescale_betas_zero_snr`: the last step is pure noise
    (arXiv:2305.08891).
    """

    beta_start: Annotated[float, Field(gt=0, lt=1)]
    beta_end: Annotated[float, Field(gt=0, lt=1)]
    beta_schedule: Literal["linear", "scaled_linear"]
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    timestep_spacing: Literal["linspace", "leading", "trailing"] | None = None
    steps_offset: Annotated[int, Field(ge=0, le=1)] = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    original_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 50

    def values(self) -> dict[str, Any]:
        """What diffusers' classes are made with."""
        return {name: value for name, value in asdict(self).items() if value is not None} | {"clip_sample": False}


def read_noise_schedule(folder: Path) -> NoiseSchedule:
    """The schedule of a model's `scheduler` folder, whichever of diffusers' classes it names.

    Raises FileError that names the file, the field and its value for what is out of bounds or not supported.
    """
    return noise_schedule(read_config(folder, NAME), folder / NAME)


def noise_schedule(config: Mapping[str, object], path: Path) -> NoiseSchedule:
    """The same from the values of such a file; `path` is named in errors."""
    for name, wanted in _FIXED.items():
        if config.get(name, wanted) != wanted:
            found = json.dumps(config[name])[:40]
            raise FileError(path, f"{name} {found} is not {json.dumps(wanted)}", "no other is supported")
    known = {field.name for field in fields(NoiseSchedule)}
    schedule = parse(NoiseSchedule, {name: value for name, value in config.items() if name in known}, path)
    if schedule.beta_end <= schedule.beta_start:
        raise FileError(path, f"beta_end {schedule.beta_end} is not above beta_start {schedule.beta_start}", _MENDED)
    return schedule
