"""Z-Image goldens as other sets may have them: loops of other names, no pictures, autoencoders without a shift."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from gesso.pipelines.z_image import to_uint8
from tests.golden.runner import Row, run
from tests.golden.side_car import read_golden
from tests.golden.z_image_network import autoencoder_of

DATA = Path(__file__).parents[2] / "golden/data/z-image"

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def _put(folder: Path, name: str, change: Change) -> None:
    """A golden of the data, changed."""
    tensors, side_car = load_file(DATA / f"{name}.safetensors"), json.loads((DATA / f"{name}.json").read_text("utf-8"))
    change(tensors, side_car)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(side_car), "utf-8")


def _loops(folder: Path, names: dict[str, str], change: Change) -> Row:
    """Some of the recorded loops under other names, with the network they need and no autoencoder."""

    def renamed(tensors: dict[str, Tensor], side_car: dict[str, Any]) -> None:
        side_car["loops"] = [
            loop | {"name": names[loop["name"]]} for loop in side_car["loops"] if loop["name"] in names
        ]
        for key in [key for key in tensors if not key.startswith("feat.")]:
            loop, _, rest = key.partition(".")
            value = tensors.pop(key)
            if loop in names:
                tensors[f"{names[loop]}.{rest}"] = value
        change(tensors, side_car)

    _put(folder, "loops", renamed)
    for ending in ("json", "safetensors"):
        shutil.copyfile(DATA / f"tiny_transformer_weights.{ending}", folder / f"tiny_transformer_weights.{ending}")
    return next(row for row in run(folder) if row.file == "loops")


def _without_autoencoder(tensors: dict[str, Tensor], side_car: dict[str, Any]) -> None:
    tensors.pop("dynamo4.image_uint8_nhwc", None)
    del side_car["weights"]["vae"]


def test_the_shift_is_that_of_the_recorded_times_whatever_the_name(tmp_path: Path) -> None:
    row = _loops(tmp_path, {"dyn9": "plain", "turbo4": "dynamo4"}, _without_autoencoder)
    assert row.outcome == "yes", row.note


def test_a_shift_that_is_stated_holds(tmp_path: Path) -> None:
    def stated(tensors: dict[str, Tensor], side_car: dict[str, Any]) -> None:
        _without_autoencoder(tensors, side_car)
        side_car["loops"][0]["use_dynamic_shifting"] = True

    row = _loops(tmp_path, {"turbo4": "dynamo4"}, stated)
    assert row.outcome == "no"


def test_a_picture_needs_its_autoencoder(tmp_path: Path) -> None:
    def gone(_tensors: dict[str, Tensor], side_car: dict[str, Any]) -> None:
        del side_car["weights"]["vae"]

    assert _loops(tmp_path, {"turbo4": "dynamo4"}, gone).outcome == "no"


@pytest.mark.parametrize("absent", [False, True])
def test_an_autoencoder_without_a_shift(tmp_path: Path, absent: bool) -> None:
    def unshifted(_tensors: dict[str, Tensor], side_car: dict[str, Any]) -> None:
        side_car["config"] |= {"shift_factor": None}
        if absent:
            del side_car["config"]["shift_factor"]

    _put(tmp_path, "tiny_vae_weights", unshifted)
    golden = read_golden(tmp_path / "tiny_vae_weights.json")
    assert golden is not None
    autoencoder: Any = autoencoder_of(golden)

    def decoded(tensors: dict[str, Tensor], _side_car: dict[str, Any]) -> None:
        unscaled = tensors["post.latents"] / autoencoder.config["scaling_factor"]
        pictures = autoencoder.decode(unscaled, return_dict=False)[0]
        tensors |= {"post.decoded": pictures, "post.uint8_nhwc": to_uint8(pictures)}

    _put(tmp_path, "tiny_vae_io", decoded)
    rows = {row.file: row for row in run(tmp_path)}
    assert rows["tiny_vae_io"].outcome == "yes", rows["tiny_vae_io"].note
