"""Recipes by name: each a function that returns a whole training configuration.

A new recipe is a function in a file here and a line in `_RECIPES`. Options do not grow: everything is a field of the
recipe, and `override` sets one by its path ("loop.steps", "settings.side").
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from typing import cast

from gesso.errors import RequestError
from gesso.training.recipes import shapes as _shapes
from gesso.training.recipes.recipe import Recipe

_RECIPES: dict[str, Callable[[], Recipe]] = {
    "shapes-tokenizer": _shapes.shapes_tokenizer,
    "infinity-nano": _shapes.infinity_nano,
}


def names() -> list[str]:
    return list(_RECIPES)


def load(name: str) -> Recipe:
    """The recipe of this name. Raises RequestError with the nearest names."""
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"recipes: {', '.join(_RECIPES)}"
        raise RequestError("recipe", name, "a known recipe", hint)
    return _RECIPES[name]()


def override(recipe: Recipe, overrides: Mapping[str, str]) -> Recipe:
    """The recipe with fields set from text, by path or, where only one field has the name, by name alone."""
    for path, text in overrides.items():
        recipe = cast("Recipe", _set(recipe, _full_path(recipe, path), path, text))
    return recipe


def _full_path(recipe: Recipe, path: str) -> list[str]:
    paths = _paths(recipe)
    found = [p for p in paths if ".".join(p) == path] or [p for p in paths if p[-1] == path]
    if len(found) == 1:
        return found[0]
    known = [".".join(p) for p in (found or paths)]
    near = difflib.get_close_matches(path, known, n=3) or known
    raise RequestError("set", path, "one field of the recipe", f"one of: {', '.join(near)}")


def _paths(node: object, prefix: tuple[str, ...] = ()) -> list[list[str]]:
    found: list[list[str]] = []
    if not dataclasses.is_dataclass(node):
        return found
    for field in dataclasses.fields(node):
        value, path = getattr(node, field.name), (*prefix, field.name)
        found += _paths(value, path) if dataclasses.is_dataclass(value) else [list(path)]
    return found


def _set(node: object, path: list[str], name: str, text: str) -> object:
    if not path:
        return text
    old = getattr(node, path[0])
    new = _set(old, path[1:], name, text) if len(path) > 1 else _parsed(name, text, old)
    return dataclasses.replace(node, **{path[0]: new})  # type: ignore[type-var]


def _parsed(name: str, text: str, old: object) -> object:
    """A value from text, of the old value's kind."""
    if isinstance(old, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    if old is not None and type(value) is not type(old):
        raise RequestError(name, text, f"of the kind of {old!r}")
    return value
