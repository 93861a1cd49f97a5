"""Goldens of other sizes and settings than the recorded ones, made by the product itself.

They say nothing of the product's correctness: they show that the runner takes every size, optional part and list from
the side-car. Each is recorded with hardly more than what a side-car must have.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gesso.models.infinity.checkpoint import published_transformer_name
from gesso.models.infinity.initialization import InitialScales, initialize
from gesso.models.infinity.quantizer import codes, enlarge, from_tokens, to_tokens
from gesso.models.infinity.scales import schedule_of_grids
from gesso.models.infinity.transformer import InfinityConfig, InfinityTransformer, text_mask
from gesso.sampling.bits import choose_bits, exponential_noise
from gesso.sampling.guidance import guide
from gesso.training.infinity_loss import bitwise_loss
from tests.golden.infinity_network import unpacked
from tests.golden.runner import Row, run

CONFIG: dict[str, object] = {"depth": 3, "embed_dim": 24, "num_heads": 3, "ffn_hidden": 40, "block_chunks": 3}
CONFIG |= {"text_channels": 20, "text_maxlen": 7, "pool_heads": 2, "d_vae": 10, "head_out": 20, "swiglu": False}
GRIDS = ((1, 1), (2, 1), (3, 2), (5, 3))
LENGTHS = [4, 7, 1]


def _network(chunk: int | None, **switches: object) -> tuple[InfinityTransformer, dict[str, Tensor]]:
    """A network of CONFIG's size, and its state under published names."""
    sizes = {"depth": 3, "width": 24, "heads": 3, "bits": 10, "text_width": 20, "text_length": 7, "pool_heads": 2}
    torch.manual_seed(3)
    network = InfinityTransformer(InfinityConfig(**(sizes | {"feed_forward_width": 40} | switches)))  # type: ignore[arg-type]
    initialize(network, InitialScales(head=1.0, modulation=1.0, gate_noise=1.0, gate=1.0))
    state = {f"state.{published_transformer_name(name, chunk)}": value for name, value in network.state_dict().items()}
    state["state.text_proj_for_sos.ca.zero_k_bias"] = torch.zeros(24)
    return network.eval(), state


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _write(folder: Path, tensors: dict[str, Tensor], side_car: dict[str, object]) -> Row:
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, folder / "made.safetensors")
    (folder / "made.json").write_text(json.dumps({"family": "infinity", **side_car}), "utf-8")
    (row,) = run(folder)
    return row


@pytest.mark.parametrize(
    ("config", "switches", "chunk"),
    [
        ({}, {}, 1),
        ({"rope2d_each_sa_layer": 0}, {"rotary": None}, 1),
        ({"rope2d_normalized_by_hw": 1}, {"rotary": "resized"}, 3),
        ({"rope2d_normalized_by_hw": 0}, {"rotary": "grid"}, None),
        ({"cross_attn_layer_scale": 0.3}, {"cross_attention_scale": 0.3}, 1),
        ({"add_lvl_embeding_only_first_block": 0}, {"scale_embedding_every": 1}, 1),
    ],
    ids=str,
)
def test_training_goldens(
    tmp_path: Path, config: dict[str, object], switches: dict[str, object], chunk: int | None
) -> None:
    network, tensors = _network(chunk, **switches)
    schedule = schedule_of_grids(GRIDS)
    tensors |= {"text_features": _drawn(sum(LENGTHS), 20), "x_BLC_wo_prefix": _drawn(3, schedule.tokens - 1, 10)}
    labels = _drawn(3, schedule.tokens, 10) > 0
    text = network.read_text(unpacked(tensors["text_features"], LENGTHS), text_mask(LENGTHS))
    logits = network(tensors["x_BLC_wo_prefix"], text, network.layout(schedule))
    loss = bitwise_loss(logits, labels)
    loss.backward()
    assert network.head.bias.grad is not None
    tensors |= {"gt_labels": labels.to(torch.uint8), "logits": logits, "grad.head.bias": network.head.bias.grad}
    side_car: dict[str, object] = {
        "kind": "d: of another set",
        "config": CONFIG | config,
        "state_in": None,
        "scale_schedule_thw": [[1, *grid] for grid in GRIDS],
        "text_lens": LENGTHS,
        "loss": loss.item(),
        "tolerance": {"atol": 1e-4},
    }
    row = _write(tmp_path, tensors, side_car)
    assert row.outcome == "yes", row.note


@pytest.mark.parametrize("patchify", [False, True])
def test_generation_goldens(tmp_path: Path, patchify: bool) -> None:
    """Unguided scales before and after guided ones, a batch of three, top-p, patchified or not, and no tokenizer."""
    network, tensors = _network(3, bits=16)
    schedule = schedule_of_grids(GRIDS)
    guidance, temperature = [1.0, 2.0, 2.0, 1.0], [1.0, 0.9, 0.8, 0.7]
    tensors["text_features"] = _drawn(sum(LENGTHS), 20)
    features = unpacked(tensors["text_features"], LENGTHS)
    null = network.drop_text(features, torch.ones(3, dtype=torch.bool))
    both = network.read_text(torch.cat((features, null)), text_mask([*LENGTHS, *LENGTHS]))
    cache, generator, inputs = network.empty_cache(6, schedule), torch.Generator().manual_seed(1), None
    grids = schedule.latent_grids(patchify)
    latent = torch.zeros(())
    with torch.no_grad():
        for scale, grid in enumerate(schedule.grids):
            doubled = None if inputs is None else torch.cat((inputs, inputs))
            prompt, other = (network.step(doubled, both, schedule, scale, cache) / temperature[scale]).chunk(2)
            logits = guide(prompt, other, guidance[scale])
            noise = exponential_noise(3 * grid[0] * grid[1], 16, generator).view(logits.shape)
            bits = choose_bits(logits, noise, 0, 0.9)
            tensors |= {f"s{scale:02d}.bits": bits.to(torch.uint8), f"s{scale:02d}.exp_noise": noise}
            latent = latent + enlarge(codes(from_tokens(bits.to(torch.uint8), grid, patchify)), grids[-1])
            if scale + 1 < len(schedule):
                inputs = to_tokens(enlarge(latent, grids[scale + 1]), patchify)
    side_car: dict[str, object] = {
        "kind": "e: of another set",
        "config": CONFIG | {"d_vae": 16, "head_out": 32, "apply_spatial_patchify": int(patchify), "block_chunks": 1},
        "scale_schedule_thw": [[1, *grid] for grid in GRIDS],
        "text_lens": LENGTHS,
        "cfg_list": guidance,
        "tau_list": temperature,
        "top_k": 0,
        "top_p": 0.9,
        "g_seed": 1,
    }
    row = _write(tmp_path, tensors | {"final_latent": latent}, side_car)
    assert row.outcome == "yes", row.note
