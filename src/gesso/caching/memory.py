"""How much a step cache will hold, said before anything runs: for `gesso plan`, and to refuse what does not fit.

Not here: what is held while it runs (`store`).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from gesso.cache_settings import CacheSettings
from gesso.caching.placement import Stream, matching, table_of
from gesso.caching.policy_choice import Policy
from gesso.caching.sites_layout import policy_for, slots_of


def expected_bytes(
    network: nn.Module,
    settings: CacheSettings,
    *,
    image_tokens: int,
    text_tokens: int,
    output: tuple[int, ...],
    branches: int,
    dtype: torch.dtype,
) -> int:
    """Most bytes of features that one run keeps: every order of every site, for so many guidance branches.

    Tokens are those inside the network, padding included; `output` is the shape of what the network returns for one
    sample; `dtype` is that of its features. The network may be on the meta device. Raises RequestError as `attach`
    does.
    """
    policy = policy_for(network, settings)
    element = (dtype if policy.settings.store_dtype is None else getattr(torch, policy.settings.store_dtype)).itemsize
    tokens: dict[Stream, int] = {"image": image_tokens, "text": text_tokens, "joint": image_tokens + text_tokens}
    streams = table_of(network).block_output
    match policy.settings.granularity:
        case "trunk":
            numbers = prod(output)
        case "block":
            numbers = tokens["image" if "image" in streams else streams[0]] * _width(network)
        case _:
            numbers = _width(network) * sum(
                tokens[stream]
                for slot in slots_of(network, policy)
                for _ in matching(network, slot.pattern)
                for stream in slot.streams
            )
    entries = _entries(policy) + policy.probes  # which keep the first blocks' residual as well
    return numbers * entries * branches * element


def _entries(policy: Policy) -> int:
    """Tensors of a ladder at its highest."""
    rule, smoothing = policy.rule, policy.rule.smoothing
    if smoothing is None:
        return rule.order + 1
    orders = max(rule.order, 1) if smoothing.form != "filter" else rule.order
    window = smoothing.form != "as_run" and (
        rule.order > 1 if smoothing.hybrid else smoothing.form == "documented" or smoothing.method == "moving_average"
    )
    return orders + 1 + window


def _width(network: nn.Module) -> int:
    """Features of a token inside the network."""
    config: Any = network.config
    return config.dim if hasattr(config, "dim") else config.num_attention_heads * config.attention_head_dim
