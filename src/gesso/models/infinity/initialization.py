"""How a new Infinity transformer starts. Source: the published training code's settings (`facts`, training.init)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from gesso.models.infinity.transformer import Block, InfinityTransformer


@dataclass(frozen=True, kw_only=True)
class InitialScales:
    """Factors on the plain normal start; the defaults are the published ones.

    `gate` is the mean that gates start from: published networks start with closed gates (0), small ones learn sooner
    with open ones (1).
    """

    head: float = 0.02
    modulation: float = 1e-3
    gate_noise: float = 5e-6
    gate: float = 0.0
    null_text: float = 1.2


@torch.no_grad()
def initialize(network: InfinityTransformer, scales: InitialScales | None = None) -> None:
    """Fill all parameters from torch's global generator, in order of definition."""
    scales = scales or InitialScales()
    config = network.config
    deviation = math.sqrt(1 / (3 * config.width))
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
    nn.init.normal_(network.null_text, std=scales.null_text / math.sqrt(config.text_width))
    for parameter in (network.start, network.pool.query):
        nn.init.normal_(parameter, std=deviation)
    network.pool.value_bias.zero_()
    network.head.weight.mul_(scales.head)
    network.head_modulation.weight.mul_(scales.modulation)
    for block in network.blocks:
        assert isinstance(block, Block)
        _initialize_block(block, config.depth, config.width, scales)


def _initialize_block(block: Block, depth: int, width: int, scales: InitialScales) -> None:
    for out in (block.self_attention.out, block.cross_attention.out, block.feed_forward.fc2):
        out.weight.mul_(1 / math.sqrt(2 * depth))
    block.self_attention.log_scale.fill_(math.log(4))
    for bias in (block.self_attention.query_bias, block.self_attention.value_bias, block.cross_attention.value_bias):
        bias.zero_()
    nn.init.normal_(block.modulation, std=1 / math.sqrt(width))
    block.modulation[:, :, :2] = block.modulation[:, :, :2] * scales.gate_noise + scales.gate
    block.modulation[:, :, 2:] *= scales.modulation
