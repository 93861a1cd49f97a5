"""What `docs/add-a-model.md` says beside the family itself: its first picture, its loader, its entries.

The family is put to the contract as one of the `SUBJECTS`.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
import torch

from gesso.engine import Engine, loading
from gesso.errors import WeightsError
from gesso.request import GenerationRequest
from gesso.training.export import save_model
from gesso.weights.catalogue import tables
from tests.contract.worked_example import blocks, module
from tests.oracle import run_plainly


def test_the_first_picture() -> None:
    module("src/gesso/pipelines/ink.py")
    names: dict[str, object] = {}
    exec(blocks()["a first picture"], names)
    assert names["result"].image.size == (32, 32)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_model_of_it_is_painted_with_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ink = module("src/gesso/pipelines/ink.py")
    module("src/gesso/engine/loading/ink.py")
    table = "src/gesso/weights/catalogue/families/ink.toml"
    families = Path(shutil.copytree(tables.FAMILIES, tmp_path / "families"))
    (families / Path(table).name).write_text(blocks()[table], encoding="utf-8")
    loaders = blocks()["src/gesso/engine/loading/__init__.py, in _LOADERS"]
    monkeypatch.setattr(tables, "FAMILIES", families)
    monkeypatch.setattr(loading, "_LOADERS", loading._LOADERS | ast.literal_eval(f"{{{loaders}}}"))

    network = ink.InkNetwork(ink.InkConfig(width=8))
    config = {"family": "ink", "network": {"width": 8, "words": 512}}
    save_model(tmp_path / "mine", {"network": network.state_dict()}, config, {}, torch.float32)
    request = GenerationRequest(prompt="a blue ring", model=str(tmp_path / "mine"), seed=7, deterministic=True)
    with Engine(device="cpu") as engine:
        (result,) = engine.run(request)
    pipeline = ink.InkPipeline(network=network.eval(), name="mine", digest="")
    (expected,) = run_plainly(pipeline, request)
    assert result.image.tobytes() == expected.image.tobytes()
    assert isinstance(result.metadata["model"], dict)
    assert result.metadata["model"]["digest"]

    config["network"] = {"width": 9, "words": 512}
    save_model(tmp_path / "mine", {"network": network.state_dict()}, config, {}, torch.float32)
    with pytest.raises(WeightsError, match=r"words\.weight"):
        loading.load_pipeline(str(tmp_path / "mine"), "cpu")
