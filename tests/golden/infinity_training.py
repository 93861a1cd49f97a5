"""Infinity goldens of kinds c (self-correction) and d (training forward, loss, gradients)."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from gesso.models.infinity.checkpoint import blocks_per_chunk, published_transformer_name
from gesso.models.infinity.correction import training_tokens
from gesso.models.infinity.quantizer import from_tokens
from gesso.models.infinity.scales import ScaleSchedule, schedule_of_grids
from gesso.models.infinity.transformer import InfinityTransformer, TextCondition, text_mask
from gesso.training.infinity_loss import bitwise_loss, scale_weights, token_losses
from tests.golden.comparison import Comparison
from tests.golden.infinity_network import TransformerSettings, build_transformer, packed, unpacked
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar, bits_first, grids


class CorrectionSideCar(SideCar):
    noise_apply_layers: int
    noise_apply_strength: float
    noise_apply_requant: int = 1
    apply_spatial_patchify: int = 0
    vae_scale_schedule_thw: list[tuple[int, int, int]]


class TrainingSideCar(SideCar):
    config: TransformerSettings
    scale_schedule_thw: list[tuple[int, int, int]]
    text_lens: list[int]
    cond_drop_uniforms: list[float] | None = None
    cond_dropped: list[bool] | None = None
    loss: float
    loss_bitsum: float | None = None
    loss_reweighted_by_scale: float | None = None
    grad_norm_per_parameter: dict[str, float] = Field(default_factory=dict)
    grad_norm_total: float | None = None


def check_correction(golden: Golden, comparison: Comparison) -> None:
    """Kind c: labels and inputs with the recorded flips, and that the recorded strengths are such as we draw."""
    side_car = golden.view(CorrectionSideCar)
    scales = grids(side_car.vae_scale_schedule_thw)
    patchify = bool(side_car.apply_spatial_patchify)
    noised = max(0, min(side_car.noise_apply_layers, len(scales)))
    flips = [bits_first(golden.tensor(f"s{scale:02d}.flip_mask")) for scale in range(noised)]
    tokens = training_tokens(
        golden.tensor("raw_features"),
        scales,
        flips,
        requantize=bool(side_car.noise_apply_requant),
        patchify=patchify,
    )
    atol = golden.tolerances.get("floats", default=1e-5)
    comparison.equal("gt_labels", tokens.labels_BLK, golden.tensor("gt_labels"))
    comparison.close("x_BLC_wo_prefix", tokens.inputs_BLK, golden.tensor("x_BLC_wo_prefix"), atol)
    factor = 2 if patchify else 1
    token_grids = [(height // factor, width // factor) for height, width in scales]
    labels = tokens.labels_BLK.to(torch.uint8).split([height * width for height, width in token_grids], dim=1)
    for scale, (label, grid) in enumerate(zip(labels, token_grids, strict=True)):
        name = f"s{scale:02d}.gt_bits"
        if name in golden.tensors:
            comparison.equal(name, from_tokens(label, grid, patchify).bool(), bits_first(golden.tensor(name)))
    if "strength_per_scale" in golden.tensors and noised > 0:
        percents = 100 * golden.tensor("strength_per_scale").double()
        whole = bool((percents - percents.round()).abs().max() < 1e-6)
        allowed = bool((percents >= 0).all() and (percents <= 100 * side_car.noise_apply_strength + 1e-6).all())
        comparison.true("strength_per_scale", whole and allowed, "not whole percents up to the strength")


def check_training(golden: Golden, comparison: Comparison) -> None:
    """Kind d: intermediate tensors, logits, losses, the norm of every gradient, and recorded gradients in full."""
    side_car = golden.view(TrainingSideCar)
    if side_car.config.drop_path_rate:
        raise NotYetError("training with random drop path, of which no draw is recorded")
    published = golden.state("state_in")
    network = build_transformer(side_car.config, published)
    schedule = schedule_of_grids(grids(side_car.scale_schedule_thw))
    text = _read_text(golden, comparison, side_car, network)
    seen = _watch_blocks(network)
    inputs, labels = golden.tensor("x_BLC_wo_prefix"), golden.tensor("gt_labels").bool()
    logits = network(inputs, text, network.layout(schedule))
    atol = golden.tolerances.get("logits", default=2e-4)
    comparison.close("logits", logits, golden.tensor("logits"), atol)
    for name, recorded in golden.tensors.items():
        if found := re.fullmatch(r"(block0_input|block0_output|last_block_output)(_first\d+)?", name):
            comparison.close(name, seen[found[1]][:, : recorded.shape[1]], recorded, atol)
    loss = _check_losses(golden, comparison, side_car, schedule, logits, labels)
    loss.backward()
    _check_gradients(golden, comparison, side_car, network, blocks_per_chunk(published))


def _read_text(
    golden: Golden, comparison: Comparison, side_car: TrainingSideCar, network: InfinityTransformer
) -> TextCondition:
    """Condition dropping and everything that is made of text alone."""
    lengths, atol = side_car.text_lens, golden.tolerances.get("logits", default=2e-4)
    features = unpacked(golden.tensor("text_features"), lengths, golden.tensors.get("cu_seqlens_k"))
    uniforms, dropped = side_car.cond_drop_uniforms, side_car.cond_dropped
    if uniforms is not None:
        drawn = [uniform < side_car.config.cond_drop_rate for uniform in uniforms]
        comparison.true("cond_dropped", dropped is None or drawn == dropped, f"{drawn} by the recorded draws")
        dropped = drawn
    if dropped is not None:
        features = network.drop_text(features, torch.tensor(dropped))
    text = network.read_text(features, text_mask(lengths))
    made: dict[str, Callable[[], Tensor]] = {
        "cond_BD": lambda: text.pooled_BC,
        "ca_kv": lambda: packed(network.text_projection(network.text_norm(features)), lengths),
        "shared_gss": lambda: network.shared_modulation(text.pooled_BC),
    }
    for name, make in made.items():
        if name in golden.tensors:
            comparison.close(name, make(), golden.tensor(name), atol)
    return text


def _watch_blocks(network: InfinityTransformer) -> dict[str, Tensor]:
    """Filled while the network runs: what enters the first block and leaves the first and the last."""
    seen: dict[str, Tensor] = {}

    def entering(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen["block0_input"] = arguments[0].detach()

    def leaving(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output.detach()

        return keep

    network.blocks[0].register_forward_pre_hook(entering)
    network.blocks[0].register_forward_hook(leaving("block0_output"))
    network.blocks[-1].register_forward_hook(leaving("last_block_output"))
    return seen


def _check_losses(
    golden: Golden,
    comparison: Comparison,
    side_car: TrainingSideCar,
    schedule: ScaleSchedule,
    logits: Tensor,
    labels: Tensor,
) -> Tensor:
    """The loss that gradients are of; `loss_bitsum` adds over bits where the others average."""
    atol, bits = golden.tolerances.get("loss", default=1e-5), side_car.config.d_vae
    loss = bitwise_loss(logits, labels)
    measured = {
        "loss": (loss, side_car.loss, atol),
        "loss_bitsum": (bits * loss, side_car.loss_bitsum, bits * atol),
        "loss_reweighted_by_scale": (
            bitwise_loss(logits, labels, scale_weights(schedule)),
            side_car.loss_reweighted_by_scale,
            atol,
        ),
    }
    for name, (value, stated, tolerance) in measured.items():
        if name in golden.tensors:
            comparison.close(name, value, golden.tensor(name), tolerance)
        if stated is not None:
            comparison.close(f"{name} (side-car)", value, stated, tolerance)
    if "token_loss" in golden.tensors:
        tolerance = golden.tolerances.get("logits", default=2e-4)
        comparison.close("token_loss", token_losses(logits, labels), golden.tensor("token_loss"), tolerance)
    return loss


def _check_gradients(
    golden: Golden,
    comparison: Comparison,
    side_car: TrainingSideCar,
    network: InfinityTransformer,
    chunk: int | None,
) -> None:
    """By published names. A parameter that had no part in the loss has a gradient of zero."""
    rtol = golden.tolerances.get("gradient", "grad", default=1e-3)
    gradients: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients[published_transformer_name(name, chunk)] = gradient
    norms = side_car.grad_norm_per_parameter
    recorded = {name.removeprefix("grad."): t for name, t in golden.tensors.items() if name.startswith("grad.")}
    if not norms and not recorded:
        raise BrokenGoldenError("no gradient was recorded")
    if norms:
        names = set(norms) ^ set(gradients)
        comparison.true("gradient names", not names, f"on one side only: {sorted(names)[:3]}")
    for name in norms.keys() & gradients.keys():
        comparison.relative(f"|grad.{name}|", gradients[name].norm(), norms[name], rtol)
    for name, gradient in recorded.items():
        if name not in gradients:
            comparison.true(f"grad.{name}", False, "no such parameter")
        else:
            comparison.relative(f"grad.{name}", gradients[name], gradient, rtol)
    if side_car.grad_norm_total is not None:
        total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        comparison.relative("grad_norm_total", total, side_car.grad_norm_total, rtol)
