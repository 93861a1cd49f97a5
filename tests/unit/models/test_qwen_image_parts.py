"""Qwen-Image's parts: operations against PyTorch's own count, the autoencoder against diffusers', text, full size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from gesso.models import qwen_image_cost
from gesso.models.qwen_image_autoencoder import PictureAutoencoder
from gesso.models.qwen_image_text import QwenImageText
from gesso.pipelines.qwen_image import QwenImagePipeline
from gesso.pipelines.qwen_image_state import QwenImageDefaults
from gesso.request import GenerationRequest
from gesso.weights import catalogue
from tests.tiny_qwen_image import (
    STRETCHED,
    TEXT_WIDTH,
    tiny_autoencoder,
    tiny_text,
    tiny_tokenizer,
    tiny_transformer,
)

CPU = torch.device("cpu")


def counted(action: Callable[[], object]) -> int:
    """PyTorch's count. It does not know the CPU's own kernel for attention, so that one is spelled out."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        action()
    return counter.get_total_flops()


# ---- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "text_tokens"), [((4, 4), 20), ((6, 16), 7)])
def test_operations_of_the_transformer(tokens: tuple[int, int], text_tokens: int) -> None:
    network: Any = tiny_transformer()
    rows, columns = tokens
    values = {
        "hidden_states": torch.zeros(1, rows * columns, 16),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, text_tokens, TEXT_WIDTH),
        "img_shapes": [[(1, rows, columns)]],
    }
    expected = counted(lambda: network(**values))
    found = qwen_image_cost.transformer_flops(network.config, rows * columns, text_tokens)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"num_res_blocks": 2, "dim_mult": [1, 2, 4, 4], "attn_scales": [0.5]}])
def test_operations_of_the_autoencoder(changes: dict[str, Any]) -> None:
    values = {name: value for name, value in tiny_autoencoder().config.items() if not name.startswith("_")}
    autoencoder: Any = PictureAutoencoder(**{**values, **changes}).eval()
    encode = counted(lambda: autoencoder.encode(torch.zeros(1, 3, 1, 48, 64)))
    decode = counted(lambda: autoencoder.decode(torch.zeros(1, 4, 1, 6, 8)))
    assert qwen_image_cost.encode_flops(autoencoder.config, 64, 48) == pytest.approx(encode, rel=1e-3)
    assert qwen_image_cost.decode_flops(autoencoder.config, 64, 48) == pytest.approx(decode, rel=1e-3)


# ---- the autoencoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("frames", [1, 5])
def test_the_autoencoder_gives_diffusers_bits(frames: int, tiled: bool) -> None:
    ours: Any = tiny_autoencoder()
    theirs: Any = tiny_autoencoder(AutoencoderKLQwenImage)
    for network in (ours, theirs) if tiled else ():
        network.enable_tiling(24, 24, 16, 16)
    torch.manual_seed(3)
    video_23FHW = torch.randn(2, 3, frames, 32, 48)
    with torch.no_grad():
        one, other = (network.encode(video_23FHW).latent_dist for network in (ours, theirs))
        assert torch.equal(one.mean, other.mean) and torch.equal(one.logvar, other.logvar)
        assert torch.equal(ours.decode(one.mean).sample, theirs.decode(one.mean).sample)
        assert torch.equal(ours.decode(one.mean, return_dict=False)[0], theirs.decode(one.mean).sample)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_text_in_company_is_text_alone() -> None:
    text = tiny_text()
    prompts = ["a red star", "two blue rings on a star", " "]
    together = text.features(prompts, CPU)
    assert [len(features_TE) for features_TE in together] == [text.count(prompt) for prompt in prompts]
    for prompt, features_TE in zip(prompts, together, strict=True):
        assert torch.allclose(text.features([prompt], CPU)[0], features_TE, atol=1e-5)


def test_what_is_cut_is_what_is_not_read() -> None:
    text = tiny_text(12)
    prompt = "two blue rings 星 a red star two rings a ring star"
    tail = text.cut(prompt)
    assert prompt.endswith(tail) and tail
    with_other_end = prompt.removesuffix(tail) + " ring" * 9
    one, other = (text.features([each], CPU)[0] for each in (prompt, with_other_end))
    assert torch.allclose(one, other, atol=1e-5)
    assert text.cut("two blue rings") == "" and text.unknown("unheard-of") == []


# ---- full size ------------------------------------------------------------------------------------------------------


def test_the_published_sizes_on_the_meta_device() -> None:
    """As Qwen/Qwen-Image says them; nothing has memory, and a picture is planned."""
    rotary: Any = {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1e6}
    config = Qwen2_5_VLTextConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_parameters=rotary,
    )
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(
            num_layers=60, num_attention_heads=24, attention_head_dim=128, joint_attention_dim=3584
        )
        autoencoder, encoder = PictureAutoencoder(), Qwen2_5_VLTextModel(config)
    parts = {"transformer": transformer, "text_encoder": encoder, "autoencoder": autoencoder}
    for part in parts.values():
        torch.nn.Module.to(part, torch.bfloat16)
    sizes = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    assert sizes == catalogue.find("qwen-image").parameters
    assert sizes["transformer"] == 20_430_401_088
    pipeline = QwenImagePipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=QwenImageText(encoder, tiny_tokenizer()),
        scheduler=STRETCHED,
        defaults=QwenImageDefaults(),
        name="qwen-image",
        digest="",
        device=torch.device("meta"),
        dtype=torch.bfloat16,
    )
    plan = pipeline.plan(GenerationRequest(prompt="a red star", seed=7))
    assert (plan.request.width, plan.request.height, plan.steps, plan.warnings) == (1328, 1328, 50, ())
    assert plan.peak_bytes / 1e9 == pytest.approx(55.3 + 3.7, abs=0.2)  # weights, and the decoder's maps
    assert plan.activations["text"] < plan.activations["step"] < plan.activations["decode"]
    tokens, width = 83 * 83, 3072
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width  # the picture's own; texts are short
    assert plan.cost.flops == pytest.approx(2 * 50 * 60 * block, rel=0.01)
