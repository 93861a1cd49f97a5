"""The names published Infinity files use, and ours.

Two tables of renames, so that official checkpoints load strictly by name and shape (`weights/loading` does the
loading). Not here: files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from gesso.models.infinity.autoencoder import AutoencoderConfig
from gesso.models.infinity.transformer import InfinityConfig

# (ours, published), applied in this order to a whole name, after the block prefix is dealt with.
_TRANSFORMER_PARTS: tuple[tuple[str, str], ...] = (
    ("null_text", "cfg_uncond"),
    ("start", "pos_start"),
    ("pool.query", "text_proj_for_sos.ca.mat_q"),
    ("pool.key_value.", "text_proj_for_sos.ca.mat_kv."),
    ("pool.value_bias", "text_proj_for_sos.ca.v_bias"),
    ("pool.out.", "text_proj_for_sos.ca.proj."),
    ("text_projection.fc1.", "text_proj_for_ca.0."),
    ("text_projection.fc2.", "text_proj_for_ca.2."),
    ("scale_embedding.", "lvl_embed."),
    ("code_embedding.", "word_embed."),
    ("head_modulation.", "head_nm.ada_lin.1."),
    ("text_norm.", "text_norm."),
    ("head.", "head."),
    ("modulation.", "shared_ada_lin.1."),
)
_BLOCK_PARTS: tuple[tuple[str, str], ...] = (
    ("modulation", "ada_gss"),
    ("self_attention.log_scale", "sa.scale_mul_1H11"),
    ("self_attention.query_bias", "sa.q_bias"),
    ("self_attention.value_bias", "sa.v_bias"),
    ("self_attention.qkv.", "sa.mat_qkv."),
    ("self_attention.out.", "sa.proj."),
    ("cross_attention.query.", "ca.mat_q."),
    ("cross_attention.key_value.", "ca.mat_kv."),
    ("cross_attention.value_bias", "ca.v_bias"),
    ("cross_attention.out.", "ca.proj."),
    ("cross_norm.", "ca_norm."),
    ("cross_gate", "ca_gamma"),
    ("feed_forward.", "ffn."),
)


def published_transformer_name(name: str, blocks_per_chunk: int | None) -> str:
    """Our parameter name -> the published one; blocks lie in chunks, or plainly where `blocks_per_chunk` is None."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block is None:
        return _renamed(name, _TRANSFORMER_PARTS)
    index = int(block[1])
    inner = _renamed(block[2], _BLOCK_PARTS)
    if blocks_per_chunk is None:
        return f"blocks.{index}.{inner}"
    return f"block_chunks.{index // blocks_per_chunk}.module.{index % blocks_per_chunk}.{inner}"


def published_autoencoder_name(name: str) -> str:
    """Our parameter name -> the published one."""
    name = name.replace(".shortcut.", ".nin_shortcut.")
    side, _, rest = name.partition(".")
    rest = re.sub(r"^levels\.(\d+)\.blocks\.", r"down.\1.block." if side == "encoder" else r"up.\1.block.", rest)
    rest = re.sub(r"^levels\.(\d+)\.downsample\.", r"down.\1.downsample.conv.", rest)
    rest = re.sub(r"^levels\.(\d+)\.upsample\.", r"up.\1.upsample.conv.", rest)
    rest = re.sub(r"^middle\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", rest)
    module, _, leaf = rest.rpartition(".")
    wrapper = "norm" if re.search(r"(^|\.)norm[^.]*$", module) else "conv"
    return f"{side}.{module}.{wrapper}.{leaf}"


