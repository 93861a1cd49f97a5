"""`GenerationRequest`: the only schema. Options, Python calls and metadata are all made from its fields.

Here: the fields, their bounds and their help. Not here: fields of fields (`request_parts`), complaints in words
(`request_words`), what a particular model allows (its pipeline's `plan` checks that), the command line's spelling.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from gesso.cache_settings import CacheSettings
from gesso.errors import RequestError
from gesso.request_parts import Identity, Lora, Refiner
from gesso.request_words import LARGEST_COUNT, LARGEST_SEED, request_error

MOST_LORAS = 32  # in one request

GuidanceScale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
LONGEST_LIST = 1000  # values; no schedule has more steps, and metadata stays small enough for EXIF
Text = Annotated[str, StringConstraints(strip_whitespace=True)]


class GenerationRequest(BaseModel):
    """What is asked for: one prompt, any number of pictures. Frozen; `None` means "the model's default".

    Raises:
        RequestError: on construction, for the first field that cannot be used.

    Example:
        >>> GenerationRequest(prompt="a red star", seed=7).num_images
        1
        >>> GenerationRequest(prompt="")
        Traceback (most recent call last):
        ...
        gesso.errors.RequestError: prompt "" is not text of 1 to 2000 characters
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    prompt: Text = Field(description="What to paint.", min_length=1, max_length=2000)
    negative: Text = Field(default="", description="What to keep away from.", max_length=2000)
    model: Text = Field(
        default="infinity-nano", description="Catalogue name, or path of a checkpoint.", min_length=1, max_length=1000
    )
    width: int | None = Field(default=None, description="Pixels; else the model's own.", ge=8, le=16384)
    height: int | None = Field(default=None, description="Pixels; else the model's own.", ge=8, le=16384)
    frames: int | None = Field(
        default=None, description="Video: how many pictures it has; else the model's own.", ge=1, le=10_000
    )
    fps: float | None = Field(
        default=None,
        description="Video: frames a second when it is played; else the model's own.",
        ge=1,
        le=240,
        allow_inf_nan=False,
    )
    num_images: int = Field(default=1, description="Pictures of each prompt.", ge=1, le=10_000)
    seed: int | None = Field(
        default=None, description="Picture i uses seed + i; else drawn by chance.", ge=0, le=LARGEST_SEED
    )
    steps: int | None = Field(
        default=None, description="Evaluations of a diffusion network; else the model's own.", ge=1, le=1000
    )
    scheduler: str | None = Field(
        default=None, description="Diffusion: how a step is taken; else the model's own.", min_length=1, max_length=100
    )
    clip_skip: int | None = Field(default=None, description="SDXL: CLIP's layers left out; else 0.", ge=0, le=100)
    guidance: GuidanceScale | tuple[GuidanceScale, ...] | None = Field(
        default=None, description="How strongly the prompt pulls: one number, or one a step or scale."
    )
    guidance_layer: int | None = Field(
        default=None,
        description="Infinity: 0 guides the logits, -k the features k blocks before the end.",
        ge=-1000,
        le=0,
    )
    true_guidance: float | None = Field(
        default=None,
        description="FLUX: guidance by a second evaluation with the negative prompt; 1 is off.",
        ge=0,
        le=100,
        allow_inf_nan=False,
    )
    guidance_normalization: float | None = Field(
        default=None,
        description="Z-Image: most length of the guided step, in lengths of the prompt's own; 0 for no limit.",
        ge=0,
        le=100,
        allow_inf_nan=False,
    )
    guidance_truncation: float | None = Field(
        default=None,
        description="Z-Image: share of the way after which guidance stops; 1 is never.",
        ge=0,
        le=1,
        allow_inf_nan=False,
    )
    temperature: Temperature | tuple[Temperature, ...] | None = Field(
        default=None, description="Autoregressive models: below 1 is safer, above is freer; one number, or one a scale."
    )
    top_k: int | None = Field(
        default=None, description="Sample among the k likeliest values; 0 for all.", ge=0, le=LARGEST_COUNT
    )
    top_p: float | None = Field(
        default=None,
        description="Sample among the likeliest values that hold this share.",
        ge=0,
        le=1,
        allow_inf_nan=False,
    )
    revisions: int | None = Field(
        default=None, description="Infinity: before how many of the last scales the picture is mended.", ge=0, le=100
    )
    init_image: str | None = Field(default=None, description="Picture to start from.", min_length=1, max_length=4096)
    init_strength: float | None = Field(
        default=None,
        description="How much of the starting picture is painted anew; 1 ignores it.",
        ge=0,
        le=1,
        allow_inf_nan=False,
    )
    mask: str | None = Field(
        default=None,
        description="Picture that is white where init_image is painted anew, black where it stays.",
        min_length=1,
        max_length=4096,
    )
    identity: Identity | None = Field(
        default=None, description="FLUX: photograph of the person whose face the pictures show."
    )
    refiner: Refiner | None = Field(
        default=None, description="SDXL: second network that finishes the pictures, such as sdxl-refiner."
    )
    lora: tuple[Lora, ...] = Field(
        default=(), description="LoRA or other adapter, as SOURCE or SOURCE::SCALE.", max_length=MOST_LORAS
    )
    cache: CacheSettings | None = Field(
        default=None, description="Step cache, such as taylorseer:interval=5,order=2; forecasts steps for speed."
    )
    deterministic: bool = Field(
        default=False, description="The same pixels whatever else is painted at the same time (slower in company)."
    )
    safety: Literal["off", "blur", "reject"] | None = Field(
        default=None, description="Pictures that the safety checker flags: off, blur or reject; else the setting."
    )

    @field_validator("lora", mode="before")
    @classmethod
    def _one_stands_for_itself(cls, value: object) -> object:
        several = () if value is None else (value,) if isinstance(value, str | Mapping | Lora) else value
        if not isinstance(several, list | tuple) or len(several) > MOST_LORAS:
            given = f"a list of {len(several)}" if isinstance(several, list | tuple) else value
            raise RequestError("lora", given, f"a source such as owner/style::0.8, or at most {MOST_LORAS} of them")
        return several

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_our_words(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise request_error(error, cls) from None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.seed is not None and self.seed + self.num_images - 1 > LARGEST_SEED:
            raise RequestError("seed", self.seed, "at most 2^63 - 1 less the pictures after the first")
        if self.init_strength is not None and self.init_image is None:
            raise RequestError("init_strength", self.init_strength, "usable alone", "name the picture with init_image")
        seen: set[str] = set()
        for lora in self.lora:
            if lora.key in seen:
                raise RequestError("lora", lora.shown, "named once", "add its scales up instead")
            seen.add(lora.key)
        if self.mask is not None and self.init_image is None:
            raise RequestError("mask", self.mask, "usable alone", "name the picture with init_image")
        for name in ("guidance", "temperature"):
            values = getattr(self, name)
            if isinstance(values, tuple) and not 1 <= len(values) <= LONGEST_LIST:
                raise RequestError(name, values, f"one number, or 1 to {LONGEST_LIST} of them")
        return self


def parse_request(values: Mapping[str, object]) -> GenerationRequest:
    """A request from a mapping of field names (JSON, a row, options).

    Raises:
        RequestError: the first field that is unknown or cannot be used, with what is allowed.

    Example:
        >>> parse_request({"prompt": "a ring", "num_images": 2}).num_images
        2
    """
    return GenerationRequest.model_validate(dict(values))
