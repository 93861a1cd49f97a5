"""ClusCa (arXiv:2509.10312): tokens are clustered on full steps; between them one token a cluster is computed, and
shared.

Pure functions. The published code has defects, which `original` repeats: an empty cluster is sent to zero, where few
tokens are, and computes token 0, which then counts twice in its own cluster.
Not here: the calls that are cut down (`sites`), the same for single tokens (`policy_tokens`).
Shapes: B rows, n tokens, K clusters, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.caching.policy_tokens import put, take

_CLOSE = 1e-4


def cluster(
    tokens_BnD: Tensor, start_BKD: Tensor, iterations: int = 10, *, original: bool = False
) -> tuple[Tensor, Tensor]:
    """k-means by absolute distance: labels `[B,n]` and centroids `[B,K,D]`.

    An empty cluster keeps its centroid; in the published code it is sent to zero. Stops where centroids stay within
    1e-4 of their size; labels belong to the centroids before the last update.
    """
    tokens_BnD, centroid_BKD = tokens_BnD.float(), start_BKD.float()
    label_Bn = torch.zeros(tokens_BnD.shape[:2], dtype=torch.int64, device=tokens_BnD.device)
    for _ in range(iterations):
        before_BKD = centroid_BKD
        label_Bn = torch.cdist(tokens_BnD, before_BKD, p=1).argmin(dim=-1)
        member_BnK = F.one_hot(label_Bn, before_BKD.shape[1]).to(tokens_BnD)
        count_BK1 = member_BnK.sum(dim=1)[..., None]
        centroid_BKD = member_BnK.transpose(1, 2) @ tokens_BnD / count_BK1.clamp_min(1)
        if not original:
            centroid_BKD = torch.where(count_BK1 > 0, centroid_BKD, before_BKD)
        if torch.allclose(before_BKD, centroid_BKD, rtol=_CLOSE):
            break
    return label_Bn, centroid_BKD


def first_centroids(tokens_BnD: Tensor, weight_Bn: Tensor, clusters: int) -> Tensor:
    """The tokens with the largest weights, `[B,K,D]`; no more clusters than tokens."""
    index_BK = weight_Bn.argsort(dim=-1, descending=True, stable=True)[:, :clusters]
    return take(tokens_BnD, index_BK.to(tokens_BnD.device))


def representatives(label_Bn: Tensor, weight_Bn: Tensor, clusters: int) -> Tensor:
    """Of each cluster the token with the largest weight, `[B,K]`; of an empty one token 0."""
    member_BKn = label_Bn[:, None] == torch.arange(clusters, device=label_Bn.device)[:, None]
    return weight_Bn[:, None].expand_as(member_BKn).masked_fill(~member_BKn, -torch.inf).argmax(dim=-1)


def shared(
    tokens_BnD: Tensor, label_Bn: Tensor, index_BK: Tensor, fresh_BKD: Tensor, ratio: float, *, original: bool = False
) -> Tensor:
    """Tokens with the fresh ones in place, and every token drawn by `ratio` to the fresh one of its cluster.

    Where a cluster has several fresh tokens (an empty cluster's token 0 among them) it is drawn to their mean; the
    published code adds them up.
    """
    placed_BnD = put(tokens_BnD, index_BK, fresh_BKD)
    if ratio == 0:
        return placed_BnD
    own_BK = label_Bn.gather(1, index_BK)
    sums_BKD = torch.zeros_like(fresh_BKD).scatter_add(1, own_BK[..., None].expand_as(fresh_BKD), fresh_BKD)
    if not original:
        counts_BK = torch.zeros_like(own_BK).scatter_add(1, own_BK, torch.ones_like(own_BK))
        sums_BKD = sums_BKD / counts_BK.clamp_min(1)[..., None].to(sums_BKD)
    drawn_BnD = ratio * take(sums_BKD.to(placed_BnD), label_Bn) + (1 - ratio) * placed_BnD
    return drawn_BnD if original else put(drawn_BnD, index_BK, fresh_BKD)
