"""Infinity goldens of kind e: whole generation, scale by scale over the real cache, and the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gesso.models.infinity.autoencoder import Autoencoder, to_uint8
from gesso.models.infinity.cache import KeyValueCache
from gesso.models.infinity.quantizer import codes, enlarge, from_tokens, to_tokens
from gesso.models.infinity.scales import ScaleSchedule, schedule_of_grids
from gesso.models.infinity.transformer import (
    InfinityTransformer,
    LayerGuidance,
    TextCondition,
    text_mask,
)
from gesso.sampling.bits import choose_bits, exponential_noise
from gesso.sampling.guidance import guide
from tests.golden.comparison import Comparison
from tests.golden.infinity_network import GenerationSideCar, build_transformer, unpacked
from tests.golden.infinity_pipeline import check_pipeline
from tests.golden.infinity_tokenizer import build_autoencoder
from tests.golden.side_car import Golden, NotYetError, grids


@dataclass(frozen=True)
class Prompts:
    """Text of the pictures, and (where guidance runs) of the same pictures and their negatives in one batch."""

    alone: TextCondition
    guided: TextCondition | None


def check_generation(golden: Golden, comparison: Comparison) -> None:
    """Kind e: logits, bits, sums and next inputs of every scale; final latent; picture; cached equals uncached."""
    side_car = golden.view(GenerationSideCar)
    if side_car.gt_leak > 0:
        raise NotYetError("generation that begins with given bits")
    schedule = schedule_of_grids(grids(side_car.scale_schedule_thw))
    network = build_transformer(side_car.config, golden.state("state_in"))
    with torch.no_grad():
        prompts = _read_prompts(golden, side_car, network, any(g != 1 for g in side_car.guidance(len(schedule))))
        latent = _generate(golden, comparison, side_car, network, schedule, prompts)
        if "final_latent" in golden.tensors:
            atol = golden.tolerances.get("floats", default=1e-3)
            comparison.close("final_latent", latent, golden.tensor("final_latent"), atol)
        _check_cache(golden, comparison, network, schedule, prompts.alone)
        autoencoder = None
        if side_car.vae_config is not None and (side_car.image_float_stats or _has_picture(golden)):
            prefix = "state." if _tokenizer_lies_elsewhere(golden) else "vae_state."
            autoencoder = build_autoencoder(side_car.vae_config, golden.state("vae_state_in", prefix))
            _check_picture(golden, comparison, side_car, autoencoder, latent)
    check_pipeline(golden, comparison, side_car, network, autoencoder, schedule)


def _has_picture(golden: Golden) -> bool:
    return any(name.startswith("image_") for name in golden.tensors)


def _tokenizer_lies_elsewhere(golden: Golden) -> bool:
    """Whether the tokenizer's weights lie in a golden of their own, not in this one beside the transformer's."""
    return golden.data.get("vae_state_in") is not None or "weights" in golden.data


def _read_prompts(golden: Golden, side_car: GenerationSideCar, network: InfinityTransformer, guided: bool) -> Prompts:
    """Null text takes as many rows as its prompt; negative prompts have lengths of their own."""
    lengths = side_car.text_lens
    positive = unpacked(golden.tensor("text_features"), lengths, golden.tensors.get("cu_seqlens_k"))
    alone = network.read_text(positive, text_mask(lengths))
    if not guided:
        return Prompts(alone, None)
    if side_car.negative_text_lens:
        others = side_car.negative_text_lens
        sums = golden.tensors.get("negative_cu_seqlens_k")
        negative = unpacked(golden.tensor("negative_text_features"), others, sums)
    else:
        others, negative = lengths, network.drop_text(positive, torch.ones(len(positive), dtype=torch.bool))
    both = torch.nn.utils.rnn.pad_sequence([*positive, *negative], batch_first=True)
    return Prompts(alone, network.read_text(both, text_mask([*lengths, *others])))


def _generate(
    golden: Golden,
    comparison: Comparison,
    side_car: GenerationSideCar,
    network: InfinityTransformer,
    schedule: ScaleSchedule,
    prompts: Prompts,
) -> Tensor:
    """Run all scales on our own bits; what each makes is compared. Returns the decoder's input."""
    patchify, batch = network.config.patchify, len(side_car.text_lens)
    final_grid = schedule.latent_grids(patchify)[-1]
    atol = golden.tolerances.get("floats", default=1e-3)
    generator = torch.Generator().manual_seed(side_car.g_seed)
    cache = network.empty_cache(batch * (2 if prompts.guided else 1), schedule)
    latent, inputs = torch.zeros(()), None
    for scale, grid in enumerate(schedule.grids):
        name = f"s{scale:02d}"
        logits = _guided_logits(network, side_car, schedule, prompts, scale, cache, inputs)
        recorded = golden.tensor(f"{name}.bits").bool()
        if f"{name}.logits" in golden.tensors:
            comparison.close(f"{name}.logits", logits, golden.tensor(f"{name}.logits"), atol)
        noise = _noise(golden, f"{name}.exp_noise", logits, generator)
        bits = choose_bits(logits, noise, side_car.top_k, side_car.top_p)
        comparison.equal(f"{name}.bits", bits, recorded)
        bits_BKhw = from_tokens(bits.to(torch.uint8), grid, patchify).bool()
        latent = latent + enlarge(codes(bits_BKhw), final_grid)
        if f"{name}.summed_codes" in golden.tensors:
            comparison.close(f"{name}.summed_codes", latent[:, :, None], golden.tensor(f"{name}.summed_codes"), atol)
        if scale + 1 < len(schedule):
            inputs = to_tokens(enlarge(latent, schedule.latent_grids(patchify)[scale + 1]), patchify)
            if f"{name}.next_input" in golden.tensors:
                comparison.close(f"{name}.next_input", inputs, golden.tensor(f"{name}.next_input"), atol)
    return latent


