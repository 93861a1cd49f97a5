"""The task of training Infinity where its own bits lead it, with the world's own answer as the target.

Self-correction flips bits by lot; a network's own errors are no such lots: they agree with one another, and make a
mixture of pictures. Here it paints captions by its own pipeline, and learns at every scale on its way what the world
asks for there (`posterior`); and as much on the way of true pictures with flipped bits, to the same target. It is
DAgger (arXiv:1011.0686) with Bayes for the expert; on its own way the model that it goes on from can be another one,
guided. Held-out combinations are in no caption and in no answer of the world's.
Not here: the network, evaluation, export (`infinity`), answers (`posterior`).
Shapes: B pictures, T tokens of text, L tokens of all scales, K bits a token, V = 2K logits, k bits a cell, h w a
scale's cells, H W the final ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from gesso.models.infinity.correction import draw_flips, walk_scales
from gesso.models.infinity.quantizer import codes, enlarge, to_tokens
from gesso.pipelines.infinity_state import InfinityState
from gesso.request import GenerationRequest, parse_request
from gesso.training.infinity import InfinityNetwork, InfinitySettings, InfinityTask
from gesso.training.infinity_loss import divergence, margin_weights
from gesso.training.painting import at_rest, walk
from gesso.training.pictures import captions_to_paint, first_seed, stated_scenes
from gesso.training.posterior import Answer, expected_bits
from gesso.training.settings import check
from gesso.training.world_latents import LARGEST_SIDE, EveryScene, WorldLatents
from gesso.weights import shared
from gesso.weights.files import digest
from gesso.worlds.shapes import Claim

_MOST_WALKED = 4096  # pictures with their keys and values


@dataclass(frozen=True, kw_only=True)
class InfinityOnPolicySettings(InfinitySettings):
    """What `InfinitySettings` says, and how the network's own way is walked.

    Every `paint_every` steps as many captions are painted as these steps learn from, which is a batch each, with the
    next one of `guidances` and with revisions as `generation` has them. Each step learns from as many painted pictures
    as true ones. A run resumes bit for bit from checkpoints at multiples of `paint_every`.

    With `taught_guidance`, a number a scale, what the model of `start_from` says when it is so guided counts for half
    of the answer on the network's own way: guidance distilled (arXiv:2210.03142), so that it can paint without.
    """

    paint_every: int = 3
    guidances: tuple[float, ...] = (1.0,)
    taught_guidance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check("paint_every", self.paint_every, 1 <= self.paint_every <= 4096, "from 1 to 4096")
        check("side", self.side, self.side <= LARGEST_SIDE, f"at most {LARGEST_SIDE}: the whole world is in memory")
        check("guidances", self.guidances, bool(self.guidances), "at least one number")
        check("weigh_margins", self.weigh_margins, self.weigh_margins, "true: answers count by margins")
        if self.taught_guidance:
            scales, taught = len(self.schedule), self.taught_guidance
            finite = len(taught) == scales and all(map(math.isfinite, taught))
            check("taught_guidance", taught, finite, f"{scales} numbers, one a scale")
            check("start_from", self.start_from, bool(self.start_from), "a model, which is what teaches")


class Past(NamedTuple):
    """What is known of a picture from the scale `first` on, where its way began or it was revised: bits `[k,h,w]` of
    all scales up to the next revision, those before `first` as the tokenizer coded them.
    """

    first: int
    bits: list[Tensor]


class Way(NamedTuple):
    """A picture's way: the sums of codes `[k,H,W]` that were seen before each scale, the bits that they are of, and
    what it is a picture of.
    """

    sums: list[Tensor]
    pasts: list[Past]
    claim: Claim
    caption: str


class InfinityOnPolicyTask(InfinityTask):
    """Predict what the world, and a teacher if there is one, expects of the bits, on true ways and its own."""

    settings: InfinityOnPolicySettings

    def __init__(self, settings: InfinityOnPolicySettings, batch: int, seed: int) -> None:
        super().__init__(settings, batch, seed)
        self._world: WorldLatents | None = None
        self._own: list[Way] = []
        self._teacher = deepcopy(self.network).eval().requires_grad_(False) if settings.taught_guidance else None
        walked = settings.paint_every * batch
        check("paint_every", settings.paint_every, walked <= _MOST_WALKED, f"at most {_MOST_WALKED} pictures at once")
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
        """Divergence of the bits from the world's answers, mean over true ways and own ones; an own way's answers are
        the mean of the world's and the teacher's, where there is one.

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
        if self._teacher is not None:
            taught_BLK = self._taught(self._teacher, ids_BT[len(true) :], inputs_BLK[len(true) :])
            chances_BLK[len(true) :] = (chances_BLK[len(true) :] + taught_BLK) / 2
        logits_BLV = self.network(ids_BT, dropped_B, inputs_BLK, self.layout)
        loss_B = divergence(logits_BLV, chances_BLK, self.weights_L, margin_weights(margins_BLK))
        parts = loss_B.detach().split([len(true), len(own)])
        return loss_B.mean(), {"true": parts[0].mean(), "own": parts[1].mean()}

    def _answers(self, way: Way) -> tuple[Tensor, Tensor]:
        """Chances and margins of the bits of all tokens, `[L,K]`."""
        assert self._world is not None
        answers: list[Answer] = []
        for first, bits in way.pasts:
            parts = [enlarge(codes(bits_khw[None]), self.grids[-1])[0] for bits_khw in bits[:-1]]
            sums = [torch.zeros_like(way.sums[0]), *accumulate(parts)]
            answers += expected_bits(self._world, sums, bits, self.grids[: len(bits)], way.claim)[first:]
        chances_LK = torch.cat([self._tokens(answer.chance_khw) for answer in answers])
        return chances_LK, torch.cat([self._tokens(answer.margin_khw) for answer in answers])

    @torch.no_grad()
    def _taught(self, teacher: InfinityNetwork, ids_BT: Tensor, inputs_BLK: Tensor) -> Tensor:
        """Chances of the bits by the earlier model with guidance, `[B,L,K]`."""
        null_B = torch.arange(2 * len(ids_BT)) >= len(ids_BT)
        logits_BLV = teacher(torch.cat((ids_BT, ids_BT)), null_B, torch.cat((inputs_BLK, inputs_BLK)), self.layout)
        zero_BLK, one_BLK = logits_BLV.float().unflatten(-1, (-1, 2)).unbind(-1)
        prompt_BLK, null_BLK = (one_BLK - zero_BLK).chunk(2)
        guidance_L1 = torch.tensor(self.settings.taught_guidance)[self.layout.scale_L, None]
        return torch.lerp(null_BLK, prompt_BLK, guidance_L1).sigmoid()

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
        sums = zip(*(scale.sum_BKHW for scale in scales), strict=True)
        bits = zip(*(scale.bits_BKhw for scale in scales), strict=True)
        ways = zip(sums, bits, stated, strict=True)
        return [Way(list(seen), [Past(0, list(chosen))], *text) for seen, chosen, text in ways]

    def _own_ways(self, step: int) -> list[Way]:
        """This step's ways of the pictures that were painted last."""
        since = step % self.settings.paint_every
        if not (since and self._own):
            self._own = self._walk(step)
        return self._own[since * self.batch : (since + 1) * self.batch]

    def _walk(self, step: int) -> list[Way]:
        """Paint captions as the model does, and keep what it saw before each scale and what it painted there."""
        round_ = step // self.settings.paint_every
        asked = captions_to_paint(round_, self.batch * self.settings.paint_every, self.seed)
        requests = [self._request(caption, seed, round_) for _, caption, seed in asked]
        ways = [Way([], [], claim, caption) for claim, caption, _ in asked]
        with at_rest(self.network):
            for states in walk(self._pipeline(), requests):
                for way, state in zip(ways, cast(Sequence[InfinityState], states), strict=True):
                    if state.remaining:
                        way.sums.append(state.sum_kHW.clone())  # not a tensor of inference: it is learned from
                    if not way.pasts or way.pasts[-1].bits is not state.bits:
                        way.pasts.append(Past(state.scale, state.bits))
        return ways

    def _request(self, caption: str, seed: int, round_: int) -> GenerationRequest:
        """What is asked of the model. Raises RequestError."""
        guidance = self.settings.guidances[round_ % len(self.settings.guidances)]
        return parse_request({"prompt": caption, "seed": seed, "guidance": guidance})
