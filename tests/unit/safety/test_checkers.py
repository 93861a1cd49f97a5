"""Checkers from folders: the rule is diffusers' own, exactly the pictures meant are flagged, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from gesso.errors import FileError, GessoError, RequestError, RunError, WeightsError
from gesso.safety import Decision
from gesso.safety.concepts import ConceptChecker
from gesso.safety.hiding import PATCHES, hidden
from gesso.safety.reading import read_checker
from tests import tiny_safety


def noise(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).resize((4, 4)).resize(size)


def check(folder: Path, *pictures: Image.Image, unsafe: str = "nsfw", threshold: float = 0.5) -> list[Decision]:
    return read_checker(folder, "cpu", unsafe=[unsafe], threshold=threshold).check(pictures)


def test_the_rule_is_diffusers_own(tmp_path: Path) -> None:
    """A threshold at the very cosine of a picture, and just beside it, with and without a concept of special care."""
    tiny_safety.write_checker(tmp_path)
    network = tiny_safety.tiny_checker()
    processed = tiny_safety.pixels(tmp_path, [noise(0)])
    checker = ConceptChecker(network, lambda **_: {"pixel_values": processed}, torch.device("cpu"))
    cosine = tiny_safety.embeddings(network, tmp_path, [noise(0)]) @ normalize(network.concept_embeds[2], dim=0)
    flags: list[bool] = []
    for beside in (-0.0011, -0.0004, 0.0, 0.0006, 0.0094, 0.0105):
        network.concept_embeds_weights.data[2] = float(cosine) + beside
        for care in (tiny_safety.NEVER, -1.0):
            network.special_care_embeds_weights.data[1] = care
            expected = network(clip_input=processed, images=np.zeros((1, 1, 1, 3)))[1]
            assert [decision.flagged for decision in checker.check([noise(0)])] == expected
            flags += expected
    assert set(flags) == {True, False}


@pytest.mark.parametrize("published", [True, False])
def test_exactly_the_pictures_meant_are_flagged(tmp_path: Path, published: bool) -> None:
    """Whether names are those of the published file, or those that the libraries write now."""
    pictures = [noise(seed) for seed in range(5)]
    tiny_safety.write_checker(tmp_path, pictures[1:3], [pictures[0], *pictures[3:]], published=published)
    found = check(tmp_path, *pictures)
    assert [decision.flagged for decision in found] == [False, True, True, False, False]
    assert [decision.reason for decision in found] == ["", "concept 0", "concept 1", "", ""]
    assert all((decision.score > 0) == decision.flagged for decision in found)


def test_a_classifier_by_its_labels(tmp_path: Path) -> None:
    tiny_safety.write_classifier(tmp_path)
    dark, bright = Image.new("RGB", (64, 40), "black"), Image.new("RGB", (40, 64), "white")
    found = check(tmp_path, dark, bright, unsafe="NSFW")
    assert [decision.flagged for decision in found] == [False, True]
    assert found[1].reason == "NSFW" and found[1].score > 0.9
    assert check(tmp_path, dark, threshold=1e-12)[0].flagged
    with pytest.raises(RequestError, match=r'safety_labels "gore" is not a label .* it has: normal, nsfw'):
        check(tmp_path, dark, unsafe="gore")


@pytest.mark.parametrize("size", [(8, 8), (60, 40), (1024, 16), (300, 500)])
def test_nothing_is_left_but_a_few_colours(size: tuple[int, int]) -> None:
    patches = max(1, round(PATCHES * size[0] / max(size))), max(1, round(PATCHES * size[1] / max(size)))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    means = picture.resize(patches, Image.Resampling.BOX)
    assert means.width * means.height <= PATCHES**2
    assert hidden(picture).tobytes() == means.resize(size, Image.Resampling.BICUBIC).tobytes()


def test_pictures_of_the_same_mean_colours_become_the_same() -> None:
    """Each patch of 10 x 10 pixels turned about in itself: another picture, of which the same is left."""
    values = np.random.default_rng(0).integers(0, 256, (4, 10, 6, 10, 3), dtype=np.uint8)
    one, other = (
        Image.fromarray(np.ascontiguousarray(each).reshape(40, 60, 3)) for each in (values, values[:, ::-1, :, ::-1])
    )
    assert one.tobytes() != other.tobytes()
    assert hidden(one).tobytes() == hidden(other).tobytes()


def refused(folder: Path, kind: type[GessoError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        check(folder, noise(0))
    assert "\n" not in str(caught.value)


def test_what_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, FileError, r"holds no safety checker \(no config.json\); .*gesso models pull")
    folder = tiny_safety.write_checker(tmp_path / "checker")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if name != "concept_embeds"}, weights, {"format": "pt"})
    refused(folder, WeightsError, "1 missing .concept_embeds")
    for name in ("visual_projection.weight", "concept_embeds", "concept_embeds_weights"):
        save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, weights, {"format": "pt"})
        refused(folder, RunError, "no number")
    weights.rename(folder / "pytorch_model.bin")
    refused(folder, FileError, "no model.safetensors")
    weights.write_bytes(b"\x80\x02}q\x00.")
    refused(folder, GessoError, "checker")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    refused(folder, FileError, "holds GPT2LMHeadModel, no StableDiffusionSafetyChecker and no classifier")
