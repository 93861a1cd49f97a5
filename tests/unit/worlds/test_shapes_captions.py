"""Captions are true, grammatical and made of the vocabulary. They are read back by a parser that knows no templates."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.worlds.shapes import (
    COLOURS,
    SHAPES,
    VOCABULARY,
    Claim,
    Scene,
    caption,
    prompts,
    scene,
    stated,
    training_scene,
    words,
)
from gesso.worlds.shapes.captions import NUMBER_WORDS, SIZE_WORDS, plural
from gesso.worlds.shapes.scenes import RELATIONS

SEEDS = st.integers(0, 2**63 - 1)
NAMES = {shape: shape for shape in SHAPES} | {plural(shape): shape for shape in SHAPES}
NUMBERS = {word: number for number, names in NUMBER_WORDS.items() for word in names} | {"pair": 2}
SIZES = {word: size for size, names in SIZE_WORDS.items() for word in names}
SIDES = {
    "left": "left", "right": "right", "above": "above", "over": "above", "top": "above",
    "below": "below", "under": "below", "beneath": "below", "bottom": "below",
}  # fmt: skip


def parse(text: str) -> Claim:
    """Read a caption back by its words: colours stand before their shape or after "that is"."""
    said = words(text)
    background = None
    if "background" in said:
        place = said.index("background")
        background = said[place - 1]
        del said[place - 1 : place + 1]
    elif said[-1] in COLOURS and said[-2] == "on":
        background = said[-1]
        del said[-2:]
    places = [place for place, word in enumerate(said) if word in NAMES]
    looks = []
    for place in places:
        colour = said[place - 1] if place and said[place - 1] in COLOURS else None
        if said[place + 1 : place + 2] == ["that"]:
            assert colour is None
            colour = said[place + 3]
        looks.append((NAMES[said[place]], colour))
    used = {colour for _, colour in looks} | {background}
    assert all(word in used for word in said if word in COLOURS)
    relation = None
    if len(places) == 2:
        relation = next((SIDES[word] for word in said[places[0] : places[1]] if word in SIDES), None)
    numbers = [NUMBERS[word] for word in said if word in NUMBERS]
    sizes = [SIZES[word] for word in said if word in SIZES]
    assert len(numbers) <= 1
    assert len(sizes) <= 1
    number = numbers[0] if numbers else 1
    plurals = [said[place] != NAMES[said[place]] for place in places]
    assert plurals == [number > 1] * len(places)
    return Claim(tuple(looks), number, sizes[0] if sizes else None, relation, background)


def is_true(claim: Claim, drawn: Scene) -> bool:
    """Say whether a claim holds of a scene."""
    things = list(drawn.objects)
    relation = drawn.relation
    if drawn.kind == "pair" and claim.looks[0][0] != things[0].shape:
        things.reverse()
        relation = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation or ""]
    count = len(claim.looks) if len(claim.looks) > 1 else claim.number
    return (
        count == len(things)
        and all(
            shape == thing.shape and colour in (None, thing.colour)
            for (shape, colour), thing in zip(claim.looks, things, strict=False)
        )
        and claim.size in (None, drawn.size)
        and claim.relation in (None, relation)
        and claim.background in (None, drawn.background)
    )


@given(SEEDS, SEEDS)
def test_captions_are_true(scene_seed: int, caption_seed: int) -> None:
    drawn = scene(scene_seed)
    text = caption(drawn, caption_seed)
    assert text == caption(drawn, caption_seed)
    assert is_true(parse(text), drawn), text


def test_many_captions_are_true_varied_and_in_the_vocabulary() -> None:
    known, texts, claims = set(VOCABULARY), [], []
    for seed in range(4_000):
        drawn = training_scene(seed)
        text = caption(drawn, seed)
        claim = parse(text)
        assert is_true(claim, drawn), text
        assert known.issuperset(words(text)), text
        assert text == text.lower().strip()
        texts.append(text)
        claims.append(claim)
    full = sum(claim.background is not None and claim.looks[0][1] is not None for claim in claims)
    assert 0.5 < full / len(claims) < 0.7  # two of six questions say no colour
    assert sum(claim.background is not None for claim in claims) / len(claims) < 0.95
    assert len(set(texts)) > 3_500
    assert max(len(words(text)) for text in texts) <= 32
    heads = Counter(" ".join(words(text)[:2]) for text in texts)
    assert len(heads) > 100


def test_what_is_above_is_said_and_what_is_left_is_said_or_named_first() -> None:
    said: Counter[str] = Counter()
    for seed in range(3_000):
        drawn = scene(seed)
        if drawn.kind != "pair":
            continue
        claim, text = stated(drawn, seed)
        read = parse(text)
        assert claim.relation == drawn.relation
        assert claim.by_order == (read.relation is None)
        if claim.by_order:
            assert is_true(replace(read, relation="left"), drawn), text
        said["order" if claim.by_order else drawn.relation or ""] += 1
    assert 0.3 < said["order"] / said.total() < 0.4
    assert min(said[relation] for relation in RELATIONS) > 50


def test_every_word_is_used() -> None:
    used = {word for seed in range(20_000) for word in words(caption(scene(seed), seed))}
    assert used == set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY)) < 160


@given(SEEDS, SEEDS)
def test_articles_fit_the_word_after_them(scene_seed: int, caption_seed: int) -> None:
    said = words(caption(scene(scene_seed), caption_seed))
    for article, word in pairwise(said):
        if article in ("a", "an"):
            assert article == ("an" if word[0] in "aeiou" else "a")


def test_questions_state_what_they_claim() -> None:
    known = set(VOCABULARY)
    for question in prompts(300, seed=3):
        said, claim = parse(question.prompt), question.claim
        if said.looks[0][0] != claim.looks[0][0]:
            relation = {"left": "right", "right": "left", "above": "below", "below": "above", "": None}
            said = Claim(said.looks[::-1], said.number, said.size, relation[said.relation or ""], said.background)
        assert said == claim
        assert known.issuperset(words(question.prompt))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A large RED circle, on white!", ["a", "large", "red", "circle", "on", "white"]),
        ("2 blue-green zebras", ["2", "blue", "green", "zebras"]),
        ("¿Ein Kreis? – schön…", ["ein", "kreis", "schön"]),
        ("snake_case", ["snake", "case"]),
        (" \t\n", []),
        ("", []),
    ],
)
def test_words_are_split(text: str, expected: list[str]) -> None:
    assert words(text) == expected
