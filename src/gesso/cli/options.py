"""Command-line options made from `GenerationRequest`'s fields, and the ways to say a size.

Here: one typer option a field (its name, help and bounds come from the schema), and the request read back from them.
Not here: what a model allows, and options that are not the request's (folder, format, …): those are the commands'.
"""

import inspect
import re
import secrets
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple, Union, cast, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gesso.errors import RequestError
from gesso.request import GenerationRequest, parse_request
from gesso.request_parts import Identity, Refiner
from gesso.request_words import allowed_values

PANEL = "The request"
SIZE_PANEL = "Ways to say the size"

# Defaults that differ on the command line: one person at a terminal wants the same pixels again, a server wants speed.
_COMMAND_LINE_DEFAULTS: dict[str, object] = {"deterministic": True}
_LARGEST_DRAWN_SEED = 2**31


class _Part(NamedTuple):
    """A field with fields of its own: what it is, its schema, and the field of that which stands for the whole."""

    what: str
    schema: type[BaseModel]
    named: str
    panel: str


_PARTS = {
    "identity": _Part("photograph", Identity, "image", "A person, with --identity"),
    "refiner": _Part("refiner", Refiner, "model", "A refiner of SDXL, with --refiner"),
}


def request_options(*, without: Sequence[str] = ()) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Gives a command the request's options, except the fields named in `without`.

    The command takes `options: dict[str, object]` first, to be read with `request_fields`; its other parameters stay.
    """

    def decorate(function: Callable[..., object]) -> Callable[..., object]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        everything = (*_field_parameters(), *_part_parameters(), *_size_parameters())
        made = [each for each in everything if each.name not in without]
        names = [parameter.name for parameter in made]

        def command(**values: object) -> object:
            return function({name: values.pop(name) for name in names}, **values)

        parameters = sorted([*made, *own], key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__, command.__name__ = function.__doc__, function.__name__
        return command

    return decorate


def request_fields(options: Mapping[str, object], default_size: tuple[int, int] | None = None) -> dict[str, object]:
    """The fields that were given, ready for `parse_request` once a prompt is added.

    Args:
        options: values of the options by field name, plus size, aspect and megapixels; None is not given.
        default_size: width and height of the model's own pictures, for an aspect without megapixels.

    Raises:
        RequestError: a number or a size cannot be read, or two options say the size.
    """
    given = {name: value for name, value in options.items() if value is not None and value != []}
    fields = {name: value for name, value in given.items() if name in GenerationRequest.model_fields}
    for name, value in fields.items():
        if isinstance(value, str):
            fields[name] = _read(name, value)
        elif isinstance(value, list):
            fields[name] = tuple(value)
    fields |= _size(options, default_size)
    for name, part in _PARTS.items():
        fields |= _part(name, part, options)
    return fields


def check_fields(fields: Mapping[str, object]) -> None:
    """Checks everything but the prompts, so that a bad option is found whatever the prompts are."""
    parse_request({**fields, "prompt": "any"})


def drawn_seed() -> int:
    """A seed by chance, short enough to type again."""
    return secrets.randbelow(_LARGEST_DRAWN_SEED)


def _field_parameters() -> list[inspect.Parameter]:
    made = []
    for name, field in GenerationRequest.model_fields.items():
        if name == "prompt":  # an argument, not an option
            continue
        if _is_repeated(field):
            option = typer.Option(
                *_spellings(name, list), help=_help(name, field), rich_help_panel=PANEL, metavar=_metavar(field)
            )
            made.append(_keyword(name, list[str] | None, option, None))
            continue
        kind = bool if _plain_type(field) is bool else str  # numbers are read here and refused in the schema's words
        default = _COMMAND_LINE_DEFAULTS.get(name, field.default if kind is bool else None)
        option = typer.Option(
            *_spellings(name, kind),
            help=_help(name, field),
            rich_help_panel=PANEL,
            show_default=kind is bool,
            metavar=None if kind is bool else _metavar(field),
        )
        made.append(_keyword(name, bool if kind is bool else str | None, option, default))
    return made


def _part_parameters() -> list[inspect.Parameter]:
    """One option a field of a part but the one that stands for the whole of it, which `--identity` itself names."""
    made = []
    for name, part in _PARTS.items():
        for field, information in part.schema.model_fields.items():
            if field != part.named:
                option = typer.Option(
                    f"--{name}-{field}",
                    help=_help(field, information, part.schema),
                    rich_help_panel=part.panel,
                    metavar=_metavar(information),
                )
                made.append(_keyword(f"{name}_{field}", str | None, option, None))
    return made


def _part(name: str, part: _Part, options: Mapping[str, object]) -> dict[str, object]:
    """A part of a request: what it is named by alone, or with what was said of it besides."""
    said = {
        field: _read(field, str(options[f"{name}_{field}"]), part.schema)
        for field in part.schema.model_fields
        if options.get(f"{name}_{field}") is not None
    }
    named = options.get(name)
    if said and named is None:
        first = f"--{name}-{next(iter(said))}"
        raise RequestError(first, next(iter(said.values())), "usable alone", f"name the {part.what} with --{name}")
    return {name: {part.named: named, **said}} if said else {}


def _size_parameters() -> list[inspect.Parameter]:
    options = {
        "size": ("WIDTHxHEIGHT", "Pixels, such as 1024x768."),
        "aspect": ("WIDTH:HEIGHT", "Such as 3:2; with --megapixels, else with as many pixels as the model's own."),
        "megapixels": ("NUMBER", "Millions of pixels; square unless --aspect says otherwise."),
    }
    made = []
    for name, (metavar, text) in options.items():
        option = typer.Option(f"--{name}", metavar=metavar, help=text, rich_help_panel=SIZE_PANEL)
        made.append(_keyword(name, str | None, option, None))
    return made


def _keyword(name: str, annotation: object, option: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[annotation, option], default=default
    )


def _spellings(name: str, kind: type) -> list[str]:
    long = f"--{name.replace('_', '-')}"
    return [f"{long}/--no-{long[2:]}"] if kind is bool else [long]


def _plain_type(field: FieldInfo) -> object:
    """The type of one value of the field: the first member of a union, which is never its list."""
    annotation: object = field.annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    plain = next(member for member in members if member is not type(None))
    return get_args(plain)[0] if get_origin(plain) is Annotated else plain


def _is_repeated(field: FieldInfo) -> bool:
    """Whether the option is given once for each of several, none of which may stand for all."""
    return get_origin(field.annotation) is tuple


def _metavar(field: FieldInfo) -> str:
    if _is_repeated(field):
        return "SOURCE[::SCALE]"
    if _is_list(field):
        return "NUMBER,..."
    return {int: "INTEGER", float: "NUMBER"}.get(cast("type", _plain_type(field)), "TEXT")


def _is_list(field: FieldInfo) -> bool:
    return any(get_origin(member) is tuple for member in get_args(field.annotation))


def _help(name: str, field: FieldInfo, kind: type[BaseModel] = GenerationRequest) -> str:
    text = field.description or ""
    allowed = allowed_values(name, kind)
    notes = [allowed] if allowed and "characters" not in allowed else []
    if kind is GenerationRequest and _is_repeated(field):
        notes = [f"repeatable, {allowed}"]
    if name in ("model", "num_images"):
        notes.append(f"default {field.default}")
    return f"{text} ({'; '.join(notes)})" if notes else text


def _read(name: str, text: str, schema: type[BaseModel] = GenerationRequest) -> object:
    """The text as the field's numbers; as it is where it is none, for the schema to refuse in its own words."""
    field = schema.model_fields[name]
    kind = _plain_type(field)
    if kind not in (int, float):
        return text
    if _is_list(field) and "," in text:
        try:
            return tuple(float(part) for part in text.split(","))
        except ValueError:
            raise RequestError(name, text, "a number, or numbers separated by commas") from None
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        return text


