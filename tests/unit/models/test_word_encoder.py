"""The word encoder of nano models: words to ids, ids to features, and padding that means nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gesso.models.word_encoder import END, PAD, UNKNOWN, WordEncoder, split_words
from tests.tiny_infinity import TEXT, WORDS, tiny_word_encoder


@pytest.fixture(scope="module")
def encoder() -> WordEncoder:
    return tiny_word_encoder()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red Star, on WHITE.", ["a", "red", "star", "on", "white"]),
        ("red-blue/ring  3\n4", ["red", "blue", "ring", "3", "4"]),
        ("snow_white", ["snow", "white"]),
        ("¡étoile!", ["étoile"]),
        ("?!", []),
        ("", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_ids_end_with_the_mark_and_are_padded(encoder: WordEncoder) -> None:
    star, red = encoder.ids["star"], encoder.ids["red"]
    assert encoder.token_ids(["star", "red dragon star", ""]).tolist() == [
        [star, END, PAD, PAD],
        [red, UNKNOWN, star, END],
        [END, PAD, PAD, PAD],
    ]
    assert encoder.token_ids(["star"], 5).tolist() == [[star, END, PAD, PAD, PAD]]
    assert sorted(encoder.ids.values()) == list(range(3, 3 + len(WORDS)))


@given(st.text(max_size=60))
def test_every_text_is_counted_as_it_is_read(text: str) -> None:
    encoder = ENCODER
    ids = encoder.token_ids([text])[0].tolist()
    assert len(ids) == min(encoder.count(text), encoder.max_tokens)
    assert ids[-1] == END
    assert PAD not in ids


ENCODER = tiny_word_encoder()


def test_long_texts_are_cut_before_the_mark(encoder: WordEncoder) -> None:
    text = " ".join(["red"] * 50)
    assert encoder.count(text) == 51
    assert encoder.token_ids([text]).tolist() == [[encoder.ids["red"]] * (TEXT.length - 1) + [END]]


def test_features_do_not_depend_on_company(encoder: WordEncoder) -> None:
    prompts = ["a red star", "two blue rings on a white background", ""]
    together = encoder.features(prompts)
    assert [tuple(features.shape) for features in together] == [(4, 16), (8, 16), (1, 16)]
    for prompt, features in zip(prompts, together, strict=True):
        torch.testing.assert_close(features, encoder.features([prompt])[0], atol=1e-5, rtol=0)
        assert not features.requires_grad


def test_words_and_their_order_matter(encoder: WordEncoder) -> None:
    one, other, another = (encoder.features([text])[0] for text in ("a red star", "a blue star", "red a star"))
    assert (one - other).abs().max() > 1e-3
    assert (one - another).abs().max() > 1e-3
