"""How trainers spell the name of a tensor: which part of a model, which module of it, and what the tensor is there.

A name is a prefix (`lora_unet_`, `transformer.`), a module in that trainer's spelling and an ending (`.lora_A.weight`).
Modules are kept *flat*, every "." as "_", since some trainers write them so and nobody can turn that back without the
network. Not here: which modules a family has (`families`), and which of ours they are (`places`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

NETWORK = "network"
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")

_PREFIXES: tuple[tuple[str, str], ...] = (
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
    ("text_encoders.t5xxl.", "text_encoder_3"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder.", "text_encoder"),
    ("lora_transformer_", NETWORK),
    ("lora_unet_", NETWORK),
    ("lycoris_", NETWORK),
    ("transformer.", NETWORK),
    ("diffusion_model.", NETWORK),
    ("unet.", NETWORK),
)
WRAPPER = "base_model.model."
"""What PEFT itself puts before every name."""
_WRAPPERS = (WRAPPER, "pipe.", "dit.", "model.diffusion_model.")
"""What stands before a prefix, or alone, and says nothing."""

# Endings, tried in order. PEFT may put the adapter's own name ("default") before "weight".
_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"
_ENDINGS: tuple[tuple[str, str], ...] = (
    (rf"\.lora_A{_NAME}(?:\.weight)?", "down"),
    (rf"\.lora_B{_NAME}(?:\.weight)?", "up"),
    (rf"\.lora_A{_NAME}\.bias", "down_bias"),
    (rf"\.lora_B{_NAME}\.bias", "up_bias"),
    (rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?", "magnitude"),
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.lora_linear_layer\.down\.weight", "down"),
    (r"\.lora_linear_layer\.up\.weight", "up"),
    (r"[._]lora\.down\.weight", "down"),
    (r"[._]lora\.up\.weight", "up"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_b"),
    *((rf"\.{name}", name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    *((rf"\.{name}", name) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    (r"\.lokr_t2", "lokr_t2"),
)
_COMPILED = tuple((re.compile(rf"(.+?){ending}"), field) for ending, field in _ENDINGS)
# XLabs numbers the two streams of a block behind "lora": qkv_lora1 is that of the picture, qkv_lora2 that of the text.
_STREAM = re.compile(r"(.+_lora[12])\.(down|up)\.weight")


class Key(NamedTuple):
    """A tensor's name, read. `group` is shared by the tensors of one module in one spelling."""

    group: str
    part: str
    module: str
    field: str


def read_key(name: str) -> Key | None:
    """A tensor's name taken apart; None for what is no tensor of an adapter that is known.

    Example:
        >>> read_key("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight")[1:]
        ('network', 'double_blocks_0_img_attn_qkv', 'down')
        >>> read_key("transformer.layers.3.attention.to_q.lora_A.default.weight")[1:]
        ('network', 'layers_3_attention_to_q', 'down')
    """
    split = _ending(name)
    if split is None:
        return None
    group, field = split
    part, module = _part(group)
    flat = flatten(module).replace("_processor_", "_")
    return Key(group, part, re.sub(r"_lora([12])$", r"\1", flat), field) if flat else None


def flatten(module: str) -> str:
    """A module's name as trainers write it that have no dots."""
    return module.replace(".", "_")


def prefix_of(group: str) -> str:
    """What a name begins with before its module: "transformer.", "lora_unet_" and the like, "" for nothing."""
    bare = _unwrapped(group)
    return next((prefix for prefix, _ in _PREFIXES if bare.startswith(prefix)), "")


def _ending(name: str) -> tuple[str, str] | None:
    if found := _STREAM.fullmatch(name):
        return found[1], found[2]
    for pattern, field in _COMPILED:
        if found := pattern.fullmatch(name):
            return found[1], field
    return None


def _part(group: str) -> tuple[str, str]:
    bare = _unwrapped(group)
    for prefix, part in _PREFIXES:
        if bare.startswith(prefix):
            return part, _unwrapped(bare[len(prefix) :])
    return NETWORK, bare


def _unwrapped(group: str) -> str:
    wrapper = next((wrapper for wrapper in _WRAPPERS if group.startswith(wrapper)), None)
    return group if wrapper is None else _unwrapped(group[len(wrapper) :])