def _size(options: Mapping[str, object], default_size: tuple[int, int] | None) -> dict[str, int]:
    """Width and height from --size, or from --aspect and --megapixels; empty where neither is given."""
    size, aspect, megapixels = (options.get(name) for name in ("size", "aspect", "megapixels"))
    ways = [
        option
        for option, given in (
            ("--size", size is not None),
            ("--width and --height", options.get("width") is not None or options.get("height") is not None),
            ("--aspect and --megapixels", aspect is not None or megapixels is not None),
        )
        if given
    ]
    if len(ways) > 1:
        raise RequestError("size", " with ".join(ways), "said in one way", "give one of them")
    if size is not None:
        match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", str(size).strip().lower())
        if match is None:
            raise RequestError("size", size, "WIDTHxHEIGHT in pixels, such as 1024x768")
        return {"width": int(match[1]), "height": int(match[2])}
    if aspect is None and megapixels is None:
        return {}
    return _size_of_shape(str(aspect) if aspect is not None else "1:1", megapixels, default_size)


def _size_of_shape(aspect: str, megapixels: object, default_size: tuple[int, int] | None) -> dict[str, int]:
    match = re.fullmatch(r"(\d{1,5}(?:\.\d{1,5})?):(\d{1,5}(?:\.\d{1,5})?)", aspect.strip())
    ratio = float(match[1]) / float(match[2]) if match and float(match[1]) and float(match[2]) else None
    if ratio is None or not 1 / 32 <= ratio <= 32:
        raise RequestError("aspect", aspect, "WIDTH:HEIGHT, such as 3:2, from 1:32 to 32:1")
    if megapixels is not None:
        area = _million(str(megapixels)) * 1e6
    else:
        width, height = default_size or (1024, 1024)
        area = float(width * height)
    multiple = 16 if area >= 64 * 64 else 8
    width, height = ((area * ratio) ** 0.5, (area / ratio) ** 0.5)
    return {
        "width": max(multiple, round(width / multiple) * multiple),
        "height": max(multiple, round(height / multiple) * multiple),
    }


def _million(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0001 <= value <= 256:  # refuses NaN too
        raise RequestError("megapixels", text, "a number from 0.0001 to 256")
    return value
