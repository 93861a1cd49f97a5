"""Which tokens of a feed-forward stay fresh between full steps: ToCa (arXiv:2410.05317), DuCa (arXiv:2412.18911),
random.

Pure functions: a score for every token, how many are taken at a step of a layer, and the indices. Not here: the calls
that are cut down to these tokens (`sites`), clusters (`policy_clusters`), schedules (`policy_interval`).
Shapes: B rows, n tokens, k fresh ones, D width.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.cache_settings import RatioSchedule

_CELL = 2  # tokens along the edge of the cells whose best token gets a bonus
_MODULES = (1 - 0.4 * 2.5, 1 + 0.6 * 2.5)  # what attention and feed-forward get of a ratio, in the schedules by layer
_BY_LAYER = {"linear-layerwise": (0.4, 0.8), "ToCa-ddim50": (2.0, -0.2), "ToCa-ddpm250": (0.4, 0.8)}
"""Weights of step and layer."""


def fresh_ratio(
    schedule: RatioSchedule, base: float, *, remaining: float, depth: float, attention: bool = False
) -> float:
    """Share of tokens that a module computes; may leave 0 to 1, and is clamped where it is used.

    `remaining` is the share of steps still to come, 1 at first (steps count down, as published); `depth` is the layer's
    place from 0 to 1. Source: `fresh_ratio_scheduler` of ToCa.
    """
    if schedule == "constant":
        return base
    if schedule == "linear":
        return base * (1 + 0.9 - 2 * 0.9 * remaining)
    if schedule == "exp":
        return base * 0.9**remaining
    by_step, by_layer = _BY_LAYER[schedule]
    step_factor = 1 + by_step - 2 * by_step * remaining
    layer_factor = 1 + by_layer - 2 * by_layer * depth
    return base * layer_factor * step_factor * _MODULES[0 if attention else 1]


def stream_ratio(base: float, layer: int, *, single: bool) -> float:
    """The share in the published ports for FLUX and HunyuanVideo, whose depth is counted in DiT's 28 layers."""
    return base * (1.5 - layer / 27) * (1.6 if single else 0.4)


def attention_score(received_Bn: Tensor) -> Tensor:
    """From the attention that each token receives (column sums of the map), normalised to length 1, `[B,n]`."""
    return F.normalize(received_Bn.float(), dim=-1)


def norm_score(tokens_BnD: Tensor) -> Tensor:
    """From the length of each token's features, normalised as `attention_score`."""
    return F.normalize(tokens_BnD.float().norm(dim=-1), dim=-1)


@torch.compiler.disable(recursive=True)  # it would warn of every call here that it cannot trace
def random_score(rows: int, tokens: int, seed: int, *place: object) -> Tensor:
    """Uniform numbers `[rows, tokens]` that depend on the seed and the place (step, branch, module) alone."""
    text = ":".join(str(part) for part in (seed, *place))
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    return torch.rand(rows, tokens, generator=generator)


def aged(score_Bn: Tensor, age_Bn: Tensor, weight: float, interval: int) -> Tensor:
    """The score, raised by how many steps ago a token was last computed."""
    return score_Bn + weight * age_Bn.to(score_Bn) / interval


def with_bonus(score_Bn: Tensor, bonus: float, grid: tuple[int, int]) -> Tensor:
    """The best token of each 2 x 2 cell of a picture of `grid` (rows, columns) gets `bonus` of its score on top.

    Odd rows and columns at the end are cells by themselves.
    """
    rows, columns = grid
    score_B1hw = score_Bn.unflatten(-1, (rows, columns))[:, None]
    padded_B1hw = F.pad(score_B1hw, (0, columns % _CELL, 0, rows % _CELL), value=-torch.inf)
    _, best_B1hw = F.max_pool2d(padded_B1hw, _CELL, return_indices=True)
    index_Bk = best_B1hw.flatten(1)
    width = columns + columns % _CELL
    index_Bk = index_Bk // width * columns + index_Bk % width
    return score_Bn.scatter_add(-1, index_Bk, bonus * score_Bn.gather(-1, index_Bk))


def select(score_Bn: Tensor, ratio: float) -> Tensor:
    """Indices `[B,k]` of the highest scores, best first; k is the clamped ratio of all, rounded down."""
    count = int(min(max(ratio, 0.0), 1.0) * score_Bn.shape[-1])
    return score_Bn.argsort(dim=-1, descending=True, stable=True)[:, :count]


def age_after(age_Bn: Tensor, index_Bk: Tensor) -> Tensor:
    """One step older, but for the fresh tokens."""
    return (age_Bn + 1).scatter(-1, index_Bk, 0)


def take(tokens_BnD: Tensor, index_Bk: Tensor) -> Tensor:
    """These tokens, `[B,k,D]`."""
    return tokens_BnD.gather(1, _wide(index_Bk, tokens_BnD))


def put(tokens_BnD: Tensor, index_Bk: Tensor, fresh_BkD: Tensor) -> Tensor:
    """A copy with these tokens replaced."""
    return tokens_BnD.scatter(1, _wide(index_Bk, tokens_BnD), fresh_BkD.to(tokens_BnD))


def _wide(index_Bk: Tensor, tokens_BnD: Tensor) -> Tensor:
    return index_Bk[..., None].expand(-1, -1, tokens_BnD.shape[-1])
