"""What is attached to networks: the same sums by another kernel, on that network alone, and compiled blocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import gesso
from gesso.engine.acceleration import Acceleration
from gesso.engine.attention import BACKENDS
from gesso.engine.loading import load_pipeline
from gesso.engine.loading.accelerate import _set_dispatcher, accelerate
from gesso.errors import RequestError
from gesso.models.attention import Attending
from gesso.request import parse_request
from tests import tiny_flux, tiny_infinity, tiny_z_image

MATH = Acceleration(attention="math")
TINY = {"flux": tiny_flux.tiny_pipeline, "infinity": tiny_infinity.tiny_pipeline, "z-image": tiny_z_image.tiny_pipeline}


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of a channel, of 255."""
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


def active() -> object:
    """What networks of diffusers take that were told nothing."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry.get_active_backend()[0]


def chosen(network: nn.Module) -> set[str]:
    processors = (getattr(layer, "processor", None) for layer in network.modules())
    found = (getattr(processor, "_attention_backend", None) for processor in processors)
    return {backend.value for backend in found if backend is not None}


def kernels(network: nn.Module) -> set[str]:
    return {layer.kernel.__name__ for layer in network.modules() if isinstance(layer, Attending)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", list(TINY))
def test_another_kernel_paints_nearly_the_same(family: str) -> None:
    request = parse_request({"prompt": "a red star", "seed": 7} | ({} if family == "infinity" else {"steps": 2}))
    plain, other = TINY[family](), TINY[family]()
    before, names = active(), list(other.transformer.state_dict())
    results = []
    for pipeline, attention in ((plain, "sdpa"), (other, "math")):

        def load(name: str, device: str, dtype: str | None, made: object = pipeline) -> object:
            return made

        with gesso.Engine(device="cpu", attention=attention, load=load) as engine:  # type: ignore[arg-type]
            results.append(engine.run(request)[0])
    assert [result.metadata["attention"] for result in results] == ["sdpa", "math"]
    assert apart(results[1].image, results[0].image) <= 2
    assert list(other.transformer.state_dict()) == names
    assert active() is before
    assert (chosen(other.transformer) or kernels(other.transformer)) in ({"_native_math"}, {"sdpa_math"})
    assert (chosen(plain.transformer) or kernels(plain.transformer)) in (set(), {"native"}, {"sdpa"})


def test_nothing_else_is_touched_and_it_can_be_taken_back() -> None:
    pipeline = tiny_flux.tiny_pipeline()
    accelerate(pipeline, MATH)
    assert not chosen(pipeline.autoencoder)
    accelerate(pipeline, Acceleration())
    assert chosen(pipeline.transformer) == {"native"}
    own = tiny_z_image.tiny_pipeline()
    accelerate(own, MATH)
    accelerate(own, Acceleration())
    assert kernels(own.transformer) == {"sdpa"}


def unet() -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    heads: Any = (1, 2)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=heads,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return network.eval().requires_grad_(False)


def run_unet(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latent, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return network(latent, torch.tensor([10, 500]), encoder_hidden_states=text).sample


def test_a_u_net_attends_by_what_is_chosen() -> None:
    """diffusers' own processor would go on as before without a word."""
    network = unet()
    plain = run_unet(network)
    accelerate(SimpleNamespace(unet=network), MATH)
    assert chosen(network) == {"_native_math"}
    torch.testing.assert_close(run_unet(network), plain, atol=1e-5, rtol=0)
    accelerate(SimpleNamespace(unet=network), Acceleration())
    assert torch.equal(run_unet(network), plain)


def test_networks_with_masks_get_the_kernel_that_heeds_them() -> None:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )
    backend = replace(BACKENDS[1], plain="native")  # that is, masked: _native_math
    _set_dispatcher(network, backend)
    assert chosen(network) == {"_native_math"}


def test_what_has_no_choice_is_refused() -> None:
    with pytest.raises(RequestError, match='attention "math" is not usable with a SimpleNamespace'):
        accelerate(SimpleNamespace(), MATH)
    with pytest.raises(RequestError, match="usable with Linear; leave it at sdpa"):
        accelerate(SimpleNamespace(transformer=nn.Linear(2, 2)), MATH)
    with pytest.raises(RequestError, match="it names no blocks to compile"):
        accelerate(SimpleNamespace(transformer=nn.Linear(2, 2)), Acceleration(compile=True))
    accelerate(SimpleNamespace(), Acceleration())


def test_the_limit_of_graphs_is_given_where_pytorch_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []

    def newer(model: object = None, *, recompile_limit: int | None = None) -> object:
        given.append({} if recompile_limit is None else {"recompile_limit": recompile_limit})
        return model

    def older(model: object = None) -> object:
        given.append({})
        return model

    for compiler in (newer, older):
        monkeypatch.setattr(torch, "compile", compiler)
        accelerate(tiny_z_image.tiny_pipeline(), Acceleration(compile=True))
    half = len(given) // 2
    assert half and given == [{"recompile_limit": 32}] * half + [{}] * half


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what PyTorch compiles with
@pytest.mark.parametrize(("name", "attention"), [("flux-nano", "sdpa"), ("infinity-nano", "flex")])
def test_compiled_blocks_paint_nearly_the_same(name: str, attention: str) -> None:
    """Twice, of which the second compiles nothing."""
    Acceleration(compile=True).check("cpu")
    fields = {"steps": 2} if name == "flux-nano" else {}
    request = parse_request({"prompt": "a large red circle", "model": name, "seed": 7, **fields})
    pictures = []
    for how in ({}, {"attention": attention, "compile": True}):
        with gesso.Engine(device="cpu", **how) as engine:  # type: ignore[arg-type]
            results = [engine.run(request)[0] for _ in range(2)]
        assert [result.metadata["compiled"] for result in results] == [bool(how)] * 2
        pictures.append([result.image for result in results])
    (eager, _), (compiled, again) = pictures
    assert apart(compiled, eager) <= 2
    assert apart(compiled, again) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what PyTorch compiles with
def test_compiling_leaves_names_alone() -> None:
    pipeline = load_pipeline("infinity-nano", "cpu", acceleration=Acceleration(compile=True))
    plain = load_pipeline("infinity-nano", "cpu")
    assert list(pipeline.transformer.state_dict()) == list(plain.transformer.state_dict())  # type: ignore[attr-defined]
