"""What planning is in every family: blanks filled, sizes and lists checked, and the warnings that all of them give.

A family's `plan` says which of these it needs. Not here: anything that only one family knows.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from torch import nn

from gesso.errors import FileError, RequestError
from gesso.pictures import read_pixels
from gesso.request import GenerationRequest
from gesso.sampling.flow import EULER, STOCHASTIC

_T = TypeVar("_T")
_State = TypeVar("_State")

_DRAWN_SEEDS = 2**32
_LONGEST_QUOTE = 200  # characters
_DECODED_PIXELS = 1 << 19  # at once


class Vocabulary(Protocol):
    """What planning asks of a text encoder: how much it reads, and which words of a prompt it has never met."""

    @property
    def max_tokens(self) -> int: ...

    def count(self, prompt: str) -> int: ...

    def unknown(self, prompt: str) -> list[str]: ...


class CuttingVocabulary(Vocabulary, Protocol):
    """A text encoder that cuts prompts that are too long, and says what it cuts."""

    def cut(self, prompt: str) -> str: ...


def value_or(value: _T | None, default: _T) -> _T:
    """The value of a field that was given, or what fills the blank."""
    return default if value is None else value


def seed_or_drawn(request: GenerationRequest) -> int:
    """The request's seed, or one that was drawn, below 2^32."""
    return secrets.randbelow(_DRAWN_SEEDS) if request.seed is None else request.seed


def check_edge(field: str, pixels: int, *, multiple: int, largest: int, name: str) -> None:
    """A multiple of the pixels of a token, and not beyond the largest. Raises RequestError, naming the nearest."""
    if pixels > largest:
        raise RequestError(field, pixels, f"at most {largest} for {name}", f"nearest: {largest}")
    if pixels % multiple:
        below = pixels - pixels % multiple
        near = [str(edge) for edge in (below, below + multiple) if 0 < edge <= largest]
        raise RequestError(field, pixels, f"a multiple of {multiple} for {name}", f"nearest: {' or '.join(near)}")


def check_list(request: GenerationRequest, field: str, count: int, unit: str) -> None:
    """Where a field is a list it has one value for each `unit`: step, evaluation or scale. Raises RequestError."""
    value = getattr(request, field)
    if isinstance(value, tuple) and len(value) != count:
        hint = f"a list needs {count} values here, one for each {unit}"
        raise RequestError(field, value, "one number or a list", hint)


def untrained_size(filled: GenerationRequest, sizes: Sequence[tuple[int, int]], name: str) -> tuple[str, ...]:
    """A warning where a model that was trained at few sizes (width, height) paints another."""
    if not sizes or (filled.width, filled.height) in sizes:
        return ()
    trained = ", ".join(f"{width}x{height}" for width, height in sizes)
    return (f"{name} was trained at {trained}; other sizes come out worse",)


def cut_text(text: CuttingVocabulary, request: GenerationRequest, name: str) -> tuple[str, ...]:
    """Warnings for prompts that are longer than what is read, with what is cut off."""
    texts = {"prompt": request.prompt, "negative": request.negative}
    length = f"the {text.max_tokens} tokens that {name} reads"
    return tuple(
        f"{field} is longer than {length}; cut off: {quoted(tail)}"
        for field, words in texts.items()
        if (tail := text.cut(words))
    )


def unknown_words(text: Vocabulary, request: GenerationRequest, name: str) -> tuple[str, ...]:
    """A warning for words that the model has never met."""
    unknown = dict.fromkeys([*text.unknown(request.prompt), *text.unknown(request.negative)])
    return (f"{name} does not know {', '.join(map(repr, unknown))}",) if unknown else ()


def without_effect(
    request: GenerationRequest, fields: Sequence[str], name: str, *, paints_people: bool = False
) -> tuple[str, ...]:
    """Warnings for those of `fields` that are set although the model of that name has no use for them.

    Raises RequestError for an identity, unless the model keeps one: a picture of somebody else is no use to anybody.
    """
    if request.identity is not None and not paints_people:
        way_out = "leave it out, or take flux-dev or infinite-you-nano"
        raise RequestError("identity", request.identity.image, f"usable with {name}", way_out)
    return tuple(f"{name} has no use for {field}" for field in fields if getattr(request, field) is not None)


def scheduler_of(request: GenerationRequest, default: str) -> str:
    """The scheduler that was asked for, or the model's; beside a step cache Euler's, where that draws fresh noise."""
    own = EULER if request.cache is not None and default == STOCHASTIC else default
    return value_or(request.scheduler, own)


def swapped_scheduler(request: GenerationRequest, filled: GenerationRequest, default: str) -> tuple[str, ...]:
    """A warning where a step cache has another scheduler paint than the model's own: that is another picture."""
    if request.scheduler is not None or filled.scheduler == default:
        return ()
    return (
        f"{filled.scheduler} paints in place of {default}, the model's own, which no cache forecasts: expect another "
        f"picture than without a cache, and perhaps a worse one; scheduler={filled.scheduler} says that it is wanted",
    )


def check_cached(filled: GenerationRequest) -> None:
    """Refuse a step cache where steps draw fresh noise: pictures would be 2 to 17 dB away (RequestError)."""
    if filled.cache is not None and filled.scheduler == STOCHASTIC:
        hint = "each step draws noise that no cache forecasts; take scheduler=euler"
        raise RequestError("cache", filled.cache.policy, f"usable with {STOCHASTIC}", hint)


def picture_size(field: str, path: str) -> tuple[int, int]:
    """Width and height of a picture that a request names, once all of it has been read. Raises FileError."""
    try:
        with read_pixels(Path(path)) as picture:
            return picture.size
    except FileError as error:
        raise FileError(f"{field} {error.path}", error.problem, error.hint) from error


def text_networks(encoder: object) -> list[nn.Module]:
    """The networks that an encoder is, or holds."""
    if isinstance(encoder, nn.Module):
        return [encoder]
    return [part for part in getattr(encoder, "__dict__", {}).values() if isinstance(part, nn.Module)]


def chunks(states: Sequence[_State], pixels_each: int) -> Iterator[Sequence[_State]]:
    """Finished states in runs of about half a megapixel, or one by one where a picture alone has more."""
    at_once = max(1, _DECODED_PIXELS // pixels_each)
    for start in range(0, len(states), at_once):
        yield states[start : start + at_once]


def quoted(text: str) -> str:
    """Text in quotation marks, shortened where it is very long."""
    if len(text) > _LONGEST_QUOTE:
        return f'"{text[:_LONGEST_QUOTE]}…" ({len(text)} characters)'
    return f'"{text}"'
