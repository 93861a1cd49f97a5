"""The task of training a flow model where its own pictures lead it, with the world's own answer as the target.

A network that learned from noisy true pictures alone is lost where its sampler takes it: in mixtures of pictures,
which it never saw. Here it paints captions by its own pipeline, and learns at the noisy latents on its way
what the world expects there (`posterior`); and as much from noisy true latents, to the same target. It is DAgger
(arXiv:1011.0686) with Bayes for the expert. Held-out combinations are in no caption and in no answer.
Not here: the network, its velocity, evaluation, export (`flow`), answers (`posterior`).
Shapes: B pictures, C latent channels, h w latent cells, T tokens of text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gesso.errors import RequestError
from gesso.models import flux_network
from gesso.models.kl_autoencoder import encode
from gesso.pipelines.contract import Pipeline, State
from gesso.pipelines.flux_state import FluxState
from gesso.pipelines.z_image_state import ZImageState
from gesso.request import GenerationRequest, parse_request
from gesso.training.flow import FlowSettings, FlowTask, quiet_norms
from gesso.training.painting import at_rest, walk
from gesso.training.pictures import captions_to_paint, first_seed, stated_scenes
from gesso.training.posterior import expected_latents
from gesso.training.settings import check
from gesso.training.world_latents import LARGEST_SIDE, EveryScene, WorldLatents
from gesso.worlds.shapes import Claim

_LEAST_SIGMA = 0.02  # of a true latent: velocities divide by it


@dataclass(frozen=True, kw_only=True)
class FlowOnPolicySettings(FlowSettings):
    """What `FlowSettings` says, and how the network's own way is walked.

    Every `paint_every` steps `paint_prompts` captions are painted with the next one of `guidances`, in the model's own
    terms, and of `schedulers` (where there are none, the model's default). Each step learns at as many noisy latents of
    these ways as the batch has true ones, above `least_sigma`. A run resumes bit for bit from checkpoints at multiples
    of `paint_every`.
    """

    paint_prompts: int = 48
    paint_every: int = 20
    guidances: tuple[float, ...] = (0.0,)
    schedulers: tuple[str, ...] = ()
    least_sigma: float = 0.45

    def __post_init__(self) -> None:
        super().__post_init__()
        check("world", self.world, self.world == "shapes", "shapes, which has finitely many scenes")
        check("paint_prompts", self.paint_prompts, 1 <= self.paint_prompts <= 4096, "from 1 to 4096")
        check("paint_every", self.paint_every, 1 <= self.paint_every <= 4096, "from 1 to 4096")
        check("precompute", self.precompute, self.precompute == 0, "0: the whole world is stored")
        check("side", self.side, self.side <= LARGEST_SIDE, f"at most {LARGEST_SIDE}: the whole world is in memory")
        check("guidances", self.guidances, bool(self.guidances), "at least one number")
        check("least_sigma", self.least_sigma, 0 < self.least_sigma < 1, "above 0 and below 1")


class Place(NamedTuple):
    """Where a picture was on its way, and what it is of."""

    latent_Chw: Tensor
    sigma: float
    claim: Claim
    caption: str


class FlowOnPolicyTask(FlowTask):
    """Predict the velocity towards what the world expects, on noisy true latents and on the network's own."""

    settings: FlowOnPolicySettings

    def __init__(self, settings: FlowOnPolicySettings, batch: int, seed: int) -> None:
        super().__init__(settings, batch, seed)
        self._world: WorldLatents | None = None
        self._own: list[Place] = []
        pipeline = self._pipeline()
        for round_ in range(len(settings.guidances) * max(len(settings.schedulers), 1)):  # told now, not while painting
            self._check_way(pipeline, self._request("-", 0, round_))

    @property
    def round_steps(self) -> int:
        return self.settings.paint_every

    def heavy_modules(self) -> list[nn.Module]:
        return self.network.velocity.heavy_modules()

    def prepare(self, folder: Path, report: Callable[[int], None]) -> None:
        """Store latents of every training scene in the run's folder: 1 GB, and as much memory."""
        scenes = EveryScene(
            encode=lambda image: encode(self.autoencoder, image),
            side=self.settings.side,
            identity=self.encoding.identity,
        )
        self._world = WorldLatents.stored(folder, scenes, report)

    def _check_way(self, pipeline: Pipeline, request: GenerationRequest) -> None:
        """Whether some step of painting begins where it is learned from. Raises RequestError."""
        plan = pipeline.plan(request)
        (conditioning,) = pipeline.encode([plan])
        sigmas = _sigmas_of(pipeline.begin(plan, conditioning, 0))
        if not any(self._learns_at(sigma) for sigma in sigmas):
            allowed = "at most where some step after the first begins"
            raise RequestError("least_sigma", self.settings.least_sigma, allowed, f"they begin at {_listed(sigmas)}")

    def _learns_at(self, sigma: float) -> bool:
        return self.settings.least_sigma <= sigma < 1

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of the squared errors on true latents and on own ones."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        true = self._towards_answers(self._true_places(step, generator), generator)
        own = self._towards_answers(self._own_places(step), None)
        return (true + own) / 2, {"true": true.detach(), "own": own.detach()}

    def _towards_answers(self, places: Sequence[Place], spoiling: torch.Generator | None) -> Tensor:
        """Error of the velocity towards the world's answers. Captions of true latents are spoilt by lot.

        What is hidden from the network the answer may know: its expectation over that is what the network learns.
        On its own way nothing may be hidden, for there no true picture says what it would have been.
        """
        assert self._world is not None
        noisy_BChw = torch.stack([place.latent_Chw for place in places])
        sigma_B = torch.tensor([place.sigma for place in places])
        ids_BT = self.encoding.token_ids([place.caption for place in places])
        if spoiling is not None:
            ids_BT = self._spoilt(ids_BT, spoiling)
        clean_BChw = expected_latents(self._world, noisy_BChw, sigma_B, [place.claim for place in places])
        velocity_BChw = (noisy_BChw - clean_BChw) / sigma_B[:, None, None, None]
        return self._velocity_errors(noisy_BChw, sigma_B, ids_BT, velocity_BChw).mean()

    def _true_places(self, step: int, generator: torch.Generator) -> list[Place]:
        """Noisy latents of this step's scenes."""
        assert self._world is not None
        scenes, stated = stated_scenes(first_seed(step, self.batch, self.seed), self.batch)
        sigma_B = self._sigmas(self.batch, generator).clamp(min=_LEAST_SIGMA)
        clean_BChw = self._world.of(scenes)
        noise_BChw = torch.randn(clean_BChw.shape, generator=generator)
        noisy_BChw = torch.lerp(clean_BChw, noise_BChw, sigma_B[:, None, None, None])
        rows = zip(noisy_BChw, sigma_B.tolist(), stated, strict=True)
        return [Place(noisy_Chw, sigma, claim, caption) for noisy_Chw, sigma, (claim, caption) in rows]

    def _own_places(self, step: int) -> list[Place]:
        """Noisy latents of this step from the pictures that were painted last."""
        since = step % self.settings.paint_every
        if not (since and self._own):
            self._own = self._walk(step)
        return [self._own[index % len(self._own)] for index in range(since * self.batch, (since + 1) * self.batch)]

    def _walk(self, step: int) -> list[Place]:
        """Paint captions as the model does, and keep where each step began, in an order by lot."""
        settings, round_ = self.settings, step // self.settings.paint_every
        asked = captions_to_paint(round_, settings.paint_prompts, self.seed)
        requests = [self._request(caption, seed, round_) for _, caption, seed in asked]
        places: list[Place] = []
        with at_rest(self.network), quiet_norms():
            for at, states in enumerate(walk(self._pipeline(), requests)):
                if self._learns_at(sigma := _sigmas_of(states[0])[at]):
                    places += [
                        Place(_latent_of(state).float().clone(), sigma, claim, caption)
                        for state, (claim, caption, _) in zip(states, asked, strict=True)
                    ]
        random.Random(step).shuffle(places)
        return places

    def _request(self, caption: str, seed: int, round_: int) -> GenerationRequest:
        """What is asked of the model; every scheduler meets every guidance. Raises RequestError."""
        guidances, schedulers = self.settings.guidances, self.settings.schedulers
        rounds, turn = divmod(round_, len(guidances))
        asked = {"prompt": caption, "seed": seed, "guidance": guidances[turn]}
        return parse_request(asked | ({"scheduler": schedulers[rounds % len(schedulers)]} if schedulers else {}))


def _sigmas_of(state: State) -> list[float]:
    """Where a picture's steps begin, and 0."""
    if isinstance(state, ZImageState):
        return state.sigmas_N.tolist()
    assert isinstance(state, FluxState)
    return [*(state.timesteps_N / 1000).tolist(), 0.0]


def _latent_of(state: State) -> Tensor:
    """The latent `[C,h,w]` of a picture on its way."""
    if isinstance(state, ZImageState):
        return state.latent_C1hw[:, 0]
    assert isinstance(state, FluxState)
    return flux_network.unpack(state.tokens_1LD, *state.size)[0]


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.2f}" for sigma in sigmas[:-1])