def transformer_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published transformer's state dict under our names (a state dict of ours passes as it is).

    Buffers of zeros are dropped; unknown names are kept, so that strict loading reports them.
    """
    chunk = blocks_per_chunk(published)
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if name.endswith("zero_k_bias"):
            continue
        block = re.fullmatch(r"(?:block_chunks\.(\d+)\.module|blocks)\.(\d+)\.(.+)", name)
        if block is None:
            state[_renamed(name, _TRANSFORMER_PARTS, back=True)] = value
        else:
            index = int(block[2]) + (chunk or 0) * int(block[1] or 0)
            state[f"blocks.{index}.{_renamed(block[3], _BLOCK_PARTS, back=True)}"] = value
    return state


def autoencoder_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published tokenizer's state dict under our names; those without the `.conv`/`.norm` wrapper pass too."""
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        if name.endswith("lfq.mask"):
            continue  # powers of two, used for integer labels that bits make needless
        name = re.sub(
            r"(\.(?:conv|norm)[^.]*|shortcut|downsample|upsample)\.(?:conv|norm)\.(weight|bias)$", r"\1.\2", name
        )
        name = re.sub(r"(downsample|upsample)\.conv\.", r"\1.", name)
        name = re.sub(r"\.(?:down|up)\.(\d+)\.block\.", r".levels.\1.blocks.", name)
        name = re.sub(r"\.(?:down|up)\.(\d+)\.", r".levels.\1.", name)
        name = re.sub(r"\.mid\.block_(\d+)\.", lambda found: f".middle.{int(found[1]) - 1}.", name)
        state[name.replace(".nin_shortcut.", ".shortcut.")] = value
    return state


def blocks_per_chunk(published: Mapping[str, Tensor]) -> int | None:
    """How many blocks each chunk of a published transformer holds, or None where blocks lie plainly."""
    inner = [int(found[1]) for name in published if (found := re.match(r"block_chunks\.0\.module\.(\d+)\.", name))]
    return max(inner) + 1 if inner else None


def infer_transformer_config(state: Mapping[str, Tensor], **switches: object) -> InfinityConfig:
    """Sizes of a transformer from its state dict under our names; what shapes do not tell comes in `switches`.

    Raises KeyError where a tensor that tells a size is missing.
    """
    depth = 1 + max((int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    text_length, text_width = state["null_text"].shape
    sizes: dict[str, object] = {
        "depth": depth,
        "width": state["start"].shape[-1],
        "heads": state["blocks.0.self_attention.log_scale"].shape[1],
        "bits": state["code_embedding.weight"].shape[1],
        "text_width": text_width,
        "text_length": text_length,
        "pool_heads": state["pool.query"].shape[1],
        "feed_forward_width": state["blocks.0.feed_forward.fc1.weight"].shape[0],
        "scale_embeddings": state["scale_embedding.weight"].shape[0],
        "cross_attention_scale": 1.0 if "blocks.0.cross_gate" in state else None,
    }
    return InfinityConfig(**(sizes | switches))  # type: ignore[arg-type]


def infer_autoencoder_config(state: Mapping[str, Tensor], groups: int = 32) -> AutoencoderConfig:
    """Sizes of a tokenizer from its state dict under our names. Raises KeyError where a tensor is missing."""
    width = state["encoder.conv_in.weight"].shape[0]
    downs = [name for name in state if re.fullmatch(r"encoder\.levels\.\d+\.downsample\.weight", name)]
    blocks = [name for name in state if re.fullmatch(r"encoder\.levels\.0\.blocks\.\d+\.conv1\.weight", name)]

    def multipliers(side: str) -> tuple[int, ...]:
        levels = [name for name in state if re.fullmatch(rf"{side}\.levels\.\d+\.blocks\.0\.conv1\.weight", name)]
        return tuple(state[f"{side}.levels.{i}.blocks.0.conv1.weight"].shape[0] // width for i in range(len(levels)))

    return AutoencoderConfig(
        bits=state["encoder.conv_out.weight"].shape[0],
        width=width,
        encoder_multipliers=multipliers("encoder"),
        decoder_multipliers=multipliers("decoder"),
        residual_blocks=len(blocks),
        stride=2 ** len(downs),
        groups=groups,
    )


def _renamed(name: str, parts: tuple[tuple[str, str], ...], *, back: bool = False) -> str:
    """A name by its table: ours to published, or back."""
    for pair in parts:
        source, target = reversed(pair) if back else pair
        if name == source or (source.endswith(".") and name.startswith(source)):
            return target + name[len(source) :]
    return name
