"""FLUX's text: shapes, what is cut off, and that a prompt means something. diffusers' equality is in the pipeline's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gesso.errors import MissingError
from gesso.models.flux_text import FluxText
from gesso.models.transformers_parts import read_tokenizer
from gesso.pipelines.flux_state import TwoTextEncoders
from tests.tiny_flux import POOLED_WIDTH, TEXT_WIDTH, tiny_text


@pytest.fixture(scope="module")
def text() -> FluxText:
    return tiny_text(length=8)


def test_features_have_one_length(text: FluxText) -> None:
    features_BTE, pooled_BP = text.encode(["a red star", "", "two blue rings " * 40])
    assert features_BTE.shape == (3, 8, TEXT_WIDTH)
    assert pooled_BP.shape == (3, POOLED_WIDTH)
    assert text.widths == (TEXT_WIDTH, POOLED_WIDTH)
    assert not torch.equal(features_BTE[0], features_BTE[1])
    assert not torch.equal(pooled_BP[0], pooled_BP[1])


def test_counting_goes_on_past_the_cut(text: FluxText) -> None:
    assert (text.count("a red star"), text.max_tokens, text.pooled_tokens) == (4, 8, 77)
    assert text.count("a red star " * 50) == 151
    assert isinstance(text, TwoTextEncoders)


def test_clip_reads_no_more_than_it_has_places_for() -> None:
    text = tiny_text()
    text._clip_tokenizer.model_max_length = 10**30
    assert text.pooled_tokens == 77
    text._clip_tokenizer.model_max_length = 20
    assert text.pooled_tokens == 20


def test_what_is_cut_is_the_tail(text: FluxText) -> None:
    assert text.cut("a red star a red star two") == ""
    assert text.cut("a red star a red star two blue rings") == "blue rings"
    long = " ".join(["star"] * 75)
    assert text.cut_from_pooled(long) == ""
    assert text.cut_from_pooled(f"{long} two rings") == "two rings"


def test_what_is_cut_changes_nothing(text: FluxText) -> None:
    one, _ = text.encode(["a red star a red star two blue"])
    other, _ = text.encode(["a red star a red star two"])
    assert torch.equal(one, other)
    words = " ".join(["star"] * 75)
    assert torch.equal(text.encode([words])[1], text.encode([f"{words} ring"])[1])


def test_any_word_is_known(text: FluxText) -> None:
    assert text.unknown("a zyzzyva") == []


class WithoutItsLibrary:
    """Reads as transformers does where the library that a tokenizer wants is not installed."""

    @staticmethod
    def from_pretrained(*_: object, **__: object) -> None:
        raise ImportError("T5Converter requires the SentencePiece library", name="sentencepiece")


def test_a_tokenizer_whose_library_is_absent(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MissingError, match=r"^sentencepiece, which .* is read with, is missing; get it with: pip"):
        read_tokenizer(WithoutItsLibrary, tmp_path, ("tokenizer.json",))
