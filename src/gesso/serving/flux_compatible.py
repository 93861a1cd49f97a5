"""Inputs of FLUX-compatible SDXL predictors: the one table of fields, and what each means to a `GenerationRequest`.

Names, bounds and order are those that clients of such predictors send; descriptions are what people are shown. Where a
default is None although predictors have a number or a text, "not given" must be told from it: then the model's own
preset is taken. Not here: fetching what a field names (`given_files`), OpenAPI (`openapi`), running (`predictor`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from gesso.adapters.sources import quotable
from gesso.errors import RequestError
from gesso.request import GenerationRequest, parse_request
from gesso.request_parts import Lora
from gesso.request_words import request_error
from gesso.serving.flux_sizes import AspectRatio, Megapixels, size_of

# By the names of Replicate's SDXL predictors and of the WebUI, in the order in which they are listed.
SCHEDULERS = {
    "DDIM": "ddim",
    "DPMSolverMultistep": "dpm++2m",
    "HeunDiscrete": "heun",
    "KarrasDPM": "dpm++2m-karras",
    "K_EULER_ANCESTRAL": "euler-a",
    "K_EULER": "euler",
    "PNDM": "pndm",
    "Euler a": "euler-a",
    "Euler": "euler",
    "Euler Karras": "euler-karras",
    "Heun": "heun",
    "DPM++ 2M": "dpm++2m",
    "DPM++ 2M Karras": "dpm++2m-karras",
    "DPM++ 2M SDE": "dpm++2m-sde",
    "DPM++ 2M SDE Karras": "dpm++2m-sde-karras",
    "DPM++ SDE": "dpm++sde",
    "DPM++ SDE Karras": "dpm++sde-karras",
    "DDPM": "ddpm",
    "DEIS": "deis",
    "LMS": "lms",
    "LMS Karras": "lms-karras",
    "UniPC": "unipc",
    "LCM": "lcm",
}
# What illustrations are better without; a request with a negative prompt of its own, or an empty one, has none of it.
ILLUSTRATION_NEGATIVE = (
    "lowres, worst quality, low quality, bad anatomy, bad hands, extra digits, jpeg artifacts, signature, watermark"
)
LORA_FIELDS = {"lora_weights": "lora_scale", "extra_lora": "extra_lora_scale"}
MOST_LORAS = 30  # in `loras`, so that with the two others they are as many as a request may have
_FASTEST = 10  # steps that go_fast leaves at least, where so many are asked for
# How a request's fields are called here, for errors.
_OUR_NAMES = {
    "negative": "negative_prompt",
    "num_images": "num_outputs",
    "steps": "num_inference_steps",
    "init_image": "image",
    "init_strength": "prompt_strength",
    "safety": "disable_safety_checker",
    "model": "use_standard_sdxl",
    "refiner": "refine",
    "refiner.model": "refine",
    "refiner.start": "high_noise_frac",
    "refiner.strength": "refine",
    "refiner.steps": "refine_steps",
}
_REFINED = 0.3  # share of the steps that begin anew from a finished picture, as in predictors of this kind
_MARKS = str.maketrans("", "", " _-")
_MAY_BE_BLANK = ("image", "mask", "lora_weights", "extra_lora", "replicate_weights", "hf_lora", "loras")
_MAY_BE_BLANK += ("hf_api_token", "civitai_api_token")


class FluxCompatibleInput(BaseModel):
    """One call of a FLUX-compatible predictor. Frozen; null means "not given", and so does a blank text of pictures,
    LoRAs and tokens. Unknown fields are dropped.

    Raises:
        RequestError: on construction, for the first field that cannot be used.

    Example:
        >>> FluxCompatibleInput(prompt="a lighthouse", aspect_ratio="3:2").size
        (1248, 832)
    """

    model_config = ConfigDict(frozen=True, extra="ignore", validate_default=True)

    prompt: str = Field(
        default="An astronaut riding a rainbow unicorn",
        description="What to draw. The default model knows Danbooru's tags best, separated by commas.",
    )
    num_outputs: int = Field(default=1, description="How many pictures; picture i uses seed + i.", ge=1, le=4)
    aspect_ratio: AspectRatio = Field(default="1:1", description="Width to height.")
    output_format: Literal["webp", "png", "jpg"] = Field(default="webp", description="File format of the pictures.")
    output_quality: int = Field(
        default=80, description="Quality of webp and jpg; png is always lossless.", ge=0, le=100
    )
    image: str | None = Field(
        default=None,
        description="Picture to start from: an address or a data URI. It is cut to the size that is painted.",
        json_schema_extra={"format": "uri"},
    )
    mask: str | None = Field(
        default=None,
        description="Where image is painted anew: white is, black stays.",
        json_schema_extra={"format": "uri"},
    )
    prompt_strength: float = Field(
        default=0.8, description="How much of image is painted anew; 1 ignores it.", ge=0, le=1
    )
    seed: int | None = Field(default=None, description="Empty or -1 draws one; the log says which was used.", ge=-1)
    go_fast: bool = Field(default=False, description="Half the steps, but no fewer than 10 of those asked for.")
    guidance: float | None = Field(
        default=None,
        description="How strongly the prompt pulls; else cfg_scale, else the model's own.",
        ge=1,
        le=20,
    )
    megapixels: Megapixels = Field(default="1", description="About how many million pixels.")
    num_inference_steps: int = Field(default=28, description="Steps from noise to picture.", ge=1, le=50)
    disable_safety_checker: bool = Field(
        default=False, description="Do not look for unsafe pictures; the operator may not allow that."
    )
    lora_weights: str | None = Field(
        default=None,
        description="LoRA: owner/model of Replicate, huggingface.co/owner/repo, civitai.com/models/ID, an address.",
    )
    lora_scale: float = Field(default=1.0, description="How strongly lora_weights acts.", ge=-1, le=3)
    extra_lora: str | None = Field(default=None, description="Second LoRA, written like lora_weights.")
    extra_lora_scale: float = Field(default=1.0, description="How strongly extra_lora acts.", ge=-1, le=3)
    hf_api_token: SecretStr | None = Field(
        default=None, description="Hugging Face's token for this call's LoRAs; sent to it alone and not kept."
    )
    civitai_api_token: SecretStr | None = Field(
        default=None, description="CivitAI's token for this call's LoRAs; sent to it alone and not kept."
    )
    negative_prompt: str | None = Field(
        default=None, description="What to keep away from. Not given, the illustration model has a list of its own."
    )
    scheduler: str = Field(
        default="K_EULER",
        description="How a step is taken.",
        json_schema_extra={"enum": list(SCHEDULERS)},
    )
    cfg_scale: float | None = Field(
        default=None, description="Another name of guidance, which goes before it.", ge=1, le=20
    )
    clip_skip: int = Field(default=0, description="How many of CLIP's last layers are left out.", ge=0, le=2)
    refine: Literal["no_refiner", "expert_ensemble_refiner", "base_image_refiner"] = Field(
        default="no_refiner",
        description="SDXL's refiner takes over the last of the noise, or paints once more over the picture.",
    )
    high_noise_frac: float = Field(
        default=0.8, description="Share of the noise's way before expert_ensemble_refiner takes over.", ge=0, le=1
    )
    refine_steps: int | None = Field(
        default=None,
        description="Steps of base_image_refiner, which takes the last 0.3 of them; else num_inference_steps.",
        ge=1,
    )
    apply_watermark: bool = Field(default=False, description="Add SDXL's invisible watermark.")
    use_standard_sdxl: bool = Field(default=False, description="Paint with SDXL base in place of Illustrious XL.")
    width: int | None = Field(
        default=None, description="Pixels, a multiple of 8; with height, in place of aspect_ratio.", ge=256, le=2048
    )
    height: int | None = Field(
        default=None, description="Pixels, a multiple of 8; with width, in place of aspect_ratio.", ge=256, le=2048
    )
    loras: list[str] | None = Field(
        default=None,
        description="More LoRAs, each written like lora_weights, or as SOURCE::SCALE.",
        max_length=MOST_LORAS,
    )
    guidance_scale: float | None = Field(default=None, description="Another name of guidance.", ge=1, le=20)
    replicate_weights: str | None = Field(default=None, description="Another name of lora_weights.")
    hf_lora: str | None = Field(default=None, description="Another name of lora_weights.")

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_our_words(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise request_error(error, cls) from None

    @field_validator(*_MAY_BE_BLANK, mode="before")
    @classmethod
    def _blank_is_not_given(cls, value: object) -> object:
        """Forms send an empty text for what nobody has filled in."""
        if isinstance(value, list | tuple):
            return [each for each in value if not _is_blank(each)] or None
        return None if _is_blank(value) else value

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.mask is not None and self.image is None:
            raise RequestError("mask", quotable(self.mask), "usable alone", "name the picture with image")
        if (self.width is None) != (self.height is None):
            given = "width" if self.height is None else "height"
            raise RequestError(given, getattr(self, given), "usable alone", "give width and height")
        if self.refine == "base_image_refiner" and int((steps := self.refine_steps or self.steps) * _REFINED) < 1:
            field = "num_inference_steps" if self.refine_steps is None else "refine_steps"
            least = math.ceil(1 / _REFINED)
            raise RequestError(field, steps, f"at least {least} with base_image_refiner", f"nearest: {least}")
        names = ("lora_weights", "replicate_weights", "hf_lora")
        said = [(name, text) for name in names if (text := getattr(self, name)) is not None]
        if len(said) > 1:
            (first, _), (second, text), *_ = said
            raise RequestError(second, quotable(text), f"usable with {first}", "they are one field")
        _ = self.solver
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        if self.width is not None and self.height is not None:
            return self.width, self.height
        return size_of(self.aspect_ratio, self.megapixels)

    @property
    def solver(self) -> str:
        """The scheduler as the engine calls it; capitals, spaces and dashes do not matter. Raises RequestError."""
        known = {name.lower().translate(_MARKS): solver for name, solver in SCHEDULERS.items()}
        known |= {solver.translate(_MARKS): solver for solver in SCHEDULERS.values()}
        if (solver := known.get(self.scheduler.lower().translate(_MARKS))) is None:
            near = get_close_matches(self.scheduler, SCHEDULERS, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else ""
            raise RequestError("scheduler", self.scheduler, f"one of: {', '.join(SCHEDULERS)}", hint)
        return solver

    @property
    def steps(self) -> int:
        """Steps that are taken: `go_fast` never takes more than were asked for."""
        asked = self.num_inference_steps
        return min(asked, max(_FASTEST, asked // 2)) if self.go_fast else asked

    def refiner(self, model: str) -> dict[str, object] | None:
        """What the engine's request says of a refiner, which is that of the name `model`."""
        if self.refine == "expert_ensemble_refiner":
            return {"model": model, "start": self.high_noise_frac}
        if self.refine == "base_image_refiner":
            return {"model": model, "strength": _REFINED, "steps": self.refine_steps}
        return None

    @property
    def main_lora(self) -> str | None:
        """`lora_weights` under whichever of its names it was given."""
        return self.lora_weights or self.replicate_weights or self.hf_lora