def _guided_logits(
    network: InfinityTransformer,
    side_car: GenerationSideCar,
    schedule: ScaleSchedule,
    prompts: Prompts,
    scale: int,
    cache: KeyValueCache,
    inputs: Tensor | None,
) -> Tensor:
    """Logits of one scale after temperature and guidance, wherever the guidance is put."""
    guidance = side_car.guidance(len(schedule))[scale]
    temperature = side_car.temperatures(len(schedule))[scale]
    if prompts.guided is None:
        return network.step(inputs, prompts.alone, schedule, scale, cache) / temperature
    layer = side_car.guided_layer
    inside = None
    if layer < 0 and guidance != 1:
        inside = LayerGuidance(network.config.depth + layer, torch.tensor(guidance).view(1, 1, 1))
    doubled = None if inputs is None else torch.cat((inputs, inputs))
    logits = network.step(doubled, prompts.guided, schedule, scale, cache, inside) / temperature
    conditional, unconditional = logits.chunk(2)
    return conditional if layer < 0 or guidance == 1 else guide(conditional, unconditional, guidance)


def _noise(golden: Golden, name: str, logits: Tensor, generator: torch.Generator) -> Tensor:
    """The recorded draw; where none was recorded, the draws of all pictures of the batch, one after the other.

    A greedy golden (top_k 1) has none, and must come out the same with any.
    """
    if name in golden.tensors:
        return golden.tensor(name)
    batch, tokens, width = logits.shape
    return exponential_noise(batch * tokens, width // 2, generator).view(logits.shape)


def _check_cache(
    golden: Golden,
    comparison: Comparison,
    network: InfinityTransformer,
    schedule: ScaleSchedule,
    text: TextCondition,
) -> None:
    """Without guidance, stepping over the cache on the recorded inputs gives what the training forward gives."""
    names = [f"s{scale:02d}.next_input" for scale in range(len(schedule) - 1)]
    if any(name not in golden.tensors for name in names):
        return
    inputs = [golden.tensor(name) for name in names]
    cache = network.empty_cache(len(text.pooled_BC), schedule)
    stepped = [
        network.step(inputs[scale - 1] if scale else None, text, schedule, scale, cache)
        for scale in range(len(schedule))
    ]
    at_once = network(torch.cat(inputs, dim=1), text, network.layout(schedule))
    comparison.close("cached against at once", torch.cat(stepped, dim=1), at_once, 1e-4)


def _check_picture(
    golden: Golden, comparison: Comparison, side_car: GenerationSideCar, autoencoder: Autoencoder, latent: Tensor
) -> None:
    atol = golden.tolerances.get("floats", default=1e-3)
    image = autoencoder.decode(latent)
    pixels = to_uint8(image).flip(-1)
    for name, recorded in golden.tensors.items():
        if name.startswith("image_u8_bgr"):
            crop = pixels[:, : recorded.shape[1], : recorded.shape[2]]
            comparison.close(name, crop, recorded, golden.tolerances.get("uint8", default=1))
        elif name.startswith("image_float"):
            comparison.close(name, image[..., : recorded.shape[-2], : recorded.shape[-1]], recorded, atol)
    measured = {
        "mean": image.mean(),
        "std": image.std(),
        "abs_sum": image.abs().sum(),
        "clamped_fraction": (image.abs() >= 1).float().mean(),
    }
    for name, stated in side_car.image_float_stats.items():
        if name in measured:
            comparison.relative(f"image {name}", measured[name], stated, atol)
