"""People, portraits and captions of the faces world: by seed, held out by their looks, never named."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import numpy as np

from gesso.worlds import faces
from gesso.worlds.faces.identities import looks_key

SEEDS = range(3000)


def test_people_and_portraits_never_change() -> None:
    text = repr([(faces.portrait(seed), faces.caption(faces.portrait(seed), seed)) for seed in range(200)])
    assert sha256(text.encode()).hexdigest() == "fcb3915c426d685ef18dad74d7586c0053920f252225b1253ddcb6d30137c7d4"


def test_one_in_twelve_is_held_out_by_looks() -> None:
    people = [faces.identity(seed) for seed in SEEDS]
    share = sum(map(faces.is_held_out, people)) / len(people)
    assert 0.06 < share < 0.11
    for seed in range(50):
        held_out, trained = faces.held_out_identity(seed), faces.training_identity(seed)
        assert faces.is_held_out(held_out) and not faces.is_held_out(trained)
        assert faces.held_out_portrait(seed).person == held_out
        assert faces.training_portrait(seed).person == trained
        # The rest of a face does not decide.
        assert faces.is_held_out(replace(held_out, jaw=0.5, eyes="grey", freckled=not held_out.freckled))
    trained_looks = {looks_key(faces.training_identity(seed)) for seed in SEEDS}
    assert not trained_looks & {looks_key(faces.held_out_identity(seed)) for seed in range(300)}


def test_people_are_unlike_each_other() -> None:
    people = [faces.held_out_identity(seed) for seed in range(120)]
    fewest = min(faces.differences(one, other) for i, one in enumerate(people) for other in people[:i])
    assert fewest >= 3
    assert faces.differences(people[0], people[0]) == 0


def test_one_person_comes_in_many_pictures() -> None:
    person = faces.identity(7)
    drawn = [faces.portrait_of(person, seed) for seed in range(300)]
    assert all(portrait.person == person for portrait in drawn)
    assert {portrait.expression for portrait in drawn} == set(faces.EXPRESSIONS)
    assert {portrait.background for portrait in drawn} == set(faces.BACKGROUNDS)
    assert {portrait.facing for portrait in drawn} == set(faces.FACINGS)
    assert {portrait.shirt for portrait in drawn} == set(faces.SHIRTS)
    assert len({(p.x, p.y, p.size, p.tilt) for p in drawn}) > 50


def test_captions_are_true_and_name_nobody() -> None:
    for seed in range(400):
        drawn = faces.portrait(seed)
        text = faces.caption(drawn, seed)
        assert set(text.replace(",", "").split()) <= set(faces.VOCABULARY)
        # Another person, in the same pose, has the same words.
        assert faces.caption(replace(drawn, person=faces.identity(seed + 1)), seed) == text
        if "background" in text:
            assert text.split(" background")[0].endswith(drawn.background)
        if "shirt" in text:
            assert text.split(" shirt")[0].endswith(drawn.shirt)
        for word in ("left", "right"):
            if word in text:
                assert drawn.facing == word
        for mood in set(faces.EXPRESSIONS) - {drawn.expression}:
            assert mood not in text
    wholly = faces.full_caption(replace(faces.portrait(0), expression="angry", facing="left", shirt="red"))
    assert wholly.startswith("a person with an angry face in a red shirt on ") and wholly.endswith(", facing left")


def test_a_batch_is_pictures_captions_and_portraits_of_its_seeds() -> None:
    pictures, captions, portraits = faces.batch(100, 4, 32)
    assert pictures.shape == (4, 32, 32, 3)
    assert portraits == [faces.training_portrait(seed) for seed in range(100, 104)]
    tail_pictures, tail_captions, _ = faces.batch(102, 2, 32)
    assert np.array_equal(tail_pictures, pictures[2:]) and tail_captions == captions[2:]
    assert faces.batch(0, 4, 32, training=False)[2] == [faces.portrait(seed) for seed in range(4)]
