"""Files of every spelling: what modules gain, what is told of what does not fit, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from gesso.adapters.formats.classification import classify
from gesso.adapters.formats.reading import Adapter, read_adapter
from gesso.errors import FileError, GessoError, WeightsError
from gesso.models.infinity.transformer import InfinityTransformer
from tests import tiny_caches, tiny_infinity, tiny_sdxl, tiny_z_image
from tests.adapter_files import CASES, AdapterFile
from tests.tiny_flux import tiny_text, tiny_transformer

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "flux": tiny_transformer,
    "z-image": tiny_z_image.tiny_transformer,
    "qwen-image": tiny_caches.qwen,
    "hunyuan-video": tiny_caches.hunyuan_video,
    "sdxl": tiny_sdxl.tiny_unet,
    "infinity": tiny_infinity.tiny_transformer,
}


@cache
def network_of(family: str) -> nn.Module:
    return NETWORKS[family]()


def read(path: Path, family: str) -> Adapter:
    return read_adapter(path, {"transformer": network_of(family)})


SAYS_FLUX = {"ss_base_model_version": "flux1"}


def flux_file() -> AdapterFile:
    return AdapterFile(network_of("flux")).lora("transformer.proj_out", "proj_out", "peft")


@pytest.mark.parametrize("case", CASES)
def test_every_spelling_changes_the_weights_that_it_means(case: str, tmp_path: Path) -> None:
    family, make = CASES[case]
    file = AdapterFile(network_of(family))
    make(file)
    path = file.write(tmp_path / "adapter.safetensors")
    families = classify(path).families
    assert family in families
    adapter = read(path, family)
    found = adapter.parts["transformer"]
    assert found.keys() == file.gains.keys()
    left_open = [warning for warning in adapter.warnings if "its names leave open" in warning]
    assert len(left_open) == (len(families) > 1)
    # Of another its alpha is nowhere, which is told of.
    assert len(adapter.warnings) == len(left_open) or case == "flux PEFT of the original"
    for module, gain in file.gains.items():
        torch.testing.assert_close(found[module].product(), gain, rtol=1e-4, atol=1e-4)


def test_low_rank_convolutions_between_others_become_one(tmp_path: Path) -> None:
    """lora_mid: a convolution of one by one, one of three by three, and one of one by one."""
    network = network_of("sdxl")
    conv = network.get_submodule("mid_block.resnets.0.conv1")
    assert isinstance(conv, nn.Conv2d)
    name, channels = "lora_unet_mid_block_resnets_0_conv1", conv.in_channels
    down, core, up = torch.randn(3, channels, 1, 1), torch.randn(4, 3, 3, 3), torch.randn(conv.out_channels, 4, 1, 1)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": core, f"{name}.lora_up.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read(tmp_path / "a.safetensors", "sdxl")
    x = torch.randn(1, channels, 5, 5)
    conv2d = nn.functional.conv2d
    expected = conv2d(conv2d(conv2d(x, down), core, padding=1), up)
    found = conv2d(x, adapter.parts["transformer"]["mid_block.resnets.0.conv1"].product(), padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "convolution" in classify(tmp_path / "a.safetensors").kinds


DORA = {
    "flux": ("lora_unet_double_blocks_0_img_mlp_0", "transformer_blocks.0.ff.net.0.proj"),
    "z-image": ("lora_unet_layers_0_feed_forward_w2", "layers.0.feed_forward.w2"),
    "qwen-image": ("lora_unet_transformer_blocks_0_img_mlp_net_2", "transformer_blocks.0.img_mlp.net.2"),
    "hunyuan-video": ("lora_unet_double_blocks_0_img_mlp_fc2", "transformer_blocks.0.ff.net.2"),
    "sdxl": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    ),
    "infinity": ("blocks.1.ffn.fc1", "blocks.1.feed_forward.fc1"),
}


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("family", DORA)
def test_dora_takes_the_direction_of_the_sum_and_its_own_length(family: str, rows: bool, tmp_path: Path) -> None:
    """Rows as PEFT and newer LyCORIS measure them, columns as older LyCORIS does."""
    name, module = DORA[family]
    file = AdapterFile(network_of(family)).lora(name, module, alpha=1.0)
    weight = file.weight(module)
    outputs, inputs = weight.shape
    magnitude = torch.rand(outputs if rows else inputs) + 0.5
    shape = (outputs, 1) if rows else (1, inputs)
    file.tensors[f"{name}.dora_scale"] = magnitude.reshape(shape)
    adapter = read(file.write(tmp_path / "a.safetensors"), family)
    whole = weight + file.gains[module]
    length = (whole**2).sum(1 if rows else 0).sqrt()
    expected = (whole * (magnitude / length)[:, None] if rows else whole * (magnitude / length)) - weight
    delta = adapter.parts["transformer"][module]
    torch.testing.assert_close(delta.added(weight), expected, rtol=1e-4, atol=1e-5)
    assert not adapter.plain
    assert "dora" in adapter.classification.kinds


def test_dora_of_a_fused_layer_and_of_peft(tmp_path: Path) -> None:
    network = network_of("flux")
    file = AdapterFile(network)
    heads = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    file.lora("lora_unet_double_blocks_0_img_attn_qkv", heads)
    file.lora("transformer.proj_out", "proj_out", "peft")
    rows = sum(len(file.weight(head)) for head in heads)
    magnitude = torch.rand(rows)
    file.tensors["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = magnitude[:, None]
    file.tensors["transformer.proj_out.lora_magnitude_vector.weight"] = torch.rand(len(file.weight("proj_out")))
    found = read(file.write(tmp_path / "a.safetensors"), "flux").parts["transformer"]
    second = found[heads[1]].magnitude
    assert second is not None
    assert torch.equal(second[:, 0], magnitude[len(file.weight(heads[0])) :][: len(file.weight(heads[1]))])
    assert found["proj_out"].magnitude is not None


def test_bias_differences_and_biases_of_both_layers(tmp_path: Path) -> None:
    file = flux_file()
    up, outputs = file.tensors["transformer.proj_out.lora_B.weight"], len(file.weight("proj_out"))
    lower, upper = file.draw(len(up[0])), file.draw(outputs)
    file.tensors |= {"transformer.proj_out.lora_A.bias": lower, "transformer.proj_out.lora_B.bias": upper}
    file.tensors["transformer.x_embedder.diff_b"] = file.draw(len(file.weight("x_embedder")))
    found = read(file.write(tmp_path / "a.safetensors"), "flux").parts["transformer"]
    bias_O = found["proj_out"].bias_O
    assert bias_O is not None
    torch.testing.assert_close(bias_O, up @ lower + upper)
    other_O = found["x_embedder"].bias_O
    assert other_O is not None
    assert torch.equal(other_O, file.tensors["transformer.x_embedder.diff_b"])
    assert not found["x_embedder"].product().any()


def test_text_encoders_of_both_spellings_and_what_has_no_encoder_here(tmp_path: Path) -> None:
    """T5's are in transformers' spelling; a part that the model was not given is told of."""
    text = tiny_text()
    roles = {"transformer": network_of("flux"), "text_encoder": text.clip, "text_encoder_2": text.t5}
    clip = next(name for name, _ in text.clip.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    t5 = next(name for name, _ in text.t5.named_modules() if name.endswith("block.0.layer.0.SelfAttention.q"))
    small, large = AdapterFile(text.clip), AdapterFile(text.t5, seed=50)
    small.lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", clip, alpha=1.0)
    large.lora("lora_te3_" + t5.replace(".", "_"), t5)
    file = flux_file()
    file.metadata = SAYS_FLUX
    file.tensors |= small.tensors | large.tensors
    path = file.write(tmp_path / "a.safetensors")
    parts = read_adapter(path, roles).parts
    torch.testing.assert_close(parts["text_encoder"][clip].product(), small.gains[clip])
    torch.testing.assert_close(parts["text_encoder_2"][t5].product(), large.gains[t5])
    (warning,) = read(path, "flux").warnings
    assert warning.startswith("2 of 3 modules of a.safetensors are not in this model and have no effect: lora_te1_text")


def test_alpha_from_what_peft_wrote_beside_the_tensors(tmp_path: Path) -> None:
    file = flux_file().lora("transformer.x_embedder", "x_embedder", "peft")
    settings = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"x_embedder": 12}}
    file.metadata = {"lora_adapter_metadata": json.dumps(settings)}
    found = read(file.write(tmp_path / "a.safetensors"), "flux").parts["transformer"]
    assert (found["proj_out"].scale, found["x_embedder"].scale) == (2.0, 4.0)
    file.metadata = {"lora_adapter_metadata": json.dumps(settings | {"transformer.use_rslora": True})}
    found = read(file.write(tmp_path / "b.safetensors"), "flux").parts["transformer"]
    assert found["proj_out"].scale == pytest.approx(6 / 3**0.5)
    file.metadata = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 99} | settings)}
    found = read(file.write(tmp_path / "c.safetensors"), "flux").parts["transformer"]
    assert (found["proj_out"].scale, found["x_embedder"].scale) == (2.0, 4.0)  # each part has an alpha of its own


def test_a_module_that_is_said_twice_counts_once(tmp_path: Path) -> None:
    file = AdapterFile(network_of("z-image"))
    file.lora("layers.0.attention.qkv", [f"layers.0.attention.{name}" for name in ("to_q", "to_k", "to_v")], "dots")
    file.lora("layers.0.attention.to_q", "layers.0.attention.to_q", "dots")
    adapter = read(file.write(tmp_path / "a.safetensors"), "z-image")
    found = adapter.parts["transformer"]
    torch.testing.assert_close(found["layers.0.attention.to_q"].product(), file.gains["layers.0.attention.to_q"])
    torch.testing.assert_close(found["layers.0.attention.to_v"].product(), file.gains["layers.0.attention.to_v"])
    assert adapter.warnings == ("a.safetensors says 1 modules twice; once is used: layers.0.attention.qkv",)


def test_what_has_no_place_is_named_unless_it_is_zero(tmp_path: Path) -> None:
    file = flux_file()
    file.metadata = SAYS_FLUX
    file.tensors["lora_unet_double_blocks_0_img_norm.diff"] = torch.zeros(4)
    assert read(file.write(tmp_path / "a.safetensors"), "flux").warnings == ()
    file.tensors["lora_unet_double_blocks_0_img_norm.diff"] = torch.ones(4)
    file.tensors["transformer.transformer_blocks.7.attn.to_q.lora_A.weight"] = torch.ones(1, 4)
    file.tensors["transformer.transformer_blocks.7.attn.to_q.lora_B.weight"] = torch.ones(4, 1)
    file.tensors["something.else"] = torch.ones(4)
    first, second = read(file.write(tmp_path / "b.safetensors"), "flux").warnings
    assert first.startswith("2 of 3 modules of b.safetensors are not in this model and have no effect: ")
    assert "transformer.transformer_blocks.7.attn.to_q" in first
    assert second == "1 tensors of b.safetensors are of no known kind: something.else"


def test_a_second_kind_of_tensor_on_one_module_is_told_of(tmp_path: Path) -> None:
    file = flux_file()
    file.metadata = SAYS_FLUX
    file.tensors["transformer.proj_out.diff"] = torch.zeros_like(file.weight("proj_out"))
    assert read(file.write(tmp_path / "a.safetensors"), "flux").warnings == ()
    file.tensors["transformer.proj_out.diff"] += 1
    file.tensors["transformer.proj_out.lokr_w1"] = torch.ones(2, 2)
    adapter = read(file.write(tmp_path / "b.safetensors"), "flux")
    torch.testing.assert_close(adapter.parts["transformer"]["proj_out"].product(), file.gains["proj_out"])
    (warning,) = adapter.warnings
    assert warning.startswith("2 tensors of b.safetensors are of a second kind on one module and have no effect: ")
    assert "transformer.proj_out (diff)" in warning and "transformer.proj_out (lokr_w1)" in warning


def test_a_family_that_names_leave_open_is_told_of(tmp_path: Path) -> None:
    """A LoRA of some blocks that FLUX and HunyuanVideo call alike, unless its metadata says whose it is."""
    for family in ("flux", "hunyuan-video"):
        file = AdapterFile(network_of(family))
        file.lora("transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q", "peft")
        file.lora("transformer.single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_mlp", "peft")
        (warning,) = read(file.write(tmp_path / "a.safetensors"), family).warnings
        left_open = "a.safetensors is for flux or hunyuan-video, which its names leave open"
        assert warning == f"{left_open}; it is used as one for {family}"
        file.metadata = {"ss_base_model_version": family}
        assert read(file.write(tmp_path / "b.safetensors"), family).warnings == ()


def _in_chunks(network: nn.Module, places: dict[str, int]) -> AdapterFile:
    """A LoRA of queries in blocks under the published names, each with the number of the block that it is here."""
    file = AdapterFile(network)
    for place, block in places.items():
        file.lora(f"{place}.ca.mat_q", f"blocks.{block}.cross_attention.query", "peft")
    return file


def test_chunks_are_counted_only_where_all_of_them_are_named(tmp_path: Path) -> None:
    """Four blocks in two chunks: the first of each is block 0 and block 2, which their names alone do not say."""
    network = InfinityTransformer(replace(tiny_infinity.NETWORK, depth=4))
    places = {"block_chunks.0.module.0": 0, "block_chunks.1.module.0": 2}
    some = _in_chunks(network, places).write(tmp_path / "some.safetensors")
    with pytest.raises(FileError, match=r"names 2 chunks of 1 blocks, .+ of 4 blocks here; give its blocks"):
        read_adapter(some, {"transformer": network})
    file = _in_chunks(network, places | {"block_chunks.1.module.1": 3})
    adapter = read_adapter(file.write(tmp_path / "enough.safetensors"), {"transformer": network})
    for module, gain in file.gains.items():
        torch.testing.assert_close(adapter.parts["transformer"][module].product(), gain)
    assert adapter.modules == 3 and adapter.warnings == ()


BROKEN: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "nan": ({"lora_A.weight": torch.tensor([[float("nan")]])}, "NaN or infinity in transformer.proj_out.lora_A.weight"),
    "rank 0": ({"lora_A.weight": torch.zeros(0, 8), "lora_B.weight": torch.zeros(8, 0)}, "has rank 0"),
    "half": ({"lora_B.weight": None}, "transformer.proj_out lacks up, and has down"),
    "ranks": ({"lora_A.weight": torch.zeros(5, 8)}, "ranks differ"),
    "alpha": ({"alpha": torch.tensor([1.0, 2.0])}, "alpha is not one finite number"),
    "infinite alpha": ({"alpha": torch.tensor(float("inf"))}, "NaN or infinity in transformer.proj_out.alpha"),
    "shape": ({"lora_A.weight": torch.zeros(3, 7)}, "1 wrong shape (transformer.proj_out: file "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changes, message = BROKEN[case]
    file = flux_file()
    for ending, tensor in changes.items():
        name = f"transformer.proj_out.{ending}"
        file.tensors.pop(name, None)
        if tensor is not None:
            file.tensors[name] = tensor
    with pytest.raises(WeightsError) as error:
        read(file.write(tmp_path / "a.safetensors"), "flux")
    assert message in str(error.value)


def test_files_for_other_models_are_refused_by_name(tmp_path: Path) -> None:
    flux = flux_file().lora("transformer.x_embedder", "x_embedder", "peft")
    flux.lora("transformer.single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_mlp", "peft")
    path = flux.write(tmp_path / "flux.safetensors")
    with pytest.raises(FileError, match="is for flux or hunyuan-video, not for sdxl; choose one made for sdxl"):
        read(path, "sdxl")
    old = {f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_{end}.weight": tensor
           for end, tensor in (("down", torch.ones(2, 768)), ("up", torch.ones(8, 2)))}  # fmt: skip
    save_file(old, tmp_path / "old.safetensors")
    with pytest.raises(FileError, match="is for Stable Diffusion 1, not for sdxl"):
        read(tmp_path / "old.safetensors", "sdxl")
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 8)}, tmp_path / "wan.safetensors")
    with pytest.raises(FileError, match="is for Wan, not for flux"):
        read(tmp_path / "wan.safetensors", "flux")
    nothing = {"foo.bar.lora_A.weight": torch.ones(2, 8), "foo.bar.lora_B.weight": torch.ones(8, 2)}
    save_file(nothing, tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match=r"none of its 1 modules is in this flux \(foo.bar\); by its names"):
        read(tmp_path / "nothing.safetensors", "flux")
    save_file({"model.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="holds no adapter that is known"):
        read(tmp_path / "model.safetensors", "flux")


def test_a_control_lora_is_called_so(tmp_path: Path) -> None:
    file = flux_file()
    width = file.weight("x_embedder").shape
    file.tensors["transformer.x_embedder.lora_A.weight"] = torch.ones(2, 2 * width[1])
    file.tensors["transformer.x_embedder.lora_B.weight"] = torch.ones(width[0], 2)
    with pytest.raises(FileError, match="is a control LoRA"):
        read(file.write(tmp_path / "a.safetensors"), "flux")


_FIELDS = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.bias", "lora_B.bias", "alpha", "dora_scale",
    "diff", "diff_b", "lora_magnitude_vector", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
_MODULES = ("proj_out", "double_blocks.0.img_attn.qkv", "x_embedder", "final_layer.adaLN_modulation.1")
_SHAPES = (
    st.lists(st.sampled_from((0, 1, 2, 8, 16, 32, 96)), max_size=5)
    .filter(lambda shape: prod(shape) <= 1 << 20)  # 96 to the fifth would be 32 GB
    .map(tuple)
)


@settings(max_examples=50)
@given(module=st.sampled_from(_MODULES), fields=st.dictionaries(st.sampled_from(_FIELDS), _SHAPES, max_size=6))
def test_tensors_of_any_shape_make_an_adapter_or_one_line(module: str, fields: dict[str, tuple[int, ...]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file({f"{module}.{field}": torch.ones(shape) for field, shape in fields.items()}, path)
        parts = {}
        with suppress(GessoError):
            parts = read(path, "flux").parts["transformer"]
        for delta in parts.values():
            weight = torch.ones(delta.shape.weight)
            assert delta.added(weight).shape == weight.shape


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path: Path) -> None:
    """The file's first bytes are then 80 02."""
    file = flux_file()
    length = len(file.write(tmp_path / "a.safetensors").read_bytes()) - sum(t.nbytes for t in file.tensors.values()) - 8
    file.metadata = {"": "x" * (0x280 - length - len('"__metadata__":{"":""},'))}
    path = file.write(tmp_path / "a.safetensors")
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read(path, "flux").modules == 1


def test_numbers_of_few_bits_are_read(tmp_path: Path) -> None:
    file = flux_file()
    file.tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in file.tensors.items()}
    delta = read(file.write(tmp_path / "a.safetensors"), "flux").parts["transformer"]["proj_out"]
    assert delta.tensors["down"].dtype == torch.bfloat16


def test_a_copy_elsewhere_shares_what_was_shared(tmp_path: Path) -> None:
    file = AdapterFile(network_of("flux"))
    CASES["flux kohya"][1](file)
    adapter = read(file.write(tmp_path / "a.safetensors"), "flux")
    copy = adapter.to("cpu", torch.bfloat16)
    assert copy.nbytes * 2 == adapter.nbytes
    heads = [copy.parts["transformer"][f"transformer_blocks.0.attn.{name}"] for name in ("to_q", "to_k")]
    assert heads[0].tensors["down"] is heads[1].tensors["down"]
