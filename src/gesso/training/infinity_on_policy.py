"""The task of training Infinity where its own bits lead it, with the world's own answer as the target.

Self-correction flips bits by lot; a network's own errors are no such lots: they agree with one another, and make a
mixture of pictures. Here it paints captions by its own pipeline, and learns at every scale on its way what the world
asks for there (`posterior`); and as much on the way of true pictures with flipped bits, to the same target. It is
DAgger (arXiv:1011.0686) with Bayes for the expert. Held-out combinations are in no caption and in no answer.
Not here: the network, evaluation, export (`infinity`), answers (`posterior`).
Shapes: B pictures, T tokens of text, L tokens of all scales, K bits a token, V = 2K logits, k bits a cell, h w a
scale's cells, H W the final ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from gesso.models.infinity.correction import draw_flips, walk_scales
from gesso.models.infinity.quantizer import codes, enlarge, to_tokens
from gesso.pipelines.infinity_state import InfinityState
from gesso.request import GenerationRequest, parse_request
from gesso.training.infinity import InfinitySettings, InfinityTask
from gesso.training.infinity_loss import divergence, margin_weights
from gesso.training.painting import at_rest, walk
from gesso.training.pictures import captions_to_paint, first_seed, stated_scenes
from gesso.training.posterior import expected_bits
from gesso.training.settings import check
from gesso.training.world_latents import LARGEST_SIDE, EveryScene, WorldLatents
from gesso.weights import shared
from gesso.weights.files import digest
from gesso.worlds.shapes import Claim

_MOST_WALKED = 4096  # pictures with their keys and values


@dataclass(frozen=True, kw_only=True)
class InfinityOnPolicySettings(InfinitySettings):
    """What `InfinitySettings` says, and how the network's own way is walked.

    Every `paint_every` steps as many pictures are painted as these steps learn from, which is a batch each, with the
    next one of `guidances`: captions, and each of them after every one of `revisions`. Each step learns from as many
    painted pictures as true ones. A run resumes bit for bit from checkpoints at multiples of `paint_every`.
    """

    paint_every: int = 3
    guidances: tuple[float, ...] = (1.0,)
    revisions: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check("paint_every", self.paint_every, 1 <= self.paint_every <= 4096, "from 1 to 4096")
        check("side", self.side, self.side <= LARGEST_SIDE, f"at most {LARGEST_SIDE}: the whole world is in memory")
        check("guidances", self.guidances, bool(self.guidances), "at least one number")
        check("revisions", self.revisions, 0 <= self.revisions <= 100, "from 0 to 100")
        check("weigh_margins", self.weigh_margins, self.weigh_margins, "true: answers count by margins")


class Way(NamedTuple):
    """A picture's way: the sums of codes `[k,H,W]` before each scale, its bits `[k,h,w]` there, and what it is of."""

    sums: tuple[Tensor, ...]
    bits: tuple[Tensor, ...]
    claim: Claim
    caption: str


