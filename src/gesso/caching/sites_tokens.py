"""Sites of policies that compute some tokens between full steps: feed-forwards cut down to them, and what chooses them.

A feed-forward acts on each token by itself, so that fresh tokens of all parts go through it as one row. Attention is
never cut: on token steps it is forecast. Not here: the choice itself (`policy_tokens`, `policy_clusters`), other sites
(`sites`).
Shapes: B rows of a part, n tokens, k fresh ones, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gesso.caching import policy_clusters, policy_tokens
from gesso.caching.parts import Part, SpanDivision
from gesso.caching.placement import Stream
from gesso.caching.policy import Action
from gesso.caching.sites import Board, Forward, SlotSite, opened
from gesso.errors import RunError

_MAP_ELEMENTS = 2**24  # of an attention map at once


class ReceivedAttention(TorchFunctionMode):
    """While it lasts, every call of scaled-dot-product attention also says how much attention each key receives.

    `received_Bn` are the column sums of the map, as the mean over heads, one tensor a call. Kernels of other libraries
    are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            scores = received_attention(named["query"], named["key"], named.get("attn_mask"), named.get("scale"))
            self.received.append(scores)
        return func(*args, **kwargs)


def received_attention(q_BHnd: Tensor, k_BHnd: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Column sums of softmax(q k^T), `[B,n]`, the mean over heads, made some queries at a time."""
    batch, heads, queries, width = q_BHnd.shape
    keys = k_BHnd.shape[2]
    factor = width**-0.5 if scale is None else scale
    received_Bn = torch.zeros(batch, keys, device=q_BHnd.device)
    size = max(1, _MAP_ELEMENTS // (batch * heads * keys))
    for begin in range(0, queries, size):
        logit_BHqn = (q_BHnd[:, :, begin : begin + size] @ k_BHnd.transpose(-1, -2)).float() * factor
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., begin : begin + size, :]
            logit_BHqn = logit_BHqn.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logit_BHqn + part
        received_Bn += logit_BHqn.softmax(dim=-1).nan_to_num().sum(dim=2).mean(dim=1)
    return received_Bn


@torch.compiler.disable(recursive=True)  # a compiler that breaks within the mode loses it, and what was received
def _tapped(original: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """What attention returns, and what it received by `ReceivedAttention`; it runs uncompiled."""
    with ReceivedAttention() as tap:
        output = original(*args, **kwargs)
    return output, tap.received


@dataclass
class ScoringSlot(SlotSite):
    """Attention that on full steps also scores tokens by what attention they receive."""

    def __call__(self, original: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        running = self.board.running
        if running is None or not running.full:
            return super().__call__(original, args, kwargs)
        output, received = _tapped(original, args, kwargs)
        if not received:
            raise RunError(
                "no attention map to score tokens by with this attention; set the cache's score to random or norm"
            )
        self._score(received, output)
        return self.keep(output)

    def _score(self, received: list[Tensor], output: Any) -> None:
        """Column sums split among parts and streams; each stream's are normalised by themselves."""
        division = self.board.now.division
        if isinstance(division, SpanDivision):
            flat = torch.cat([part_Bn.flatten() for part_Bn in received])
            pieces = [flat[None, begin : begin + length] for begin, length in division.spans]
        else:
            pieces = division.split(received[0])
        tensors, _ = opened(output)
        lengths = dict(zip(self.slot.streams, (tensor.shape[1] for tensor in tensors), strict=True))
        order = self.board.table.joint
        for part, piece_Bn in zip(division.parts, pieces, strict=True):
            sizes = [piece_Bn.shape[1]] if len(order) == 1 else [lengths[stream] for stream in order]
            for stream, score_Bn in zip(order, piece_Bn.split(sizes, dim=1), strict=True):
                name = f"{_block(self.name)}:score:{stream}"
                self.board.store.put(part.run, part.branch, name, policy_tokens.attention_score(score_Bn))


@dataclass
class FreshSlot(SlotSite):
    """A feed-forward of which some tokens are computed on token steps. `depth` is its block's place, from 0 to 1."""

    depth: float = 0.0

    def __call__(self, original: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        running = self.board.running
        if running is None or running.action is not Action.TOKENS:
            if running is not None and running.full:
                self._forget_ages()
            return super().__call__(original, args, kwargs)
        (tensor, *_), _ = opened([*args, *kwargs.values()][:1])
        pieces = running.division.split(tensor)
        chosen = [self._choose(number, piece) for number, piece in enumerate(pieces)]
        taken = [policy_tokens.take(piece, index) for piece, index in zip(pieces, chosen, strict=True)]
        outputs = self._through(original, taken)
        assert self._rebuild is not None
        parts = zip(running.division.parts, chosen, outputs, strict=True)
        return self._rebuild([running.division.join([self._mixed(*each) for each in parts])])

    def _through(self, original: Forward, taken: list[Tensor]) -> list[Tensor]:
        """All fresh tokens as one row through the module, and apart again."""
        row = torch.cat([piece.flatten(0, 1) for piece in taken])[None]
        out = original(row)[0] if row.shape[1] else row[0]
        counts = [piece.shape[0] * piece.shape[1] for piece in taken]
        return [out.unflatten(0, piece.shape[:2]) for out, piece in zip(out.split(counts), taken, strict=True)]

    def _choose(self, number: int, tokens_BnD: Tensor) -> Tensor:
        """Indices `[B,k]` of a part's fresh tokens; their ages are set."""
        part = self.board.now.division.parts[number]
        settings, store = self.board.policy.settings, self.board.store
        rows, count = tokens_BnD.shape[:2]
        weight = policy_tokens.random_score(rows, count, 0, part.step, part.branch, self.name).to(tokens_BnD.device)
        if settings.policy == "clusca":
            label_Bn = store.get(part.run, part.branch, f"labels:{self._stream}")
            assert label_Bn is not None and settings.clusters is not None
            return policy_clusters.representatives(label_Bn, weight, min(settings.clusters, count))
        score_Bn = self._scores(part, tokens_BnD, weight)
        age_Bn = store.get(part.run, part.branch, f"{self.name}:age")
        if age_Bn is None:
            age_Bn = torch.zeros(rows, count, dtype=torch.int32, device=tokens_BnD.device)
        if settings.age_weight:
            score_Bn = policy_tokens.aged(score_Bn, age_Bn, settings.age_weight, settings.interval or 1)
        grid = self.board.now.grids[number] if self.board.now.grids else None
        if settings.bonus and grid is not None and grid[0] * grid[1] == count:
            score_Bn = policy_tokens.with_bonus(score_Bn, settings.bonus, grid)
        index_Bk = policy_tokens.select(score_Bn, self._ratio(part))
        store.put(part.run, part.branch, f"{self.name}:age", policy_tokens.age_after(age_Bn, index_Bk))
        return index_Bk

    def _scores(self, part: Part, tokens_BnD: Tensor, random_Bn: Tensor) -> Tensor:
        match self.board.policy.settings.score:
            case "attention":
                found = self.board.store.get(part.run, part.branch, f"{_block(self.name)}:score:{self._stream}")
                assert found is not None
                return found
            case "norm":
                return policy_tokens.norm_score(tokens_BnD)
            case _:
                return random_Bn

    def _ratio(self, part: Part) -> float:
        settings = self.board.policy.settings
        assert settings.ratio is not None and settings.ratio_schedule is not None
        remaining = 1 - (part.step + 1) / part.of
        return policy_tokens.fresh_ratio(settings.ratio_schedule, settings.ratio, remaining=remaining, depth=self.depth)

    def _mixed(self, part: Part, index_Bk: Tensor, fresh_BkD: Tensor) -> Tensor:
        """The forecast with fresh tokens in it; what they change is kept, so that later forecasts have it too."""
        store, rule, settings = self.board.store, self.board.policy.rule, self.board.policy.settings
        ask = (part.run, part.branch, self.name)
        if (
            settings.policy == "clusca" and settings.original
        ):  # fresh tokens are taken for a full step's, and forecast again
            before_BnD = store.order0(*ask)
            store.amend(*ask, self._placed(part, before_BnD, index_Bk, fresh_BkD) - before_BnD)
            return store.predict(*ask, part.step, rule)
        forecast_BnD = store.predict(*ask, part.step, rule)
        mixed_BnD = self._placed(part, forecast_BnD, index_Bk, fresh_BkD)
        store.amend(*ask, mixed_BnD - forecast_BnD)
        return mixed_BnD

    def _placed(self, part: Part, tokens_BnD: Tensor, index_Bk: Tensor, fresh_BkD: Tensor) -> Tensor:
        settings = self.board.policy.settings
        if settings.policy != "clusca":
            return policy_tokens.put(tokens_BnD, index_Bk, fresh_BkD)
        label_Bn = self.board.store.get(part.run, part.branch, f"labels:{self._stream}")
        assert label_Bn is not None and settings.propagation is not None
        return policy_clusters.shared(
            tokens_BnD, label_Bn, index_Bk, fresh_BkD, settings.propagation, original=settings.original
        )

    def _forget_ages(self) -> None:
        for part in self.board.now.division.parts:
            age = self.board.store.get(part.run, part.branch, f"{self.name}:age")
            if age is not None:
                self.board.store.put(part.run, part.branch, f"{self.name}:age", torch.zeros_like(age))

    @property
    def _stream(self) -> Stream:
        return self.slot.streams[0]


@dataclass
class ClusterSite:
    """Clusters what a block returns on full steps, each stream by itself, beginning with the clusters before."""

    board: Board

    def __call__(self, original: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        output = original(*args, **kwargs)
        running = self.board.running
        if running is not None and running.full:
            tensors, _ = opened(output)
            for stream, tensor in zip(self.board.table.block_output, tensors, strict=True):
                for part, piece in zip(running.division.parts, running.division.split(tensor), strict=True):
                    self._cluster(part, stream, piece)
        return output

    def _cluster(self, part: Part, stream: Stream, tokens_BnD: Tensor) -> None:
        settings, store = self.board.policy.settings, self.board.store
        assert settings.clusters is not None
        count = min(settings.clusters, tokens_BnD.shape[1])
        start_BKD = store.get(part.run, part.branch, f"centroids:{stream}")
        if start_BKD is None or start_BKD.shape != (len(tokens_BnD), count, tokens_BnD.shape[-1]):
            weight_Bn = policy_tokens.random_score(*tokens_BnD.shape[:2], 0, part.branch, stream)
            start_BKD = policy_clusters.first_centroids(tokens_BnD, weight_Bn, count)
        label_Bn, centroid_BKD = policy_clusters.cluster(tokens_BnD, start_BKD, original=settings.original)
        store.put(part.run, part.branch, f"labels:{stream}", label_Bn)
        store.put(part.run, part.branch, f"centroids:{stream}", centroid_BKD)


def _block(name: str) -> str:
    """The block that a module is in."""
    return name.rpartition(".")[0]