def _is_blank(value: object) -> bool:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    return isinstance(text, str) and not text.strip()


def parse_input(values: Mapping[str, Any]) -> tuple[FluxCompatibleInput, tuple[str, ...]]:
    """What a client sent, and warnings for fields that nobody knows.

    Raises:
        RequestError: the first field that cannot be used, with what is allowed.

    Example:
        >>> parse_input({"prompt": "a cat", "promt_strength": 0.5})[1]
        ('promt_strength is not known and has no effect; did you mean prompt_strength?',)
    """
    known = FluxCompatibleInput.model_fields
    warnings = []
    for name in values:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.append(f"{str(name)[:80]} is not known and has no effect{hint}")
    return FluxCompatibleInput.model_validate(dict(values)), tuple(warnings)


def to_request(
    given: FluxCompatibleInput,
    *,
    model: str,
    illustrations: bool,
    safety: Literal["off", "blur", "reject"],
    refiner: str = "sdxl-refiner",
    image: str | None = None,
    mask: str | None = None,
    lora: tuple[Lora, ...] = (),
) -> tuple[GenerationRequest, tuple[str, ...]]:
    """The engine's request for a call, and warnings.

    Args:
        given: the call.
        model: what is painted with.
        illustrations: whether that model has a negative prompt of its own where none is given.
        safety: what becomes of unsafe pictures where the call does not switch the checker off.
        refiner: what finishes pictures where the call wants them refined.
        image, mask: files of what the call names, of the size that is painted.
        lora: its LoRAs, the main one first.

    Raises:
        RequestError: a value that cannot be used, under the call's name for it.
    """
    width, height = given.size
    said = [each for each in (given.guidance, given.guidance_scale, given.cfg_scale) if each is not None]
    guidance = said[0] if said else None
    warnings = (f"guidance {said[0]:g} was used; its other names said otherwise",) if len(set(said)) > 1 else ()
    if illustrations and given.refine != "no_refiner":
        warnings += ("the refiner was trained on what SDXL base paints and spoils illustrations: use_standard_sdxl",)
    negative = given.negative_prompt
    if negative is None:  # without guidance a negative has no effect, so none is put in
        negative = ILLUSTRATION_NEGATIVE if illustrations and (guidance is None or guidance > 1) else ""
    fields = {
        "prompt": given.prompt,
        "negative": negative,
        "model": model,
        "width": width,
        "height": height,
        "num_images": given.num_outputs,
        "seed": None if given.seed == -1 else given.seed,
        "steps": given.steps,
        "scheduler": given.solver,
        "clip_skip": given.clip_skip,
        "guidance": guidance,
        "init_image": image,
        "init_strength": None if image is None else given.prompt_strength,
        "mask": mask,
        "refiner": given.refiner(refiner),
        "lora": lora,
        "safety": "off" if given.disable_safety_checker else safety,
    }
    try:
        return parse_request(fields), warnings
    except RequestError as error:
        raise in_our_words(error) from None


def in_our_words(error: RequestError) -> RequestError:
    """The engine's complaint with the field as callers of predictors know it."""
    name, _, rest = error.field.partition(".")
    if name not in _OUR_NAMES:
        return error
    field = _OUR_NAMES.get(error.field, ".".join([_OUR_NAMES[name], rest]))
    hint = error.hint.replace("give refiner.strength", "take base_image_refiner")
    return RequestError(field, error.value, error.allowed, hint)
