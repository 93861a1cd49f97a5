"""A schema's fields in words: what is allowed in each, and pydantic's complaints as `RequestError`.

Bounds and names come from the fields, never from pydantic's texts. Not here: any schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import BaseModel, SecretStr, ValidationError

from gesso.errors import RequestError

LARGEST_SEED = 2**63 - 1
LARGEST_COUNT = 2**31 - 1

_ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")


def allowed_values(field: str, kind: type[BaseModel]) -> str:
    """The allowed values of a schema's field in words ("1 to 10000"), "" where the type says it all."""
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
    unit = " texts" if _is_list_of_texts(information.annotation) else unit
    if opened:
        return f"above {low} and at most {high}{unit}" if high else f"above {low}"
    if high:
        return f"{low} to {high}{unit}" if low else f"at most {high}{unit}"
    return f"at least {low}{unit}" if low else ""


def _constraints(parts: Sequence[object]) -> Iterator[object]:
    """Every bound among `parts` and inside them: pydantic nests those of a union's members in its type."""
    for part in parts:
        yield part
        yield from _constraints(getattr(part, "metadata", []) if not get_args(part) else get_args(part))


def _is_text(annotation: object) -> bool:
    return annotation is str or any(_is_text(part) for part in get_args(annotation))


def _is_list_of_texts(annotation: object) -> bool:
    return any(get_origin(each) is list and get_args(each) == (str,) for each in (annotation, *get_args(annotation)))


_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", SecretStr: "text"}


def _type_words(annotation: object) -> str:
    for kind, words in _TYPE_WORDS.items():
        if annotation is kind or any(_type_words(part) == words for part in get_args(annotation)):
            return words
    return ""


def request_error(error: ValidationError, kind: type[BaseModel], prefix: str = "") -> RequestError:
    """The first of pydantic's complaints in our words; bounds and names come from the fields, not from its texts."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        whole = prefix.removesuffix(".") or "request"
        return RequestError(whole, first["input"], "a mapping of field names to values")
    field = str(first["loc"][0])
    if field not in kind.model_fields:
        known = list(kind.model_fields)
        near = get_close_matches(field, known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"fields: {', '.join(known)}"
        return RequestError("field", f"{prefix}{field}", "a field of a request", hint)
    if first["type"] == "missing":
        return RequestError(f"{prefix}{field}", "", "given", "every request needs it" if not prefix else "")
    value = _quotable(first["input"], kind.model_fields[field].annotation)
    return RequestError(f"{prefix}{field}", value, _allowed_sentence(field, kind))


def _quotable(value: object, annotation: object) -> object:
    """What was given, without what may be a secret: a token, or a part of an address."""
    from gesso.network import shown

    if SecretStr in (annotation, *get_args(annotation)):
        return "(not shown)"
    if isinstance(value, list | tuple) and _is_text(annotation):
        return f"a list of {len(value)}"
    return shown(value.strip()) if isinstance(value, str) and _ADDRESS.match(value) else value


def _allowed_sentence(field: str, kind: type[BaseModel]) -> str:
    """What may stand in a field, as it completes "width 5 is not …": "a whole number from 8 to 16384"."""
    annotation = kind.model_fields[field].annotation
    members = [each for each in (annotation, *get_args(annotation)) if get_origin(each) is Literal]
    names = [str(name) for member in members for name in get_args(member)]
    if names:
        return f"one of: {', '.join(names)}"
    type_words, words = _type_words(annotation), allowed_values(field, kind)
    if _is_list_of_texts(annotation):
        return f"a list of {words or 'texts'}"
    if type_words == "text":
        return f"text of {words}" if words else "text"
    joint = "" if not words or words.startswith(("above", "at ")) else "from "
    return f"{type_words} {joint}{words}".strip()
