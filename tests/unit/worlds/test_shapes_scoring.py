"""Questions are held out, the judge accepts what was asked and nothing else, and the arithmetic is right."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import hypot

import pytest

from gesso.worlds.shapes import (
    CATEGORIES,
    COLOURS,
    SHAPES,
    Claim,
    Detection,
    Dice,
    Question,
    Scene,
    Thing,
    Verdict,
    combinations,
    draw,
    held_out_scene,
    is_held_out,
    judge,
    prompts,
    scene,
    score,
)
from gesso.worlds.shapes.scenes import GROUP_RADIUS, RADII, is_held_out_key


def asked(drawn: Scene) -> Question:
    """Return a question that states everything about a scene."""
    things = drawn.objects if drawn.kind == "pair" else drawn.objects[:1]
    looks = tuple((thing.shape, thing.colour) for thing in things)
    number = len(drawn.objects) if drawn.kind == "count" else 1
    return Question("colours", "", Claim(looks, number, drawn.size, drawn.relation, drawn.background), "")


def is_right(question: Question, drawn: Scene) -> bool:
    return judge(question, draw([drawn])[0]).right


def answer(question: Question) -> Scene:
    """Return a scene that a question asks for."""
    claim = question.claim
    dice = Dice(len(question.prompt))
    background = claim.background or "white"
    looks = claim.looks * claim.number
    places = {1: ((0.5, 0.5),), 2: ((0.25, 0.5), (0.75, 0.5)), 3: ((0.5, 0.25), (0.25, 0.75), (0.75, 0.75))}
    places[4] = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
    spots = list(places[len(looks)])
    if claim.relation in ("above", "below"):
        spots = [(y, x) for x, y in spots]
    if claim.relation in ("right", "below"):
        spots.reverse()
    radius = RADII[claim.size] if claim.size else GROUP_RADIUS
    things = tuple(
        Thing(shape, colour or dice.other(COLOURS, background), radius, x, y)
        for (shape, colour), (x, y) in zip(looks, spots, strict=True)
    )
    kind = "pair" if len(claim.looks) == 2 else "count" if claim.number > 1 else "single"
    return Scene(kind, background, things, claim.relation or ("left" if kind == "pair" else None), claim.size)


def mutations(drawn: Scene) -> dict[str, Scene]:
    """Return scenes that differ from a scene in one thing that a full statement names."""
    first, *rest = drawn.objects
    dice = Dice(len(repr(drawn)))
    used = [thing.colour for thing in drawn.objects] + [drawn.background]
    colour = dice.pick([colour for colour in COLOURS if colour not in used])
    shape = dice.pick([shape for shape in SHAPES if shape not in [thing.shape for thing in drawn.objects]])
    changed = {
        "shape": replace(drawn, objects=(replace(first, shape=shape), *rest)),
        "colour": replace(drawn, objects=(replace(first, colour=colour), *rest)),
        "background": replace(drawn, background=colour),
        "missing": replace(drawn, objects=tuple(rest)),
    }
    spots = [(0.08, 0.08), (0.92, 0.08), (0.08, 0.92), (0.92, 0.92), (0.5, 0.5)]
    x, y = max(spots, key=lambda spot: min(hypot(spot[0] - one.x, spot[1] - one.y) for one in drawn.objects))
    changed["extra"] = replace(drawn, objects=(*drawn.objects, Thing(shape, colour, 0.06, x, y)))
    changed["spot"] = replace(drawn, objects=(*drawn.objects, Thing("circle", colour, 0.07, first.x, first.y)))
    if first.shape != "ring":
        pierced = Thing("circle", drawn.background, 0.06, first.x, first.y)
        changed["hole"] = replace(drawn, objects=(*drawn.objects, pierced))
    if drawn.kind == "single":
        radius = RADII["small"] if drawn.size != "small" else RADII["large"]
        changed["size"] = replace(drawn, objects=(replace(first, radius=radius, x=0.5, y=0.5),))
    if drawn.kind == "pair":
        (second,) = rest
        swapped = (replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))
        changed["place"] = replace(drawn, objects=swapped)
        turned = tuple(replace(thing, x=thing.y, y=thing.x) for thing in drawn.objects)
        changed["axis"] = replace(drawn, objects=turned)
        if first.colour != second.colour:
            crossed = (replace(first, colour=second.colour), replace(second, colour=first.colour))
            changed["binding"] = replace(drawn, objects=crossed)
    return changed


def test_full_statements_are_accepted_and_every_mutation_refused() -> None:
    seen: Counter[str] = Counter()
    for seed in range(160):
        drawn = scene(seed)
        question = asked(drawn)
        assert is_right(question, drawn)
        for name, mutant in mutations(drawn).items():
            verdict = judge(question, draw([mutant])[0])
            assert not verdict.right, (name, drawn, verdict)
            assert verdict.reasons
            seen[name] += 1
    assert min(seen.values()) > 30
    assert len(seen) == 11


def test_questions_are_held_out_even_and_different() -> None:
    questions = prompts(600, seed=0)
    assert Counter(question.category for question in questions) == dict.fromkeys(CATEGORIES, 100)
    assert len({question.prompt for question in questions}) == 600
    for question in questions:
        assert is_held_out_key(question.key)
        assert question.key.startswith(question.category + ":")
    for category in CATEGORIES:
        shapes = {shape for one in questions if one.category == category for shape, _ in one.claim.looks}
        assert shapes == set(SHAPES)


def test_scenes_that_answer_are_held_out_and_right() -> None:
    for question in prompts(240, seed=1):
        drawn = answer(question)
        assert question.key in combinations(drawn)
        assert is_held_out(drawn)
        verdict = judge(question, draw([drawn])[0])
        assert verdict.right, (question, verdict)


def test_questions_state_what_their_category_needs() -> None:
    for question in prompts(120, seed=2):
        claim, category = question.claim, question.category
        colours = [colour for _, colour in claim.looks]
        assert claim.background is not None
        assert (claim.size is not None) == (category == "one object")
        assert (claim.relation is not None) == (category == "position")
        assert (claim.number > 1) == (category == "counting")
        assert (None in colours) == (category in ("one object", "two objects"))
        assert len(claim.looks) == (2 if category in ("two objects", "position", "colour binding") else 1)
        if category == "colour binding":
            assert len({*colours, claim.background}) == 3


def test_questions_follow_their_seed() -> None:
    assert prompts(60, seed=5) == prompts(90, seed=5)[:60]
    assert prompts(60, seed=5) != prompts(60, seed=6)
    assert prompts(0) == []
    with pytest.raises(ValueError, match="count is -1"):
        prompts(-1)


def test_unstated_things_may_be_anything_but_not_unclear() -> None:
    drawn = next(one for one in map(held_out_scene, range(50)) if one.kind == "pair")
    looks = tuple((thing.shape, None) for thing in drawn.objects)
    question = Question("two objects", "", Claim(looks), "")
    assert is_right(question, drawn)
    assert is_right(question, replace(drawn, objects=drawn.objects[::-1]))
    picture = draw([drawn])[0]
    picture[:, :2] = picture[:, -2:] = 128
    assert judge(question, picture).reasons[0].startswith("background")


@pytest.mark.parametrize(("radius", "size", "right"), [
    (0.17, "small", True), (0.13, "small", True), (0.10, "small", False), (0.22, "small", False),
    (0.22, "medium", True), (0.34, "medium", False), (0.30, "large", True), (0.25, "large", False),
])  # fmt: skip
def test_sizes_are_the_nearest_word(radius: float, size: str, right: bool) -> None:
    question = Question("one object", "", Claim((("circle", None),), size=size, background="white"), "")
    assert is_right(question, Scene("single", "white", (Thing("circle", "red", radius, 0.5, 0.5),))) is right


@pytest.mark.parametrize(("offset", "right"), [
    ((0.4, 0.0), True), ((0.4, 0.3), True), ((0.4, 0.45), False), ((-0.4, 0.0), False), ((0.0, 0.45), False),
])  # fmt: skip
def test_relations_need_the_main_axis(offset: tuple[float, float], right: bool) -> None:
    things = (
        Thing("circle", "red", 0.12, 0.5 - offset[0] / 2, 0.5 - offset[1] / 2),
        Thing("star", "red", 0.12, 0.5 + offset[0] / 2, 0.5 + offset[1] / 2),
    )
    claim = Claim((("circle", "red"), ("star", "red")), relation="left", background="white")
    assert is_right(Question("position", "", claim, ""), Scene("pair", "white", things)) is right


def test_stray_marks_spoil_a_picture() -> None:
    question = Question("colours", "", Claim((("circle", "red"),), background="white"), "")
    picture = draw([Scene("single", "white", (Thing("circle", "red", 0.2, 0.5, 0.5),))])[0]
    assert judge(question, picture).right
    for corner in (3, 9, 52, 58):
        picture[3:6, corner : corner + 4] = 0
    assert "stray" in judge(question, picture).reasons[0]


def test_the_score_is_the_mean_of_categories() -> None:
    nothing = Detection("white", (), 0.0)
    outcomes = [("one object", True)] * 3 + [("one object", False)] + [("counting", False)] * 2
    result = score(Verdict(category, right, (), nothing) for category, right in outcomes)
    assert result == {"one object": 0.75, "counting": 0.0, "overall": 0.375, "plain": 0.5}
    with pytest.raises(ValueError, match="no verdicts"):
        score([])
