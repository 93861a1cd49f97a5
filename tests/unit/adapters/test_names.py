"""Names alone: full-size networks under every spelling, and whatever anybody may write into a header."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gesso.adapters.formats.classification import classify_names
from gesso.adapters.formats.families import FAMILIES, hinted
from gesso.adapters.formats.keys import read_key
from gesso.adapters.formats.peft import peft_settings
from gesso.adapters.formats.places import shapes_of, sources
from gesso.models import diffusers_parts
from gesso.models.infinity.sizes import transformer_size
from gesso.models.infinity.transformer import InfinityTransformer
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import S3DiT
from gesso.weights.sdxl_file import CONFIGURATIONS


def _unet() -> nn.Module:
    values: dict[str, Any] = json.loads((CONFIGURATIONS / "unet" / "config.json").read_text())
    return diffusers_parts.unet_2d_condition()(**{name: each for name, each in values.items() if name[0] != "_"})


FULL: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: diffusers_parts.flux_transformer()(guidance_embeds=True),
    "z-image": lambda: S3DiT(S3DiTConfig()),
    "qwen-image": diffusers_parts.qwen_image_transformer(),
    "hunyuan-video": diffusers_parts.hunyuan_video_transformer(),
    "sdxl": _unet,
    "infinity": lambda: InfinityTransformer(transformer_size("2B")),
}
# How many modules published trainers' names have: every layer of diffusers' naming, and those of the original's blocks.
OWN = {"flux": 504, "z-image": 276, "qwen-image": 846, "hunyuan-video": 548, "sdxl": 794}


def _numbers(pattern: str, count: int, names: str) -> list[str]:
    return [f"{pattern}_{index}_{name}" for index in range(count) for name in names.split()]


# The original's layers in blocks, as musubi, kohya and ComfyUI have them, by flat name.
_STREAM = "attn_qkv attn_proj"
ORIGINAL: dict[str, list[str]] = {
    "flux": [
        *_numbers("double_blocks", 19, " ".join(
            f"{stream}_{name}" for stream in ("img", "txt") for name in (*_STREAM.split(), "mlp_0", "mlp_2", "mod_lin")
        )),
        *_numbers("single_blocks", 38, "linear1 linear2 modulation_lin"),
        "img_in", "txt_in", "time_in_in_layer", "guidance_in_out_layer", "vector_in_in_layer", "final_layer_linear",
        "final_layer_adaLN_modulation_1",
    ],
    "hunyuan-video": [
        *_numbers("double_blocks", 20, " ".join(
            f"{stream}_{name}"
            for stream in ("img", "txt") for name in (*_STREAM.split(), "mlp_fc1", "mlp_fc2", "mod_linear")
        )),
        *_numbers("single_blocks", 40, "linear1 linear2 modulation_linear"),
        *_numbers("txt_in_individual_token_refiner_blocks", 2,
                  "self_attn_qkv self_attn_proj mlp_fc1 mlp_fc2 adaLN_modulation_1"),
        "img_in_proj", "txt_in_input_embedder", "txt_in_t_embedder_mlp_0", "txt_in_c_embedder_linear_2",
        "time_in_mlp_0", "vector_in_out_layer", "final_layer_adaLN_modulation_1",
    ],
    "z-image": [
        *_numbers("layers", 30, "attention_qkv attention_out feed_forward_w1 adaLN_modulation_0"),
        *_numbers("noise_refiner", 2, "attention_qkv feed_forward_w3"),
        *_numbers("context_refiner", 2, "attention_qkv attention_out"),
        "x_embedder", "cap_embedder_1", "t_embedder_mlp_2", "final_layer_linear",
    ],
    # SDXL's attention in its three places, as kohya numbers them.
    "sdxl": [
        *(f"input_blocks_{block}_1_transformer_blocks_{depth}_{name}"
          for block, depths in ((4, 2), (5, 2), (7, 10), (8, 10)) for depth in range(depths)
          for name in ("attn1_to_q", "attn1_to_out_0", "attn2_to_v", "ff_net_0_proj", "ff_net_2")),
        *(f"output_blocks_{block}_1_transformer_blocks_{depth}_attn2_to_k"
          for block, depths in ((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2)) for depth in range(depths)),
        *(f"input_blocks_{block}_0_in_layers_2" for block in (1, 2, 4, 5, 7, 8)),
        "middle_block_1_proj_in", "middle_block_0_out_layers_3", "input_blocks_3_0_op", "output_blocks_2_2_conv",
        "time_embed_0", "label_emb_0_2", "out_2", "input_blocks_0_0", "output_blocks_0_0_skip_connection",
    ],
    "qwen-image": _numbers("transformer_blocks", 60, "attn_to_q attn_to_add_out img_mlp_net_2 txt_mod_1"),
    "infinity": [
        *_numbers("blocks", 32, "sa_mat_qkv sa_proj ca_mat_q ca_mat_kv ca_proj ffn_fc1 ffn_fc2"),
        *_numbers("blocks", 32, "self_attention_qkv cross_attention_key_value feed_forward_fc2"),
        "word_embed", "head", "shared_ada_lin_1", "text_proj_for_ca_2", "text_proj_for_sos_ca_mat_kv",
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", FULL)
def test_full_size_networks_are_found_under_every_name(family: str) -> None:
    """On the meta device: every module by our name, every layer of the original's blocks, and the family from both."""
    with torch.device("meta"):
        network = FULL[family]()
    found = sources(network)
    shapes = shapes_of(network)
    own = [name for name, source in found.items() if source.own]
    assert len(own) == len(shapes) == OWN.get(family, len(shapes))
    assert [name for name in ORIGINAL[family] if name not in found] == []
    reached = {target.module for source in found.values() for target in source.targets}
    assert reached == set(shapes)
    for source in found.values():  # rows of a fused layer are shared out to the last one
        rows = [span for target in source.targets for span in target.rows or ((0, target.shape.outputs),)]
        assert sum(end - begin for begin, end in rows) == source.outputs
    for names in (own, ORIGINAL[family]):
        assert classify_names(_pairs(f"lora_unet_{name}" for name in names)).families == (family,)


