"""InfiniteYou goldens of other sizes than the recorded ones, made by the product: what the runner must cope with.

They say nothing of the product's correctness: they show that layers, guidance, optional tensors and cases are taken
from the side-car.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from gesso.identity.key_points import draw_key_points
from gesso.models import infusenet
from gesso.models.diffusers_parts import flux_transformer
from gesso.models.resampler import Resampler, ResamplerConfig
from tests.golden.infinite_you_network import ExactTimes
from tests.golden.runner import Row, run
from tests.golden.z_image_network import build_autoencoder, by_recipe

WIDTHS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 3, "axes_dims_rope": [2, 2, 4]}
FLUX = WIDTHS | {"in_channels": 8, "num_layers": 3, "num_single_layers": 1, "joint_attention_dim": 12}
FLUX |= {"pooled_projection_dim": 6, "guidance_embeds": False}
SIDE = FLUX | {"num_layers": 2, "num_single_layers": 0}
VAE = {"block_out_channels": [4, 4, 4, 4], "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 2}
VAE |= {"scaling_factor": 0.5, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _write(folder: Path, name: str, side_car: Mapping[str, object], tensors: dict[str, Tensor] | None = None) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"family": "infiniteyou", **side_car}), "utf-8")
    if tensors is not None:
        contiguous = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
        save_file(contiguous, folder / f"{name}.safetensors")


def _networks(folder: Path) -> tuple[Any, Any]:
    """FLUX and InfuseNet by the recipe, their side-cars written, of which one stores no weights."""
    made = []
    kinds: list[tuple[str, Any, dict[str, Any]]] = [("flux", flux_transformer(), FLUX), ("side", None, SIDE)]
    for name, kind, config in kinds:
        network: Any = infusenet.build(config) if kind is None else kind(**config)
        state = by_recipe(network, 5)
        network.load_state_dict(state)
        network.time_text_embed.time_proj = ExactTimes()
        side_car = {"kind": "tiny_flux_weights", "class_": type(network).__name__, "config": config, "seed": 5}
        stored = state if kind is None else {"proj_out.bias": state["proj_out.bias"]}
        _write(folder, name, side_car | ({} if kind is None else {"weights_not_stored": True}), stored)
        made.append(network.eval())
    return made[0], made[1]


def _rows(folder: Path) -> dict[str, Row]:
    rows = {row.file: row for row in run(folder)}
    assert {name: row.note for name, row in rows.items() if row.outcome != "yes"} == {}
    return rows


def test_injection_with_no_single_residuals_and_no_guidance(tmp_path: Path) -> None:
    flux, side = _networks(tmp_path)
    tensors = {
        "hidden_states": _drawn(1, 1, 6, 8),
        "controlnet_cond": _drawn(2, 1, 6, 8),
        "id_tokens": _drawn(3, 1, 5, 12),
        "text_tokens": _drawn(4, 1, 3, 12),
        "pooled": _drawn(5, 1, 6),
        "timestep": torch.tensor([0.4]),
        "img_ids": torch.zeros(6, 3),
    }
    given = {"hidden_states": "hidden_states", "timestep": "timestep", "pooled_projections": "pooled"}
    common: dict[str, Any] = {name: tensors[key] for name, key in given.items()} | {"img_ids": tensors["img_ids"]}
    with torch.inference_mode():
        identity = {"encoder_hidden_states": tensors["id_tokens"], "txt_ids": torch.zeros(5, 3)}
        added = side(**common, **identity, controlnet_cond=tensors["controlnet_cond"], return_dict=False)[0]
        text = {"encoder_hidden_states": tensors["text_tokens"], "txt_ids": torch.zeros(3, 3), "return_dict": False}
        tensors["flux_plain"] = flux(**common, **text)[0]
        half = [0.5 * residual for residual in added]
        tensors["flux_injected_scale0.5"] = flux(**common, **text, controlnet_block_samples=half)[0]
    tensors |= {f"double_residual{index}": residual for index, residual in enumerate(added)}
    tables = {"residual_index_per_double_block": [0, 0, 1]}
    weights = {"weights": {"flux": "flux", "infusenet": "side"}}
    _write(tmp_path, "made", {"kind": "injection", "tolerance": {"atol": 1e-5}, **weights, **tables}, tensors)
    _rows(tmp_path)
    wrong = {"residual_index_per_double_block": [0, 1, 1]}
    _write(tmp_path, "made", {"kind": "injection", "tolerance": {"atol": 1e-5}, **weights, **wrong}, tensors)
    notes = {row.file: row.note for row in run(tmp_path)}
    assert "double places: [0, 0, 1], not [0, 1, 1]" in notes["made"]


def test_loops_with_hardly_anything_recorded(tmp_path: Path) -> None:
    """No guidance embedder, a landscape, a static schedule, one picture; a wrong result is found out."""
    _networks(tmp_path)
    vae = by_recipe(build_autoencoder(VAE), 6)
    _write(tmp_path, "vae", {"kind": "tiny_vae_weights", "config": VAE, "seed": 6}, vae)
    loop = {"name": "x", "steps": 2, "width": 48, "height": 32, "seed": 1, "guidance_start": 0.4}
    loop |= {"conditioning_scale_per_step": [0.0, 1.0], "flux_calls": 2}
    side_car = {"kind": "loops", "weights": {"flux": "flux", "infusenet": "side", "vae": "vae"}, "loops": [loop]}
    side_car |= {"scheduler": {"shift": 2.0, "use_dynamic_shifting": False}}
    tensors = {"text_tokens": _drawn(1, 1, 3, 12), "pooled": _drawn(2, 1, 6), "id_tokens": _drawn(3, 1, 4, 12)}
    _write(tmp_path, "made", side_car, tensors | {"x.final": torch.zeros(1, 6, 8)})
    (row,) = (row for row in run(tmp_path) if row.file == "made")
    assert row.outcome == "no" and row.note.startswith("x.final: ") and ";" not in row.note
    assert row.error is not None and 0.1 < row.error < 100


def test_other_resamplers_names_and_key_points(tmp_path: Path) -> None:
    config = {"dim": 12, "depth": 3, "dim_head": 4, "heads": 2, "num_queries": 5, "embedding_dim": 7, "output_dim": 9}
    network = Resampler(ResamplerConfig(**config, ff_mult=2))
    state = by_recipe(network, 7)
    network.load_state_dict(state)
    given = _drawn(1, 3, 2, 7)
    side_car = {"kind": "resampler", "config": config | {"ff_mult": 2}, "seed": 7}
    _write(tmp_path, "resampled", side_car, {"in_x": given, "out_x": network(given)})
    points = [[1.5, 2.5], [20.0, 3.0], [10.0, 9.0], [4.0, 15.0], [17.0, 16.0]]
    cases = {"any name": {"size_w_h": [24, 40], "points_le_re_nose_lm_rm": points}}
    _write(tmp_path, "points", {"kind": "keypoints", "cases": cases})
    draw_key_points((24, 40), points).save(tmp_path / "points_any name.png")
    with torch.device("meta"):
        listed = {name: list(value.shape) for name, value in infusenet.build(SIDE).state_dict().items()}
    (tmp_path / "names.json").write_text(json.dumps({"class_": "FluxControlNetModel", "tensors": listed}))
    assert set(_rows(tmp_path)) == {"resampled", "points", "names"}
    Image.fromarray(np.zeros((40, 24, 3), np.uint8)).save(tmp_path / "points_any name.png")
    assert {row.outcome for row in run(tmp_path) if row.file == "points"} == {"no"}
