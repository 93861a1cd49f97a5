"""What the engine makes of what lies beside an adapter's weights: PEFT's configuration, and trained words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from gesso.adapters.formats.places import shapes_of
from gesso.engine import Engine
from gesso.events import Result
from gesso.request import GenerationRequest
from tests.adapter_server import Page, Site, tar
from tests.tiny_flux import tiny_pipeline

pytestmark = pytest.mark.usefixtures("own_place")
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A LoRA of rank 2 of every layer, in PEFT's names."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, shape in shapes_of(tiny_pipeline().transformer).items():
        for half, sizes in (("A", (2, shape.inputs)), ("B", (shape.outputs, 2))):
            found[f"{name}.lora_{half}.weight"] = torch.randn(sizes, generator=generator) * 0.2
    return found


def ask(engine: Engine, lora: str) -> Result:
    (result,) = engine.run(GenerationRequest.model_validate({"prompt": "a star", "seed": 7, "lora": lora}))
    return result


def pixels(result: Result) -> np.ndarray:
    return np.asarray(result.image, dtype=int)


def test_the_same_weights_with_two_configurations_are_two_adapters(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    paths = [tmp_path / folder / "adapter_model.safetensors" for folder in ("weak", "strong")]
    for path, alpha in zip(paths, (1, 4), strict=True):
        path.parent.mkdir()
        save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, path)
        path.with_name(CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
    save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "plain.safetensors")
    pipeline = tiny_pipeline()
    with Engine(device="cpu", load=lambda name, device, dtype: pipeline) as engine:
        weak, strong = (ask(engine, str(path)) for path in paths)
        half, double = (pixels(ask(engine, f"./plain.safetensors::{scale}")) for scale in (0.5, 2))
        (first,), (second,) = weak.metadata["lora"], strong.metadata["lora"]  # type: ignore[misc]
        assert (first["digest"], first["config"] == second["config"]) == (second["digest"], False)
        assert np.abs(half - double).max() > 2
        assert np.abs(pixels(weak) - half).max() <= 1 and np.abs(pixels(strong) - double).max() <= 1
        assert weak.metadata["warnings"] == []
        paths[0].with_name(CONFIG).write_text(paths[1].with_name(CONFIG).read_text())  # while it is in memory
        assert (pixels(ask(engine, str(paths[0]))) == pixels(strong)).all()
        paths[0].with_name(CONFIG).unlink()
        (warning,) = ask(engine, str(paths[0])).metadata["warnings"]  # type: ignore[misc]
        assert f"no {CONFIG} says its alpha" in warning


def test_trained_words_that_are_left_out_are_told_of_with_the_picture(tensors: dict[str, Tensor], site: Site) -> None:
    weights = save({f"transformer.{name}": tensor for name, tensor in tensors.items()})
    site.pages["/owner/words/_weights"] = Page(tar({"lora.safetensors": weights, "embeddings.pti": b"x" * 99}))
    pipeline = tiny_pipeline()
    with Engine(device="cpu", load=lambda name, device, dtype: pipeline) as engine:
        for _ in range(2):  # fetched, and in memory
            (warning,) = ask(engine, "replicate:owner/words").metadata["warnings"]  # type: ignore[misc]
            assert warning.startswith("replicate:owner/words has trained words (embeddings.pti) that are not read")
