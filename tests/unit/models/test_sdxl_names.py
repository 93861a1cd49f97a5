"""Names of single files against diffusers' own conversion, at full size and small; and what the UNet costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gesso.models import sdxl_checkpoint, sdxl_cost
from gesso.models.diffusers_parts import unet_2d_condition
from gesso.models.sdxl_checkpoint import PREFIXES
from gesso.models.sdxl_text import ENCODERS, SdxlText, kinds
from gesso.models.transformers_parts import read_network
from gesso.weights.diffusers_layout import load_autoencoder, load_network
from gesso.weights.sdxl_file import CONFIGURATIONS, REFINER
from tests.tiny_sdxl import original_tensors, tiny_pipeline, tiny_refiner, tiny_unet

REFINER_PARAMETERS = 2_259_526_660  # half as many as the published file of float16 has bytes
PARAMETERS = {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
TENSORS = 2513  # of a published file, less the two that no network needs


@pytest.fixture(scope="module")
def full_size() -> dict[str, Any]:
    """SDXL's own networks by part, without numbers."""
    texts = {
        part: read_network(kind, CONFIGURATIONS / part, torch.bfloat16, weights=False)
        for part, kind in zip(ENCODERS, kinds()[:2], strict=True)
    }
    unet = load_network(CONFIGURATIONS / "unet", unet_2d_condition(), torch.bfloat16, weights=False)
    return {"unet": unet, "vae": load_autoencoder(CONFIGURATIONS, torch.float32, weights=False), **texts}


@pytest.fixture(scope="module")
def refiner() -> Any:
    """SDXL's own refiner, without numbers."""
    return load_network(REFINER / "unet", unet_2d_condition(), torch.bfloat16, weights=False)


def converted(part: str, network: Any, file: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers makes of a file's tensors for one part."""
    if part == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(dict(file), network.config)
    if part == "vae":
        return single_file_utils.convert_ldm_vae_checkpoint(dict(file), network.config)
    if part == "text_encoder":
        found = single_file_utils.convert_ldm_clip_checkpoint(dict(file))
        plain = not any(name.startswith("text_model.") for name in network.state_dict())
        found = {name.removeprefix("text_model.") if plain else name: value for name, value in found.items()}
    else:
        found = single_file_utils.convert_open_clip_checkpoint(network, dict(file), prefix=PREFIXES[part])
    return {name: value for name, value in found.items() if not name.endswith("position_ids")}


def test_the_configurations_at_hand_are_sdxls(full_size: dict[str, Any]) -> None:
    counts = {part: sum(each.numel() for each in network.parameters()) for part, network in full_size.items()}
    assert counts == PARAMETERS


def test_names_at_full_size_map_one_to_one(full_size: dict[str, Any]) -> None:
    file: dict[str, Tensor] = {}
    for part, network in full_size.items():
        state = network.state_dict()
        for name, place in sdxl_checkpoint.places(part, network).items():
            shape = tuple(state[name].shape)
            assert place.name not in file or place.third is not None
            shape = (3 * shape[0], *shape[1:]) if place.third is not None else shape
            shape = shape[::-1] if place.turned else shape
            matrix = ".mid.attn_1." in place.name and len(shape) == 2
            file[place.name] = torch.empty((*shape, 1, 1) if matrix else shape, device="meta")
    assert len(file) == TENSORS
    for part, network in full_size.items():
        shapes = {name: value.shape for name, value in converted(part, network, file).items()}
        assert shapes == {name: value.shape for name, value in network.state_dict().items()}


def test_the_refiner_is_published_likewise(refiner: Any) -> None:
    state = refiner.state_dict()
    assert sum(each.numel() for each in state.values()) == REFINER_PARAMETERS
    places = sdxl_checkpoint.places("unet", refiner)
    file = {place.name: torch.empty(state[name].shape, device="meta") for name, place in places.items()}
    assert len(file) == len(state)
    shapes = {name: value.shape for name, value in converted("unet", refiner, file).items()}
    assert shapes == {name: value.shape for name, value in state.items()}


def test_values_are_those_that_diffusers_converts() -> None:
    pipeline = tiny_pipeline()
    text, file = pipeline.text, original_tensors(pipeline)
    assert isinstance(text, SdxlText)
    networks: dict[str, nn.Module] = {"unet": pipeline.unet, "vae": pipeline.autoencoder}
    networks |= {"text_encoder": text.small, "text_encoder_2": text.large}
    # OpenCLIP's projection is square; where it is not, diffusers cuts thirds at the wrong rows.
    square = file["conditioner.embedders.1.model.text_projection"]
    file["conditioner.embedders.1.model.text_projection"] = square.new_zeros(len(square), len(square))
    for part, network in networks.items():
        found, wanted = converted(part, network, file), network.state_dict()
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            assert name == "text_projection.weight" or torch.equal(found[name], value)


def evaluation_flops(unet: Any, height: int, width: int, sizes: int) -> float:
    config = unet.config
    numbers: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    pooled = config["projection_class_embeddings_input_dim"] - sizes * config["addition_time_embed_dim"]
    added = {"text_embeds": torch.empty(1, pooled, **numbers), "time_ids": torch.empty(1, sizes, device="meta")}
    text = torch.empty(1, 77, config["cross_attention_dim"], **numbers)
    with FlopCounterMode(display=False) as counter:
        unet(
            torch.empty(1, 4, height, width, **numbers),
            torch.ones(1, device="meta"),
            encoder_hidden_states=text,
            added_cond_kwargs=added,
        )
    return counter.get_total_flops()


def test_cost_is_counted_to_the_operation(full_size: dict[str, Any], refiner: Any) -> None:
    small: Any = nn.Module.to(tiny_unet(), "meta", torch.bfloat16)
    other: Any = nn.Module.to(tiny_refiner().unet, "meta", torch.bfloat16)
    counts = ((full_size["unet"], 104, 152, 6), (small, 12, 8, 6), (small, 9, 11, 6))
    for unet, height, width, sizes in (*counts, (refiner, 104, 152, 5), (other, 9, 11, 5)):
        counted = evaluation_flops(unet, height, width, sizes)
        assert sdxl_cost.unet_flops(unet.config, height, width, 77) == pytest.approx(counted, rel=1e-9)
