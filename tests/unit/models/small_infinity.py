"""A small random Infinity for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from gesso.models.infinity.cache import KeyValueCache
from gesso.models.infinity.initialization import InitialScales, initialize
from gesso.models.infinity.scales import ScaleSchedule
from gesso.models.infinity.transformer import InfinityConfig, InfinityTransformer, TextCondition

SCHEDULE = ScaleSchedule(((1, 1), (2, 3), (3, 4)), rotary_grid=(6, 8))
TEXT_WIDTH, BITS = 24, 6


def small_infinity(**switches: object) -> InfinityTransformer:
    """Two blocks with open gates and a head at full strength, so that every part shows in the logits."""
    sizes: dict[str, object] = {"depth": 2, "width": 32, "heads": 2, "bits": BITS, "pool_heads": 2}
    sizes |= {"text_width": TEXT_WIDTH, "text_length": 8, "feed_forward_width": 64}
    torch.manual_seed(0)
    network = InfinityTransformer(InfinityConfig(**(sizes | switches)))  # type: ignore[arg-type]
    initialize(network, InitialScales(head=1.0, modulation=1.0, gate_noise=1.0, gate=1.0))
    return network.eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(
    network: InfinityTransformer,
    inputs_BLK: Tensor,
    text: TextCondition,
    schedule: ScaleSchedule = SCHEDULE,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """Logits of all scales, one after the other over a cache."""
    cache = cache or network.empty_cache(len(inputs_BLK), schedule)
    first = schedule.starts[1]
    logits: list[Tensor] = []
    for scale in range(len(schedule)):
        here = inputs_BLK[:, schedule.starts[scale] - first : schedule.starts[scale + 1] - first] if scale else None
        logits.append(network.step(here, text, schedule, scale, cache))
    return torch.cat(logits, dim=1)