class InfinityOnPolicyTask(InfinityTask):
    """Predict what the world expects of the bits of every scale, on the way of true pictures and of its own."""

    settings: InfinityOnPolicySettings

    def __init__(self, settings: InfinityOnPolicySettings, batch: int, seed: int) -> None:
        super().__init__(settings, batch, seed)
        self._world: WorldLatents | None = None
        self._own: list[Way] = []
        walked = settings.paint_every * batch
        check("paint_every", settings.paint_every, walked <= _MOST_WALKED, f"at most {_MOST_WALKED} pictures at once")
        divides = walked % (settings.revisions + 1) == 0
        check("revisions", settings.revisions, divides, f"one below a divisor of {walked}, paint_every times batch")
        pipeline = self._pipeline()
        for round_ in range(len(settings.guidances)):  # told now, not while painting
            pipeline.plan(self._request("-", 0, round_))

    @property
    def round_steps(self) -> int:
        return self.settings.paint_every

    def prepare(self, folder: Path, report: Callable[[int], None]) -> None:
        """Store latents of every training scene in the run's folder: 0.5 GB at 64 pixels, and as much memory."""
        weights = shared.part(Path(self.settings.tokenizer), "tokenizer.safetensors")
        identity = json.dumps([digest([weights]), asdict(self.tokenizer.config)])
        scenes = EveryScene(encode=self.tokenizer.encode, side=self.settings.side, identity=identity)
        self._world = WorldLatents.stored(folder, scenes, report)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Divergence of the bits from the world's answers, mean over true ways and own ones.

        Captions of true ways are spoilt by lot. What is hidden from the network the answer may know: its expectation
        over that is what the network learns. On its own way nothing may be hidden, for there no true picture says what
        it would have been.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        true, own = self._true_ways(step, generator), self._own_ways(step)
        ways = true + own
        answers = [self._answers(way) for way in ways]
        chances_BLK = torch.stack([chances_LK for chances_LK, _ in answers])
        margins_BLK = torch.stack([margins_LK for _, margins_LK in answers])
        inputs_BLK = torch.stack([self._inputs(way) for way in ways])
        spoilt_BT = self._ids([way.caption for way in true], generator)
        ids_BT = torch.cat((spoilt_BT, self._ids([way.caption for way in own], None)))
        dropped_B = torch.rand(len(true), generator=generator) < self.settings.condition_drop
        dropped_B = torch.cat((dropped_B, torch.zeros(len(own), dtype=torch.bool)))
        logits_BLV = self.network(ids_BT, dropped_B, inputs_BLK, self.layout)
        loss_B = divergence(logits_BLV, chances_BLK, self.weights_L, margin_weights(margins_BLK))
        parts = loss_B.detach().split([len(true), len(own)])
        return loss_B.mean(), {"true": parts[0].mean(), "own": parts[1].mean()}

    def _answers(self, way: Way) -> tuple[Tensor, Tensor]:
        """Chances and margins of the bits of all tokens, `[L,K]`."""
        assert self._world is not None
        answers = expected_bits(self._world, way.sums, way.bits, self.grids, way.claim)
        chances_LK = torch.cat([self._tokens(answer.chance_khw) for answer in answers])
        return chances_LK, torch.cat([self._tokens(answer.margin_khw) for answer in answers])

    def _inputs(self, way: Way) -> Tensor:
        """What the network sees of every scale but the first, `[L - first scale, K]`."""
        sums = zip(way.sums[1:], self.grids[1:], strict=True)
        return torch.cat([self._tokens(enlarge(sum_kHW[None], grid)[0]) for sum_kHW, grid in sums])

    def _tokens(self, part_khw: Tensor) -> Tensor:
        return to_tokens(part_khw[None], self.settings.network.patchify)[0]

    def _true_ways(self, step: int, generator: torch.Generator) -> list[Way]:
        """The ways of this step's scenes, with bits flipped by lot."""
        assert self._world is not None
        settings = self.settings
        scenes, stated = stated_scenes(first_seed(step, self.batch, self.seed), self.batch)
        latent_BkHW = self._world.of(scenes)
        flips = draw_flips(
            latent_BkHW, self.grids, strength=settings.flip_strength, scales=settings.flip_scales, generator=generator
        )
        scales = list(walk_scales(latent_BkHW, self.grids, flips))
        return _ways([scale.sum_BKHW for scale in scales], [scale.bits_BKhw for scale in scales], stated)

    def _own_ways(self, step: int) -> list[Way]:
        """This step's ways of the pictures that were painted last."""
        since = step % self.settings.paint_every
        if not (since and self._own):
            self._own = self._walk(step)
        return self._own[since * self.batch : (since + 1) * self.batch]

    def _walk(self, step: int) -> list[Way]:
        """Paint captions as the model does; the ways of a caption's picture and of its revisions lie side by side."""
        settings = self.settings
        round_, looks = step // settings.paint_every, settings.revisions + 1
        asked = captions_to_paint(round_, self.batch * settings.paint_every // looks, self.seed)
        requests = [self._request(caption, seed, round_) for _, caption, seed in asked]
        painted: list[list[Way]] = []
        with at_rest(self.network):
            for states in walk(self._pipeline(), requests):
                mine = cast(Sequence[InfinityState], states)
                if mine[0].is_painted:
                    painted.append(self._painted(mine, [(claim, caption) for claim, caption, _ in asked]))
        return [way for ways in zip(*painted, strict=True) for way in ways]

    def _painted(self, states: Sequence[InfinityState], stated: Sequence[tuple[Claim, str]]) -> list[Way]:
        """The ways to finished pictures, by the bits of all their scales."""
        bits = [torch.stack([state.bits[scale] for state in states]) for scale in range(len(self.grids))]
        sums = [torch.zeros(len(states), *states[0].sum_kHW.shape)]
        for bits_Bkhw in bits[:-1]:
            sums.append(sums[-1] + enlarge(codes(bits_Bkhw), self.grids[-1]))
        return _ways(sums, bits, stated)

    def _request(self, caption: str, seed: int, round_: int) -> GenerationRequest:
        """What is asked of the model. Raises RequestError."""
        guidance = self.settings.guidances[round_ % len(self.settings.guidances)]
        revisions = self.settings.revisions
        return parse_request({"prompt": caption, "seed": seed, "guidance": guidance, "revisions": revisions})


def _ways(sums: Sequence[Tensor], bits: Sequence[Tensor], stated: Sequence[tuple[Claim, str]]) -> list[Way]:
    """Ways of a batch whose sums and bits are given by scale."""
    return [
        Way(tuple(sum_BkHW[index] for sum_BkHW in sums), tuple(bits_Bkhw[index] for bits_Bkhw in bits), *text)
        for index, text in enumerate(stated)
    ]