def _pairs(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{end}.weight": (4, 4) for name in names for end in ("lora_down", "lora_up")}


def test_what_names_leave_open_metadata_may_choose() -> None:
    shapes = _pairs(["lora_unet_double_blocks_0_img_attn_qkv"])
    assert classify_names(shapes).families == ("flux", "hunyuan-video")
    assert classify_names(shapes, {"ss_base_model_version": "hunyuan_video"}).families == ("hunyuan-video",)
    assert classify_names(shapes, {"ss_base_model_version": "sdxl"}).families == ("flux", "hunyuan-video")
    deep = _pairs(["lora_unet_double_blocks_19_img_attn_qkv"])
    assert classify_names(deep).families == ("hunyuan-video",)


def _blocks(double: int, single: int) -> dict[str, tuple[int, ...]]:
    """Layers of blocks that several families call alike in diffusers, of the first so many blocks."""
    names = [f"transformer.transformer_blocks.{index}.attn.to_q" for index in range(double)]
    return _pairs(names + [f"transformer.single_transformer_blocks.{index}.proj_mlp" for index in range(single)])


@pytest.mark.parametrize(
    ("double", "single", "families"),
    [
        (19, 38, ("flux",)),
        (20, 40, ("hunyuan-video",)),
        (19, 0, ("flux",)),
        (0, 38, ("flux",)),
        (60, 0, ("qwen-image",)),
        (12, 38, ("flux", "hunyuan-video")),
        (19, 37, ("flux", "hunyuan-video")),
    ],
)
def test_all_blocks_of_a_family_and_no_more_are_that_familys(
    double: int, single: int, families: tuple[str, ...]
) -> None:
    assert classify_names(_blocks(double, single)).families == families
    said = classify_names(_blocks(12, 38), {"ss_base_model_version": "hunyuan_video"})
    assert said.families == ("hunyuan-video",)


def test_a_summary_says_it_in_one_line() -> None:
    shapes = _pairs(["lora_unet_single_blocks_0_modulation_lin", "lora_te1_text_model_encoder_layers_0_mlp_fc1"])
    found = classify_names(shapes)
    assert found.summary() == "LoRA of rank 4 for flux, kohya naming, 2 modules (1 of text encoders)"


_WORDS = (
    "lora_unet_", "lora_te1_", "transformer.", "diffusion_model.", "base_model.model.", "double_blocks", "input_blocks",
    "layers", "attn2_to_k", "processor", "qkv_lora1", "lora", "_", ".", "0", "19", "99999999999", "²", "é", "alpha",
    ".lora_A.weight", ".lora_B.default.weight", ".lora_down.weight", ".lora_up.weight", ".down.weight", ".hada_w1_a",
    ".lokr_w2_b", ".lokr_t2", ".dora_scale", ".diff", ".diff_b", ".lora_magnitude_vector", "weight", "",
)  # fmt: skip
_NAMES = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(_WORDS), max_size=6).map("".join))
_SHAPES = st.lists(st.integers(0, 4096), max_size=5).map(tuple)


@settings(max_examples=200)
@given(st.dictionaries(_NAMES, _SHAPES, max_size=8), st.dictionaries(st.text(max_size=20), st.text(max_size=20)))
def test_any_names_are_classified_without_an_error(
    shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]
) -> None:
    found = classify_names(shapes, metadata)
    assert set(found.families) <= set(FAMILIES)
    assert found.count <= len(shapes)
    assert "\n" not in found.summary()
    assert set(hinted(metadata)) <= set(FAMILIES)
    peft_settings(metadata)


@given(_NAMES)
def test_a_key_is_read_or_it_is_none(name: str) -> None:
    key = read_key(name)
    assert key is None or (key.module and "." not in key.module and name.startswith(key.group))


@pytest.mark.parametrize(
    ("metadata", "facts"),
    [
        ({}, {}),
        ({"ss_tag_frequency": "[1]"}, {}),
        ({"ss_tag_frequency": '{"a": {"style": "x"}}', "ss_base_model_version": "sdxl"}, {"base model": "sdxl"}),
        ({"ss_tag_frequency": '{"a": {"cat": 2, "style ": 9}, "b": {"cat": 1}}'}, {"trained words": "style, cat"}),
        ({"modelspec.trigger_phrase": "chalk\n", "ss_tag_frequency": '{"a": {"b": 1}}'}, {"trained words": "chalk"}),
    ],
)
def test_what_a_file_says_of_itself(metadata: dict[str, str], facts: dict[str, str]) -> None:
    assert classify_names({}, metadata).facts() == facts
