"""Published names and shapes at full size, against ours after renaming.

The data hold, for each model, templates of names with the numbers that fill them: `[template, shape, [numbers, …]]`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gesso.models.infinity.autoencoder import Autoencoder
from gesso.models.infinity.checkpoint import (
    autoencoder_state,
    blocks_per_chunk,
    infer_autoencoder_config,
    infer_transformer_config,
    published_autoencoder_name,
    published_transformer_name,
    transformer_state,
)
from gesso.models.infinity.sizes import TRANSFORMERS, tokenizer_size, transformer_size
from gesso.models.infinity.transformer import InfinityTransformer

DATA = json.loads((Path(__file__).parents[2] / "golden/data/names/infinity.json").read_text(encoding="utf-8"))
TOKENIZERS = [name for name in DATA if name.startswith("vae-")]
NETWORKS = [name for name in DATA if name not in TOKENIZERS]


def _published(model: str) -> dict[str, Tensor]:
    rows = DATA[model]["state_dict"]
    return {
        template.format(*numbers): torch.empty(shape, device="meta")
        for template, shape, filled in rows
        for numbers in filled
    }


def _is_buffer(name: str) -> bool:
    return name.endswith(("zero_k_bias", "lfq.mask"))


def _build(make: type[nn.Module], config: object) -> nn.Module:
    with torch.device("meta"):
        return make(config)


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if not _is_buffer(name)}


def test_every_published_size_is_here() -> None:
    assert sorted(NETWORKS) == sorted(TRANSFORMERS)


@pytest.mark.parametrize("model", NETWORKS)
def test_transformer(model: str) -> None:
    published, stated = _published(model), DATA[model]["config"]
    network = _build(InfinityTransformer, transformer_size(model, stated["codebook_dim_seen_by_transformer"]))
    chunk = blocks_per_chunk(published)
    assert chunk == stated["depth"] // stated["block_chunks"]
    ours = {published_transformer_name(name, chunk): value for name, value in network.state_dict().items()}
    assert _shapes(ours) == _shapes(published)
    assert sum(parameter.numel() for parameter in network.parameters()) == DATA[model]["param_count"]
    state = transformer_state(published)
    network.load_state_dict(state, strict=True, assign=True)
    assert infer_transformer_config(state).width == stated["embed_dim"]
    assert infer_transformer_config(state).pool_heads == stated["pool_heads"]


@pytest.mark.parametrize("model", TOKENIZERS)
def test_tokenizer(model: str) -> None:
    published, stated = _published(model), DATA[model]["config"]
    config = tokenizer_size(stated["codebook_dim"], patchify=stated["patch_size"] == 8)
    network = _build(Autoencoder, config)
    ours = {published_autoencoder_name(name): value for name, value in network.state_dict().items()}
    assert _shapes(ours) == _shapes(published)
    assert sum(parameter.numel() for parameter in network.parameters()) == DATA[model]["param_count"]
    state = autoencoder_state(published)
    network.load_state_dict(state, strict=True, assign=True)
    assert infer_autoencoder_config(state) == config


def test_blocks_without_chunks_keep_their_number() -> None:
    """Sharded official files hold `blocks.N` rather than chunks."""
    name = "blocks.7.self_attention.qkv.weight"
    assert published_transformer_name(name, None) == "blocks.7.sa.mat_qkv.weight"
    assert published_transformer_name(name, 3) == "block_chunks.2.module.1.sa.mat_qkv.weight"


def test_the_gate_on_cross_attention_is_a_vector() -> None:
    """The optional layer scale `ca_gamma` is published as `[C]`."""
    config = transformer_size("125M")
    gated = type(config)(**{**config.__dict__, "cross_attention_scale": 0.0})
    state = _build(InfinityTransformer, gated).state_dict()
    ours = {published_transformer_name(name, 3): value for name, value in state.items()}
    assert ours["block_chunks.3.module.2.ca_gamma"].shape == (768,)
    assert infer_transformer_config(state).cross_attention_scale is not None


def test_what_is_unknown_stays_and_what_is_ours_passes() -> None:
    """So that strict loading reports the one and takes the other."""
    network = _build(InfinityTransformer, transformer_size("125M"))
    assert transformer_state(network.state_dict()).keys() == network.state_dict().keys()
    state = transformer_state(_published("125M") | {"stranger": torch.zeros(1)})
    assert state.keys() - network.state_dict().keys() == {"stranger"}
    tokenizer = _build(Autoencoder, tokenizer_size(32))
    assert autoencoder_state(tokenizer.state_dict()).keys() == tokenizer.state_dict().keys()
    assert "stranger" in autoencoder_state(_published("vae-d32") | {"stranger": torch.zeros(1)})
