"""Synthetic files of adapters in the spellings that people have, with what each module of ours must gain by them.

Names are written out by hand and the gains are computed here, by no table and no rule of the package. At the end,
adapters without a file, for tests of applying them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gesso.adapters.formats.classification import Classification
from gesso.adapters.formats.deltas import Delta
from gesso.adapters.formats.places import Shape, shapes_of
from gesso.adapters.formats.reading import Adapter

RANK = 3
ENDINGS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "diffsynth": (".lora_A.default.weight", ".lora_B.default.weight"),
    "dots": (".lora.down.weight", ".lora.up.weight"),
    "old": ("_lora.down.weight", "_lora.up.weight"),
    "linear": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


@dataclass
class AdapterFile:
    """A file in the making for a network; `gains` are what modules of it must gain, by name."""

    network: nn.Module
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def draw(self, *shape: int) -> Tensor:
        self.seed += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def weight(self, module: str) -> Tensor:
        weight = self.network.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        return weight

    def lora(
        self,
        name: str,
        modules: str | Sequence[str],
        style: str = "kohya",
        *,
        alpha: float | None = None,
        rank: int = RANK,
        turned: bool = False,
    ) -> AdapterFile:
        """A LoRA under a name, of one module or of several whose rows lie one after the other."""
        modules = [modules] if isinstance(modules, str) else list(modules)
        weights = [self.weight(module) for module in modules]
        down = self.draw(rank, *weights[0].shape[1:])
        up = self.draw(sum(len(weight) for weight in weights), rank)
        down_name, up_name = (name + ending for ending in ENDINGS[style])
        self.tensors[down_name] = down
        self.tensors[up_name] = up.reshape(*up.shape, *(1,) * (down.ndim - 2)).clone()
        if alpha is not None:
            self.tensors[f"{name}.alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / rank
        self.gain(modules, scale * (up @ down.flatten(1)), turned)
        return self

    def gain(self, modules: Sequence[str], whole: Tensor, turned: bool = False) -> None:
        """Note what rows of a whole each module gains; where turned, the second half comes first."""
        if turned:
            whole = torch.cat([whole[len(whole) // 2 :], whole[: len(whole) // 2]])
        parts = whole.split([len(self.weight(module)) for module in modules])
        for module, part in zip(modules, parts, strict=True):
            self.gains[module] = part.reshape(self.weight(module).shape)

    def loha(self, name: str, modules: Sequence[str], alpha: float = 2.0) -> AdapterFile:
        outputs, inputs = self._sizes(modules)
        a, b, c, d = (self.draw(*shape) for shape in ((outputs, RANK), (RANK, inputs)) * 2)
        for ending, tensor in zip(("w1_a", "w1_b", "w2_a", "w2_b"), (a, b, c, d), strict=True):
            self.tensors[f"{name}.hada_{ending}"] = tensor
        self.tensors[f"{name}.alpha"] = torch.tensor(alpha)
        self.gain(modules, alpha / RANK * (a @ b) * (c @ d))
        return self

    def lokr(self, name: str, modules: Sequence[str], alpha: float | None = None) -> AdapterFile:
        """The first factor is 2 by 2; with an alpha the second is of low rank, and only then does alpha count."""
        outputs, inputs = self._sizes(modules)
        first = self.draw(2, 2)
        self.tensors[f"{name}.lokr_w1"] = first
        if alpha is None:
            second = self.tensors[f"{name}.lokr_w2"] = self.draw(outputs // 2, inputs // 2)
            self.tensors[f"{name}.alpha"] = torch.tensor(1e6)
        else:
            a, b = self.draw(outputs // 2, RANK), self.draw(RANK, inputs // 2)
            self.tensors[f"{name}.lokr_w2_a"], self.tensors[f"{name}.lokr_w2_b"] = a, b
            self.tensors[f"{name}.alpha"] = torch.tensor(alpha)
            second = alpha / RANK * (a @ b)
        blocks = [[first[row, column] * second for column in range(2)] for row in range(2)]
        self.gain(modules, torch.cat([torch.cat(row, dim=1) for row in blocks]))
        return self

    def _sizes(self, modules: Sequence[str]) -> tuple[int, int]:
        weights = [self.weight(module) for module in modules]
        return sum(len(weight) for weight in weights), weights[0][0].numel()

    def write(self, path: Path) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path, self.metadata or None)
        return path


Make = Callable[[AdapterFile], object]


def heads(block: str, names: str = "to_q to_k to_v") -> list[str]:
    return [f"{block}.attn.{name}" for name in names.split()]


_DOUBLE, _SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
_ADDED = "add_q_proj add_k_proj add_v_proj"
_LINEAR1 = [*heads(_SINGLE), f"{_SINGLE}.proj_mlp"]


def _flux_kohya(file: AdapterFile) -> None:
    file.lora("lora_unet_double_blocks_0_img_attn_qkv", heads(_DOUBLE), alpha=2.0)
    file.lora("lora_unet_double_blocks_0_txt_attn_qkv", heads(_DOUBLE, _ADDED), alpha=1.0)
    file.lora("lora_unet_double_blocks_0_txt_mlp_2", f"{_DOUBLE}.ff_context.net.2", alpha=3.0)
    file.lora("lora_unet_double_blocks_0_img_mod_lin", f"{_DOUBLE}.norm1.linear", alpha=3.0)
    file.lora("lora_unet_single_blocks_0_linear1", _LINEAR1, alpha=0.5)
    file.lora("lora_unet_single_blocks_0_modulation_lin", f"{_SINGLE}.norm.linear")
    file.lora("lora_unet_final_layer_adaLN_modulation_1", "norm_out.linear", alpha=1.5, turned=True)


def _flux_original(style: str, prefix: str) -> Make:
    def make(file: AdapterFile) -> None:
        file.lora(f"{prefix}double_blocks.0.img_attn.qkv", heads(_DOUBLE), style)
        file.lora(f"{prefix}double_blocks.0.img_attn.proj", f"{_DOUBLE}.attn.to_out.0", style)
        file.lora(f"{prefix}double_blocks.0.txt_mlp.0", f"{_DOUBLE}.ff_context.net.0.proj", style)
        file.lora(f"{prefix}single_blocks.0.linear1", _LINEAR1, style, alpha=2.0)
        file.lora(f"{prefix}single_blocks.0.linear2", f"{_SINGLE}.proj_out", style)
        file.lora(f"{prefix}vector_in.in_layer", "time_text_embed.text_embedder.linear_1", style)
        file.lora(f"{prefix}final_layer.linear", "proj_out", style)

    return make


def _flux_xlabs(file: AdapterFile) -> None:
    file.lora("double_blocks.0.processor.qkv_lora1", heads(_DOUBLE), "xlabs")
    file.lora("double_blocks.0.processor.qkv_lora2", heads(_DOUBLE, _ADDED), "xlabs")
    file.lora("double_blocks.0.processor.proj_lora1", f"{_DOUBLE}.attn.to_out.0", "xlabs")
    file.lora("double_blocks.0.processor.proj_lora2", f"{_DOUBLE}.attn.to_add_out", "xlabs")
    file.lora("single_blocks.0.processor.qkv", heads(_SINGLE), "old")
    file.lora("single_blocks.0.processor.proj", f"{_SINGLE}.proj_out", "old")


ENDINGS["xlabs"] = (".down.weight", ".up.weight")


def _flux_diffusers(file: AdapterFile) -> None:
    file.lora("transformer.transformer_blocks.0.attn.to_q", f"{_DOUBLE}.attn.to_q", "peft")
    file.lora("transformer.single_transformer_blocks.0.proj_mlp", f"{_SINGLE}.proj_mlp", "peft", alpha=1.0)
    file.lora("transformer.x_embedder", "x_embedder", "peft")


def _flux_mixture(file: AdapterFile) -> None:
    file.lora("lora_transformer_single_transformer_blocks_0_attn_to_k", f"{_SINGLE}.attn.to_k", alpha=1.0)
    file.lora(
        "lora_transformer_time_text_embed_guidance_embedder_linear_2", "time_text_embed.guidance_embedder.linear_2"
    )


_S3DIT = "layers.0.attention"


def _z_names(prefix: str, style: str, join: str = ".") -> Make:
    def name(module: str) -> str:
        return prefix + module.replace(".", join)

    def make(file: AdapterFile) -> None:
        file.lora(name("layers.0.attention.to_q"), f"{_S3DIT}.to_q", style, alpha=2.0)
        file.lora(name("layers.1.attention.to_out.0"), "layers.1.attention.to_out.0", style)
        file.lora(name("noise_refiner.0.feed_forward.w2"), "noise_refiner.0.feed_forward.w2", style)
        file.lora(name("layers.0.adaLN_modulation.0"), "layers.0.adaLN_modulation.0", style)

    return make


def _z_original(prefix: str, style: str, join: str = ".") -> Make:
    def make(file: AdapterFile) -> None:
        qkv = prefix + "layers.0.attention.qkv".replace(".", join)
        file.lora(qkv, [f"{_S3DIT}.{name}" for name in ("to_q", "to_k", "to_v")], style, alpha=1.0)
        file.lora(prefix + "layers.0.attention.out".replace(".", join), f"{_S3DIT}.to_out.0", style)
        file.lora(prefix + "final_layer.linear".replace(".", join), "all_final_layer.2-1.linear", style)

    return make


def _qwen(prefix: str, style: str, join: str = ".", alpha: float | None = None) -> Make:
    def make(file: AdapterFile) -> None:
        for module in (f"{_DOUBLE}.attn.add_q_proj", f"{_DOUBLE}.img_mlp.net.0.proj", f"{_DOUBLE}.txt_mod.1", "img_in"):
            file.lora(prefix + module.replace(".", join), module, style, alpha=alpha)

    return make


_REFINER = "context_embedder.token_refiner.refiner_blocks.0"


def _hunyuan_original(prefix: str, style: str, join: str = ".", alpha: float | None = None) -> Make:
    def make(file: AdapterFile) -> None:
        def lora(name: str, modules: str | Sequence[str], turned: bool = False) -> None:
            file.lora(prefix + name.replace(".", join), modules, style, alpha=alpha, turned=turned)

        lora("double_blocks.0.img_attn_qkv", heads(_DOUBLE))
        lora("double_blocks.0.txt_attn_qkv", heads(_DOUBLE, _ADDED))
        lora("double_blocks.0.img_mlp.fc1", f"{_DOUBLE}.ff.net.0.proj")
        lora("double_blocks.0.txt_mod.linear", f"{_DOUBLE}.norm1_context.linear")
        lora("single_blocks.0.linear1", _LINEAR1)
        lora("single_blocks.0.modulation.linear", f"{_SINGLE}.norm.linear")
        lora("txt_in.individual_token_refiner.blocks.0.self_attn_qkv", heads(_REFINER))
        lora("final_layer.adaLN_modulation.1", "norm_out.linear", turned=True)

    return make


_MIDDLE, _CONVOLUTION = "mid_block.attentions.0", "mid_block.resnets.0.conv1"
_DOWN = "down_blocks.1.attentions.0.transformer_blocks.0"


def _sdxl_kohya(file: AdapterFile) -> None:
    inner = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    file.lora(f"{inner}_attn1_to_q", f"{_DOWN}.attn1.to_q", alpha=1.0)
    file.lora(f"{inner}_ff_net_0_proj", f"{_DOWN}.ff.net.0.proj", alpha=2.0)
    file.lora("lora_unet_mid_block_resnets_0_conv1", "mid_block.resnets.0.conv1", alpha=2.0)
    file.lora("lora_unet_down_blocks_0_downsamplers_0_conv", "down_blocks.0.downsamplers.0.conv")


def _sdxl_original(file: AdapterFile) -> None:
    """Blocks are counted through: with one layer each, 1, 2 | 3, 4 | 5 on the way down, 0, 1 | 2, 3 | 4, 5 up."""
    file.lora("lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k", f"{_DOWN}.attn2.to_k", alpha=1.0)
    file.lora("lora_unet_input_blocks_3_0_emb_layers_1", "down_blocks.1.resnets.0.time_emb_proj")
    file.lora("lora_unet_middle_block_1_proj_in", "mid_block.attentions.0.proj_in")
    file.lora("lora_unet_output_blocks_0_1_proj_out", "up_blocks.0.attentions.0.proj_out", alpha=3.0)
    file.lora("lora_unet_label_emb_0_2", "add_embedding.linear_2")


def _sdxl_peft(file: AdapterFile) -> None:
    file.lora(f"unet.{_DOWN}.attn1.to_out.0", f"{_DOWN}.attn1.to_out.0", "peft")
    file.lora("unet.conv_in", "conv_in", "peft")


def _sdxl_old(file: AdapterFile) -> None:
    file.lora(f"unet.{_DOWN}.attn1.processor.to_v", f"{_DOWN}.attn1.to_v", "old")
    file.lora(f"unet.{_DOWN}.attn1.processor.to_out", f"{_DOWN}.attn1.to_out.0", "old")


_BLOCK = "blocks.1"
_OURS = ("self_attention.qkv", "cross_attention.query")


def _infinity(attention: str, cross: str, prefix: str) -> Make:
    def make(file: AdapterFile) -> None:
        file.lora(f"{prefix}.{attention}", f"{_BLOCK}.self_attention.qkv", "peft")
        file.lora(f"{prefix}.{cross}", f"{_BLOCK}.cross_attention.query", "peft", alpha=6.0)

    return make


CASES: dict[str, tuple[str, Make]] = {
    "flux kohya": ("flux", _flux_kohya),
    "flux original, lora_A": ("flux", _flux_original("peft", "diffusion_model.")),
    "flux original, lora_down": ("flux", _flux_original("kohya", "diffusion_model.")),
    "flux original, bare": ("flux", _flux_original("peft", "")),
    "flux PEFT of the original": ("flux", _flux_original("peft", "base_model.model.")),
    "flux XLabs": ("flux", _flux_xlabs),
    "flux diffusers": ("flux", _flux_diffusers),
    "flux kohya, diffusers' blocks": ("flux", _flux_mixture),
    "flux LoKr": ("flux", lambda file: file.lokr("diffusion_model.double_blocks.0.img_attn.qkv", heads(_DOUBLE), 2.0)),
    "flux LoHa": ("flux", lambda file: file.loha("lora_unet_single_blocks_0_linear1", _LINEAR1)),
    "z-image ComfyUI": ("z-image", _z_names("diffusion_model.", "peft")),
    "z-image musubi": ("z-image", _z_names("lora_unet_", "kohya", "_")),
    "z-image DiffSynth": ("z-image", _z_names("", "diffsynth")),
    "z-image diffusers": ("z-image", _z_names("transformer.", "peft")),
    "z-image dots": ("z-image", _z_names("", "dots")),
    "z-image original": ("z-image", _z_original("diffusion_model.", "peft")),
    "z-image original, musubi": ("z-image", _z_original("lora_unet_", "kohya", "_")),
    "z-image LoKr": ("z-image", lambda file: file.lokr("diffusion_model.layers.0.attention.to_q", [f"{_S3DIT}.to_q"])),
    "z-image LoHa": ("z-image", lambda file: file.loha("lora_unet_layers_0_attention_to_q", [f"{_S3DIT}.to_q"])),
    "qwen-image DiffSynth": ("qwen-image", _qwen("", "diffsynth")),
    "qwen-image ComfyUI": ("qwen-image", _qwen("diffusion_model.", "peft")),
    "qwen-image musubi": ("qwen-image", _qwen("lora_unet_", "kohya", "_", 2.0)),
    "qwen-image bare": ("qwen-image", _qwen("", "kohya")),
    "qwen-image LoKr": ("qwen-image", lambda file: file.lokr("transformer.img_in", ["img_in"], 1.5)),
    "qwen-image LoHa": ("qwen-image", lambda file: file.loha("lora_unet_img_in", ["img_in"])),
    "hunyuan-video original": ("hunyuan-video", _hunyuan_original("", "peft")),
    "hunyuan-video ComfyUI": ("hunyuan-video", _hunyuan_original("diffusion_model.", "peft")),
    "hunyuan-video musubi": ("hunyuan-video", _hunyuan_original("lora_unet_", "kohya", "_", 2.0)),
    "hunyuan-video transformer.": ("hunyuan-video", _hunyuan_original("transformer.", "peft")),
    "hunyuan-video LoKr": (
        "hunyuan-video",
        lambda file: file.lokr("diffusion_model.double_blocks.0.img_attn_qkv", heads(_DOUBLE), 2.0),
    ),
    "hunyuan-video LoHa": ("hunyuan-video", lambda file: file.loha("lora_unet_single_blocks_0_linear1", _LINEAR1)),
    "sdxl kohya": ("sdxl", _sdxl_kohya),
    "sdxl kohya, original names": ("sdxl", _sdxl_original),
    "sdxl diffusers": ("sdxl", _sdxl_peft),
    "sdxl old diffusers": ("sdxl", _sdxl_old),
    "sdxl LoHa": ("sdxl", lambda file: file.loha("lora_unet_mid_block_resnets_0_conv1", [_CONVOLUTION])),
    "sdxl LoKr": (
        "sdxl",
        lambda file: file.lokr("lora_unet_mid_block_attentions_0_proj_in", ["mid_block.attentions.0.proj_in"]),
    ),
    "infinity own names": ("infinity", _infinity(*_OURS, _BLOCK)),
    "infinity PEFT": (
        "infinity",
        _infinity(*_OURS, f"base_model.model.{_BLOCK}"),
    ),
    "infinity LoKr": (
        "infinity",
        lambda file: file.lokr("blocks.1.sa.mat_qkv", [f"{_BLOCK}.self_attention.qkv"], 2.0),
    ),
    "infinity LoHa": (
        "infinity",
        lambda file: file.loha("blocks.1.ca.mat_q", [f"{_BLOCK}.cross_attention.query"]),
    ),
    "infinity published": ("infinity", _infinity("sa.mat_qkv", "ca.mat_q", _BLOCK)),
    "infinity published, chunks": ("infinity", _infinity("sa.mat_qkv", "ca.mat_q", "block_chunks.0.module.1")),
}
"""A family and what makes its file, by what a person would call it."""


WORDS = Classification(families=("flux",), naming="diffusers", kinds=frozenset({"lora"}), modules={"network": 1})


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(shape: Shape, seed: int, rank: int, scale: float = 1.0, strength: float = 0.3) -> Delta:
    """A delta of that rank that is felt and does not drown everything else."""
    down = draw(seed, rank, shape.inputs, *shape.kernel) / prod(shape.weight[1:]) ** 0.5
    tensors = {"down": down, "up": strength * draw(seed + 1, shape.outputs, rank)}
    return Delta("lora", shape, tensors, scale)


def random_adapter(
    network: nn.Module, seed: int, rank: int = 2, *, only: str = "", role: str = "transformer"
) -> Adapter:
    """A LoRA of every layer of a network, or of those whose name has `only` in it."""
    part = {
        name: lora(shape, seed + 10 * index, rank, scale=0.5 + seed % 3)
        for index, (name, shape) in enumerate(shapes_of(network).items())
        if only in name
    }
    return Adapter(f"adapter {seed}", WORDS, {role: part})
