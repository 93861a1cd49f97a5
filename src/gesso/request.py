"""`GenerationRequest`: the only schema. Options, Python calls and metadata are all made from its fields.

Here: the fields, their bounds, their help, and the one conversion from pydantic's errors to `RequestError`.
Not here: what a particular model allows (its pipeline's `plan` checks that), files, and the command line's spelling.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Literal, Self, get_args, get_origin

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from gesso.cache_settings import CacheSettings
from gesso.errors import RequestError

if TYPE_CHECKING:
    from gesso.adapters.sources import Source

LARGEST_SEED = 2**63 - 1
LARGEST_COUNT = 2**31 - 1
LARGEST_LORA_SCALE = 20.0  # either way; beyond it, every known adapter paints noise
MOST_LORAS = 32  # in one request

GuidanceScale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
LONGEST_LIST = 1000  # values; no schedule has more steps, and metadata stays small enough for EXIF
Text = Annotated[str, StringConstraints(strip_whitespace=True)]


class Identity(BaseModel):
    """Whose face the pictures show. Its path alone stands for the whole of it.

    Raises:
        RequestError: on construction, for the first field that cannot be used.

    Example:
        >>> GenerationRequest(prompt="a man", identity="man.jpg").identity.image
        'man.jpg'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str = Field(description="Photograph of the person whose face is kept.", min_length=1, max_length=4096)
    strength: float | None = Field(
        default=None, description="How strongly the face is kept; else 1.", ge=0, le=2, allow_inf_nan=False
    )
    start: float | None = Field(
        default=None, description="Share of the way from which the face acts; else 0.", ge=0, le=1, allow_inf_nan=False
    )
    end: float | None = Field(
        default=None, description="Share of the way up to which the face acts; else 1.", ge=0, le=1, allow_inf_nan=False
    )
    pose: str | None = Field(
        default=None, description="Picture of a face that is held as it shall be.", min_length=1, max_length=4096
    )
    variant: Literal["aes_stage2", "sim_stage1"] | None = Field(
        default=None, description="aes_stage2 for text and looks (the default), sim_stage1 for likeness."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_our_words(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, str):
            value = {"image": value}
        elif not isinstance(value, Mapping | cls):
            raise RequestError("identity", value, "the path of a photograph, or a mapping with image")
        try:
            return handler(value)
        except ValidationError as error:
            raise request_error(error, cls, "identity.") from None

    @model_validator(mode="after")
    def _window_is_open(self) -> Self:
        if self.start is not None and self.end is not None and self.start > self.end:
            raise RequestError("identity.start", self.start, f"at most identity.end, {self.end}")
        return self


class Lora(BaseModel):
    """A LoRA or other adapter, and how strongly it is wanted. "SOURCE::0.8" alone stands for the whole of it.

    Written as JSON, the source is without what may be a secret in its address.

    Raises:
        RequestError: on construction, for the first field that cannot be used.

    Example:
        >>> GenerationRequest(prompt="a cat", lora="owner/style::0.8").lora
        (Lora(source='owner/style', scale=0.8),)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="Where it comes from.", min_length=1, max_length=4096)
    scale: float | None = Field(
        default=None,
        description="How strongly it acts; else 1.",
        ge=-LARGEST_LORA_SCALE,
        le=LARGEST_LORA_SCALE,
        allow_inf_nan=False,
    )

    @property
    def key(self) -> str:
        """The same for every spelling of one source, whatever its scale."""
        return _source(self.source).key

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_our_words(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        from gesso.adapters.sources import split_scale

        values: object = {"source": value} if isinstance(value, str) else value
        if not isinstance(values, Mapping | cls):
            raise RequestError("lora", value, "a source such as owner/style::0.8, or a mapping with source")
        if isinstance(values, Mapping) and isinstance(text := values.get("source"), str):
            try:
                plain, scale = split_scale(text.strip())
            except RequestError as error:
                raise RequestError("lora.scale", error.value, error.allowed) from None
            if scale is not None and values.get("scale") is not None:
                raise RequestError("lora.scale", values["scale"], "usable here", f"the source says {scale:g} already")
            values = {**values, "source": plain, **({"scale": scale} if scale is not None else {})}
        try:
            made = handler(values)
        except ValidationError as error:
            raise request_error(error, cls, "lora.") from None
        _source(made.source)
        return made

    @field_serializer("source", when_used="json")
    def _without_secrets(self, source: str) -> str:
        return _source(source).shown if "?" in source else source


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
            raise RequestError("lora", value, f"a source such as owner/style::0.8, or at most {MOST_LORAS} of them")
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
                raise RequestError("lora", lora.source, "named once", "add its scales up instead")
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


def allowed_values(field: str, kind: type[BaseModel] = GenerationRequest) -> str:
    """The allowed values of a request's field in words ("1 to 10000"), "" where the type says it all.

    Example:
        >>> allowed_values("num_images")
        '1 to 10000'
    """
    information = kind.model_fields[field]
    low, high, opened = "", "", False
    for bound in _constraints((*information.metadata, information.annotation)):
        match bound:
            case Ge(ge=value) | MinLen(min_length=value):
                low = str(value)
            case Gt(gt=value):
                low, opened = str(value), True
            case Le(le=value) | MaxLen(max_length=value):
                high = str(value).replace(str(LARGEST_SEED), "2^63 - 1").replace(str(LARGEST_COUNT), "2^31 - 1")
            case _:
                pass
    unit = " characters" if _is_text(information.annotation) else ""
    if opened:
        return f"above {low} and at most {high}{unit}"
    if high:
        return f"{low} to {high}{unit}" if low else f"at most {high}{unit}"
    return ""


def _source(text: str) -> "Source":
    """Where an adapter comes from, read from what was written. Raises RequestError."""
    from gesso.adapters.sources import parse

    try:
        return parse(text)
    except RequestError as error:
        raise RequestError("lora", error.value, error.allowed, error.hint) from None


def _constraints(parts: Sequence[object]) -> Iterator[object]:
    """Every bound among `parts` and inside them: pydantic nests those of a union's members in its type."""
    for part in parts:
        yield part
        yield from _constraints(getattr(part, "metadata", []) if not get_args(part) else get_args(part))


def _is_text(annotation: object) -> bool:
    return annotation is str or any(_is_text(part) for part in get_args(annotation))


_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _type_words(annotation: object) -> str:
    for kind, words in _TYPE_WORDS.items():
        if annotation is kind or any(_type_words(part) == words for part in get_args(annotation)):
            return words
    return ""


def request_error(error: ValidationError, kind: type[BaseModel], prefix: str = "") -> RequestError:
    """The first of pydantic's complaints in our words; bounds and names come from the fields, not from its texts."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return RequestError("request", first["input"], "a mapping of field names to values")
    field = str(first["loc"][0])
    if field not in kind.model_fields:
        known = list(kind.model_fields)
        near = get_close_matches(field, known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"fields: {', '.join(known)}"
        return RequestError("field", f"{prefix}{field}", "a field of a request", hint)
    if first["type"] == "missing":
        return RequestError(f"{prefix}{field}", "", "given", "every request needs it" if not prefix else "")
    return RequestError(f"{prefix}{field}", first["input"], _allowed_sentence(field, kind))


def _allowed_sentence(field: str, kind: type[BaseModel]) -> str:
    """What may stand in a field, as it completes "width 5 is not …": "a whole number from 8 to 16384"."""
    annotation = kind.model_fields[field].annotation
    members = [each for each in (annotation, *get_args(annotation)) if get_origin(each) is Literal]
    names = [str(name) for member in members for name in get_args(member)]
    if names:
        return f"one of: {', '.join(names)}"
    type_words, words = _type_words(annotation), allowed_values(field, kind)
    if type_words == "text":
        return f"text of {words}" if words else "text"
    joint = "" if not words or words.startswith(("above", "at most")) else "from "
    return f"{type_words} {joint}{words}".strip()
