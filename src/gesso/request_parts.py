"""Fields of a request that have fields of their own: a person, a refiner, an adapter. Each has a short form in text.

Not here: the request (`request`), what parts do (`pipelines`, `adapters`). Nothing heavy is imported.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_serializer,
    model_validator,
)

from gesso.errors import RequestError
from gesso.request_words import request_error

if TYPE_CHECKING:
    from gesso.adapters.sources import Source

LARGEST_LORA_SCALE = 20.0  # either way; beyond it, every known adapter paints noise


Part = TypeVar("Part", bound=BaseModel)


def _read(
    kind: type[Part], value: object, handler: ModelWrapValidatorHandler[Part], name: str, short: str, words: str
) -> Part:
    """A part of a request by its field's `name`; a text alone is its field `short`. Raises RequestError."""
    if isinstance(value, str):
        value = {short: value}
    elif not isinstance(value, Mapping | kind):
        raise RequestError(name, value, f"{words}, or a mapping with {short}")
    try:
        return handler(value)
    except ValidationError as error:
        raise request_error(error, kind, f"{name}.") from None


class Identity(BaseModel):
    """Whose face the pictures show. Its path alone stands for the whole of it.

    Raises:
        RequestError: on construction, for the first field that cannot be used.

    Example:
        >>> Identity.model_validate("man.jpg").image
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
        return _read(cls, value, handler, "identity", "image", "the path of a photograph")

    @model_validator(mode="after")
    def _window_is_open(self) -> Self:
        if self.start is not None and self.end is not None and self.start > self.end:
            raise RequestError("identity.start", self.start, f"at most identity.end, {self.end}")
        return self


class Refiner(BaseModel):
    """A second network that finishes what the model began. Its name alone stands for the whole of it.

    With `start` it takes over what noise is left there; with `strength` it begins anew from the finished picture.

    Raises:
        RequestError: on construction, for the first field that cannot be used.

    Example:
        >>> Refiner.model_validate("sdxl-refiner").model
        'sdxl-refiner'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Catalogue name, or folder of a refiner.", min_length=1, max_length=1000)
    start: float | None = Field(
        default=None,
        description="Share of the noise's way at which it takes over; else 0.8.",
        ge=0,
        le=1,
        allow_inf_nan=False,
    )
    strength: float | None = Field(
        default=None, description="In place of start: how much of the finished picture is painted anew.", gt=0, le=1
    )
    steps: int | None = Field(
        default=None, description="With strength: steps of the whole way; else the request's.", ge=1, le=1000
    )

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_our_words(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return _read(cls, value, handler, "refiner", "model", "the name of a refiner")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.start is not None and self.strength is not None:
            raise RequestError("refiner.start", self.start, "usable with refiner.strength", "give one of them")
        if self.steps is not None and self.strength is None:
            hint = "give refiner.strength; else it takes what is left of the request's own steps"
            raise RequestError("refiner.steps", self.steps, "usable alone", hint)
        return self


class Lora(BaseModel):
    """A LoRA or other adapter, and how strongly it is wanted. "SOURCE::0.8" alone stands for the whole of it.

    Written as JSON, the source is without what may be a secret in its address.

    Raises:
        RequestError: on construction, for the first field that cannot be used.

    Example:
        >>> Lora.model_validate("owner/style::0.8")
        Lora(source='owner/style', scale=0.8)
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

    @property
    def shown(self) -> str:
        """The source as it may be told: in one spelling, and without what may be a secret in its address."""
        return _source(self.source).shown

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_our_words(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        from gesso.adapters.sources import split_scale

        values: object = {"source": value} if isinstance(value, str) else value
        if isinstance(values, Mapping) and isinstance(text := values.get("source"), str):
            try:
                plain, scale = split_scale(text.strip())
            except RequestError as error:
                raise RequestError("lora.scale", error.value, error.allowed) from None
            if scale is not None and values.get("scale") is not None:
                raise RequestError("lora.scale", values["scale"], "usable here", f"the source says {scale:g} already")
            values = {**values, "source": plain, **({"scale": scale} if scale is not None else {})}
        made = _read(cls, values, handler, "lora", "source", "a source such as owner/style::0.8")
        _source(made.source)
        return made

    @field_serializer("source", when_used="json")
    def _without_secrets(self, source: str) -> str:
        return _source(source).shown if "?" in source else source


def _source(text: str) -> "Source":
    """Where an adapter comes from, read from what was written. Raises RequestError."""
    from gesso.adapters.sources import parse

    try:
        return parse(text)
    except RequestError as error:
        raise RequestError("lora", error.value, error.allowed, error.hint) from None
