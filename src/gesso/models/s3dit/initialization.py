"""How a new S3-DiT starts: every modulated block as the identity, the output as zero (adaLN-Zero, arXiv:2212.09748)."""

from __future__ import annotations

import torch
from torch import nn

from gesso.models.s3dit.layers import Block, FinalLayer
from gesso.models.s3dit.transformer import S3DiT


@torch.no_grad()
def initialize(network: S3DiT) -> None:
    """Fill all parameters from torch's global generator, in order of definition."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if name.startswith("t_embedder"):
                nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
    for name, parameter in network.named_parameters():
        if name.endswith("pad_token"):
            nn.init.normal_(parameter, std=0.02)
    for module in network.modules():
        if isinstance(module, Block | FinalLayer) and module.adaLN_modulation is not None:
            for layer in module.adaLN_modulation.children():
                if isinstance(layer, nn.Linear):
                    nn.init.zeros_(layer.weight)
        if isinstance(module, FinalLayer):
            nn.init.zeros_(module.linear.weight)
