"""Recipes by name: each a function that returns a whole training configuration.

A new recipe is a function in a file here and a line in `_RECIPES`. Options do not grow: everything is a field of the
recipe, and `override` sets one by its path ("loop.steps", "settings.side").
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeGuard, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from gesso.errors import RequestError
from gesso.training.recipes import faces as _faces
from gesso.training.recipes import flow as _flow
from gesso.training.recipes import lora as _lora
from gesso.training.recipes import shapes as _shapes
from gesso.training.recipes.recipe import Recipe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Node = TypeVar("Node")

LORA = "lora"
"""The one recipe that is for a model and data of the user's."""

_RECIPES: dict[str, Callable[[], Recipe]] = {
    "shapes-tokenizer": _shapes.shapes_tokenizer,
    "infinity-nano": _shapes.infinity_nano,
    "infinity-nano-on-policy": _shapes.infinity_nano_on_policy,
    "infinity-nano-unguided": _shapes.infinity_nano_unguided,
    "shapes-autoencoder": _flow.shapes_autoencoder,
    "flux-nano": _flow.flux_nano,
    "z-image-nano": _flow.z_image_nano,
    "flux-nano-on-policy": _flow.flux_nano_on_policy,
    "z-image-nano-on-policy": _flow.z_image_nano_on_policy,
    "faces-recogniser": _faces.faces_recogniser,
    "faces-autoencoder": _faces.faces_autoencoder,
    "flux-faces-nano": _faces.flux_faces_nano,
    "infinite-you-nano": _faces.infinite_you_nano,
}


def names() -> list[str]:
    return [*_RECIPES, LORA]


def load(name: str, *, model: str | None = None, data: str | None = None) -> Recipe:
    """The recipe of this name; that of a LoRA is for a `model` by name or path and for `data`, and no other is.

    Raises RequestError with the nearest names, where one of these is missing or too many, and for an unknown model.
    """
    given = {"model": model, "data": data}
    if name == LORA:
        for field, value in given.items():
            if not value:
                raise RequestError("recipe", name, f"usable without {field}", f"name it with --{field}")
        return _lora.lora(model or "", data or "")
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, names(), n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"recipes: {', '.join(names())}"
        raise RequestError("recipe", name, "a known recipe", hint)
    for field, value in given.items():
        if value is not None:
            raise RequestError(field, value, f"usable with the recipe {name}", f"it is for {LORA}")
    return _RECIPES[name]()


def override(recipe: Recipe, overrides: Mapping[str, str]) -> Recipe:
    """The recipe with fields set from text, by path or, where only one field has it, by the end of its path.

    All are set together, so that values which depend on each other may change in any order. Raises RequestError for a
    field that is unknown or ambiguous, and for values of the wrong type or that do not go together.
    """
    changes: dict[tuple[str, ...], tuple[str, str]] = {}
    for given, text in overrides.items():
        path = _full_path(recipe, given)
        if path in changes:
            raise RequestError("set", given, "set once", f"it is {'.'.join(path)}, which is set already")
        changes[path] = (given, text)
    return _changed(recipe, changes)


def _full_path(recipe: Recipe, given: str) -> tuple[str, ...]:
    paths = [(part, *path) for part in ("settings", "loop") for path in _paths(getattr(recipe, part))]
    whole = [path for path in paths if ".".join(path) == given]
    found = whole or [path for path in paths if f".{'.'.join(path)}".endswith(f".{given}")]
    if len(found) == 1:
        return found[0]
    known = [".".join(path) for path in (found or paths)]
    near = [name for name in known if name.endswith(f".{given}")]
    near = near or difflib.get_close_matches(given, known, n=3) or _ends_like(given, known) or known
    raise RequestError("set", given, "one field of the recipe", f"one of: {', '.join(near)}")


def _ends_like(given: str, paths: list[str]) -> list[str]:
    """Paths whose last part is spelt nearly so."""
    near = difflib.get_close_matches(given, [path.rpartition(".")[2] for path in paths], n=3)
    return [path for path in paths if path.rpartition(".")[2] in near]


def _paths(node: object) -> list[tuple[str, ...]]:
    """Where the values lie that are no configurations themselves."""
    if not _is_record(node):
        return [()]
    return [(field.name, *path) for field in dataclasses.fields(node) for path in _paths(getattr(node, field.name))]


def _changed(node: Node, changes: Mapping[tuple[str, ...], tuple[str, str]]) -> Node:
    """A copy of a record with all changes below it; `changes` are path -> (as it was named, new value as text)."""
    if not changes or not _is_record(node):
        return node
    hints = get_type_hints(type(node))
    values: dict[str, object] = {}
    for name in dict.fromkeys(path[0] for path in changes):
        below = {path[1:]: change for path, change in changes.items() if path[0] == name}
        leaf = below.get(())
        values[name] = _changed(getattr(node, name), below) if leaf is None else _parsed(*leaf, hints[name])
    try:
        return dataclasses.replace(node, **values)
    except (ValueError, ArithmeticError) as error:
        named = ", ".join(given for given, _ in changes.values())
        raise RequestError("set", named, "usable with these values", str(error)) from error


def _is_record(node: object) -> TypeGuard[DataclassInstance]:
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def _parsed(name: str, text: str, kind: object) -> object:
    """A value from text: JSON, or bare words where the field holds text."""
    try:
        value = json.loads(text) if kind is not str else text
    except ValueError:
        value = text
    if isinstance(value, bool) and kind is not bool:  # pydantic would take true for 1
        raise RequestError(name, text, _words(kind))
    try:
        return TypeAdapter(kind).validate_python(value)  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        raise RequestError(name, text, _words(kind)) from error


def _words(kind: object) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, f"of the kind {kind}") if isinstance(kind, type) else f"of the kind {kind}"
