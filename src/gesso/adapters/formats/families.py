"""Whose networks have modules of these names: the family of an adapter, told from its file's header alone.

Names come flat and with "#" for every number (`keys.flatten`). A name may be known to several families (FLUX's and
HunyuanVideo's blocks are called alike in diffusers), so that several may remain; how deep the blocks are counted,
whether they are all that a family has, and how wide tensors are tells some of them apart. Not here: which module of
ours a name means (`places`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

FAMILIES = ("flux", "z-image", "qwen-image", "hunyuan-video", "sdxl", "infinity")
"""Families with networks here, by the names that catalogue and messages use."""

_NUMBER = re.compile(r"[0-9]+")
_JOINT = r"attn_(to_[qkv]|to_out(_#)?|add_[qkv]_proj|to_add_out)"
_TWO_STREAMS = rf"transformer_blocks_#_(norm#(_context)?_linear|{_JOINT}|ff(_context)?_net_#(_proj)?)"
_ONE_STREAM = r"single_transformer_blocks_#_(norm_linear|proj_mlp|proj_out|attn_to_[qkv])"
_ENDS = r"x_embedder|proj_out|norm_out_linear|time_text_embed_(timestep|guidance|text)_embedder_linear_#"
_ORIGINAL_ENDS = r"final_layer_(linear|adaLN_modulation_#)|vector_in_(in|out)_layer"
_UNET_INSIDE = (
    r"(proj_in|proj_out|transformer_blocks_#_(attn#_to_([qkv]|out(_#)?)|ff_net_#(_proj)?)"
    r"|conv#|conv|op|time_emb_proj|conv_shortcut|in_layers_#|emb_layers_#|out_layers_#|skip_connection)"
)
_S3DIT_INSIDE = r"(attention_(to_[qkv]|to_out(_#)?|qkv|out)|feed_forward_w#|adaLN_modulation_#)"

_PATTERNS: dict[str, str] = {
    "flux": (
        rf"{_TWO_STREAMS}|{_ONE_STREAM}|{_ENDS}|context_embedder|double_blocks_#_(img|txt)_(attn_(qkv|proj)|mlp_#|mod_lin)"
        rf"|single_blocks_#_(linear#|modulation_lin)|{_ORIGINAL_ENDS}|img_in|txt_in|(time|guidance)_in_(in|out)_layer"
        r"|double_blocks_#_(qkv|proj)#|single_blocks_#_(qkv|proj)_?"
    ),
    "hunyuan-video": (
        rf"{_TWO_STREAMS}|{_ONE_STREAM}|{_ENDS}|x_embedder_proj|img_in_proj|single_blocks_#_(linear#|modulation_linear)"
        rf"|double_blocks_#_(img|txt)_(attn_(qkv|proj)|mlp_fc#|mod_linear)|{_ORIGINAL_ENDS}|(time|guidance)_in_mlp_#"
        r"|context_embedder_.+|txt_in_.+"
    ),
    "qwen-image": (
        rf"transformer_blocks_#_({_JOINT}|(img|txt)_(mod_#|mlp_net_#(_proj)?))|img_in|txt_in|proj_out|norm_out_linear"
        r"|time_text_embed_timestep_embedder_linear_#"
    ),
    "z-image": (
        rf"(layers|noise_refiner|context_refiner|siglip_refiner)_#_{_S3DIT_INSIDE}|t_embedder_mlp_#"
        r"|(cap|siglip)_embedder_#|(all_)?x_embedder(_#-#)?|(all_)?final_layer_(#-#_)?(linear|adaLN_modulation_#)"
    ),
    "sdxl": (
        rf"(down_blocks|up_blocks)_#_(resnets|attentions|downsamplers|upsamplers)_#_{_UNET_INSIDE}"
        rf"|mid_block_(resnets|attentions)_#_{_UNET_INSIDE}|(input_blocks|output_blocks)_#_#(_{_UNET_INSIDE})?"
        rf"|middle_block_#_{_UNET_INSIDE}|conv_in|conv_out|time_embedding_linear_#|add_embedding_linear_#|time_embed_#"
        r"|label_emb_#_#|out_#"
    ),
    "infinity": (
        r"blocks_#_(self_attention_(qkv|out)|cross_attention_(query|key_value|out)|feed_forward_fc#)"
        r"|(block_chunks_#_module|blocks)_#_(sa_(mat_qkv|proj)|ca_(mat_q|mat_kv|proj)|ffn_fc#)"
        r"|text_proj_for_(sos_ca_(mat_kv|proj)|ca_#)|text_projection_fc#|pool_(key_value|out)|code_embedding|word_embed"
        r"|head|modulation|head_modulation|shared_ada_lin_#|head_nm_ada_lin_#"
    ),
}
# Families without a network here whose adapters people have; names that only they use.
_FOREIGN: dict[str, str] = {
    "Stable Diffusion 3": r"joint_blocks_#_.+",
    "Wan": r"blocks_#_((self|cross)_attn_([qkvo]|k_img|v_img)|ffn_#)|blocks_#_attn#_(to_.+|add_.+)",
    "FLUX.2": r"(double|single)_stream_modulation.*|single_transformer_blocks_#_attn_to_(qkv_mlp_proj|out)",
    "Chroma": r"distilled_guidance_layer_.+",
    "HiDream": r"(double|single)_stream_blocks_#_.+",
    "a language model": r"(model_)*layers_#_(self_attn_[qkvo]_proj|mlp_(gate|up|down)_proj)",
}
_COMPILED = {family: re.compile(pattern) for family, pattern in (_PATTERNS | _FOREIGN).items()}

# Blocks that the published networks have, in any spelling: a higher number speaks against the family, and all of them
# and no more for it.
_DEPTHS: dict[str, dict[str, int]] = {
    "flux": {"double_blocks": 19, "transformer_blocks": 19, "single_blocks": 38, "single_transformer_blocks": 38},
    "hunyuan-video": {
        "double_blocks": 20,
        "transformer_blocks": 20,
        "single_blocks": 40,
        "single_transformer_blocks": 40,
    },
    "qwen-image": {"transformer_blocks": 60},
}
_BLOCK = re.compile(r"(double_blocks|transformer_blocks|single_blocks|single_transformer_blocks)_([0-9]+)(?:_|$)")
_TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}
_READS_TEXT = re.compile(r".*attn2_to_[kv]")


class Verdict(NamedTuple):
    """Families that fit best, and how many of the modules they know; or the one that has no network here."""

    families: tuple[str, ...]
    foreign: str
    known: int


def verdict(widths: Mapping[str, int | None], hints: Iterable[str] = ()) -> Verdict:
    """Judge flat names of modules, each with the width of what it reads where a tensor tells it.

    `hints` are families that the file's own metadata names; they only choose among those that remain, and after them
    does a family that has just the blocks of the file.
    """
    plain = Counter(numbered(module) for module in widths)
    counts = {
        family: sum(times for name, times in plain.items() if pattern.fullmatch(name))
        for family, pattern in _COMPILED.items()
    }
    for family, depths in _DEPTHS.items():
        if any(_too_deep(module, depths) for module in widths):
            counts[family] = 0
    most = max(counts.values(), default=0)
    if not most:
        return Verdict((), "", 0)
    best = [family for family in FAMILIES if counts[family] == most]
    foreign = next((family for family in _FOREIGN if counts[family] == most), "")
    if best == ["sdxl"] and (other := _by_text_width(widths)):
        return Verdict((), other, most)
    left = [family for family in best if family in set(hints)] or best
    blocks = _blocks(widths)
    left = [family for family in left if _has_just(blocks, _DEPTHS.get(family, {}))] or left
    return Verdict(tuple(left), "" if best else foreign, most)


def numbered(module: str) -> str:
    """A flat name with "#" for every number in it."""
    return _NUMBER.sub("#", module)


def hinted(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Families that a file's metadata names, as trainers write it. Only a hint: it is often wrong."""
    keys = ("ss_base_model_version", "modelspec.architecture", "ss_network_module", "base_model", "software")
    text = " ".join(str(metadata.get(key, "")) for key in keys).lower()
    words = {
        "flux": ("flux",),
        "hunyuan-video": ("hunyuan",),
        "qwen-image": ("qwen",),
        "z-image": ("z-image", "zimage", "z_image"),
        "sdxl": ("sdxl", "stable-diffusion-xl", "xl_base"),
        "infinity": ("infinity",),
    }
    return tuple(family for family, marks in words.items() if any(mark in text for mark in marks))


def _too_deep(module: str, depths: Mapping[str, int]) -> bool:
    found = _BLOCK.match(module)
    return found is not None and int(found[2][:6]) >= depths.get(found[1], 1 << 30)


def _blocks(modules: Iterable[str]) -> dict[str, set[int]]:
    """Numbers of the blocks that modules are in, by what the blocks are called."""
    blocks: dict[str, set[int]] = {}
    for module in modules:
        if found := _BLOCK.match(module):
            blocks.setdefault(found[1], set()).add(int(found[2][:6]))
    return blocks


def _has_just(blocks: Mapping[str, set[int]], depths: Mapping[str, int]) -> bool:
    """Whether of each kind of block there are all that a family has; not where there are no blocks."""
    return bool(blocks) and all(numbers == set(range(depths.get(kind, 0))) for kind, numbers in blocks.items())


def _by_text_width(widths: Mapping[str, int | None]) -> str:
    """The older Stable Diffusion whose text is so wide; "" if none, or if nothing of the file reads text."""
    found = {width for module, width in widths.items() if width is not None and _READS_TEXT.fullmatch(module)}
    return _TEXT_WIDTHS.get(found.pop(), "") if len(found) == 1 else ""
