"""The task of training a nano InfiniteYou: InfuseNet and resampler beside a frozen nano FLUX of the faces world.

From one portrait's vector they learn to add to FLUX what makes it paint another portrait of that person, in the pose,
mood and surroundings that the caption says (arXiv:2503.16418, section 3.2, with the recogniser of the faces world for
ArcFace). The control picture is the key points of the portrait to paint, or black, which leaves the pose open. Not
here: FLUX and its training (`flow`), the recogniser's (`face_recogniser`).
Shapes: B pictures, C latent channels, h w latent cells, T tokens of text, E text features, V numbers of a vector.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gesso.devices import CPU
from gesso.engine.loading.build import Build
from gesso.engine.loading.flow_nano import assemble
from gesso.errors import FileError, MissingError, RequestError
from gesso.identity.nano_reader import NanoFaceReader, draw_points
from gesso.models import flux_network, infusenet, kl_autoencoder
from gesso.models.face_recogniser import FaceRecogniser
from gesso.models.flux_network import FluxConfig
from gesso.models.infusenet import IDENTITY_TOKENS
from gesso.models.kl_autoencoder import moments
from gesso.models.resampler import Resampler, ResamplerConfig
from gesso.models.word_encoder import PAD
from gesso.models.word_features import fixed_length
from gesso.pipelines.contract import Pipeline
from gesso.pipelines.infinite_you import InfiniteYou, Networks
from gesso.request import GenerationRequest
from gesso.training.export import save_model
from gesso.training.flow import draw_sigmas
from gesso.training.flow_networks import FluxVelocity, embed_in_float32
from gesso.training.latents import FreshLatents, Latents, store, stored_digest
from gesso.training.painting import paint
from gesso.training.people import COMPANY, cosines, trials, write_references
from gesso.training.pictures import HELD_OUT_FROM, first_seed, sheet, to_tensor
from gesso.training.settings import MOST_SCENES, check
from gesso.weights import flow_nano, infinite_you_nano
from gesso.weights.configuration import read_config
from gesso.weights.face_recogniser import load_recogniser
from gesso.weights.files import fill
from gesso.weights.infinity import parse
from gesso.worlds import faces

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

_CHUNK = 64  # pictures at once where nothing is learned
_TOGETHER = 20  # people painted at once
_OTHER_PICTURE = 2**42  # between the seeds of a portrait and of the one to paint from
_TRIALS = 1  # seed of the trials while training: others than `gesso eval faces` has


@dataclass(frozen=True, kw_only=True)
class InfiniteYouSettings:
    """`flux` and `recogniser` are folders of exported models, used as they are; `network` are InfuseNet's sizes.

    `precompute` portraits are stored before the first step, 0 draws fresh ones at each. `pose_share` of pictures are
    given their key points. Of each evaluation, `trials` people are painted and told from 19 others, 0 for none.
    """

    network: FluxConfig
    resampler: ResamplerConfig
    flux: str
    recogniser: str
    precompute: int = 0
    pose_share: float = 0.5
    condition_drop: float = 0.1
    time_shift: float = 1.0
    held_out: int = 128
    trials: int = 0

    def __post_init__(self) -> None:
        stored = 0 <= self.precompute <= MOST_SCENES
        check("precompute", self.precompute, stored, f"0, or a number of scenes up to {MOST_SCENES}")
        for name in ("pose_share", "condition_drop"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")
        bends = math.isfinite(self.time_shift) and 0 < self.time_shift <= 100
        check("time_shift", self.time_shift, bends, "a number above 0 and at most 100")
        check("held_out", self.held_out, 2 <= self.held_out <= MOST_SCENES, f"from 2 to {MOST_SCENES}")
        enough = self.trials == 0 or COMPANY <= self.trials <= MOST_SCENES
        check("trials", self.trials, enough, f"0, or a number of people from {COMPANY} to {MOST_SCENES}")
        tokens = self.resampler.num_queries
        check("num_queries", tokens, tokens == IDENTITY_TOKENS, f"{IDENTITY_TOKENS}, as the pipeline reads")


class InfiniteYouNetwork(nn.Module):
    """What is trained."""

    def __init__(self, settings: InfiniteYouSettings) -> None:
        super().__init__()
        self.resampler = Resampler(settings.resampler)
        self.infusenet = infinite_you_nano.build_infusenet(settings.network)
        embed_in_float32(self.infusenet)


@dataclass(frozen=True, kw_only=True)
class PortraitEncoding:
    """How portraits become latents, token ids, the vector of another portrait of the person, and control latents."""

    autoencoder: AutoencoderKL
    token_ids: Callable[[list[str]], Tensor]
    recogniser: FaceRecogniser
    side: int
    seed: int
    identity: str
    columns: tuple[str, ...] = ("latent", "ids", "vector", "control")

    def scenes(self, step: int, count: int) -> tuple[Tensor, ...]:
        first = first_seed(step, count, self.seed)
        return self.of([faces.training_portrait(seed) for seed in range(first, first + count)], first)

    @torch.no_grad()
    def of(self, portraits: list[faces.Portrait], first: int) -> tuple[Tensor, ...]:
        """The columns of these portraits, the first of which has this seed."""
        captions = [faces.caption(portrait, first + index) for index, portrait in enumerate(portraits)]
        others = [
            faces.portrait_of(portrait.person, first + index + _OTHER_PICTURE)
            for index, portrait in enumerate(portraits)
        ]
        size, generator = (self.side, self.side), torch.Generator().manual_seed(first)
        points = np.stack([np.asarray(draw_points(size, faces.key_points(portrait))) for portrait in portraits])
        return (
            kl_autoencoder.encode(self.autoencoder, to_tensor(faces.draw(portraits, self.side))).float(),
            self.token_ids(captions),
            self.recogniser(to_tensor(faces.draw(others, self.recogniser.config.side))).float(),
            kl_autoencoder.sample(self.autoencoder, moments(self.autoencoder, to_tensor(points)), generator).float(),
        )

    def digest(self) -> str:
        return stored_digest("faces", self.side, self.seed, self.identity)


class InfiniteYouTask:
    """Predict the velocity of a person's noisy latents, given another portrait of theirs."""

    def __init__(self, settings: InfiniteYouSettings, batch: int, seed: int) -> None:
        self.settings, self.batch, self.seed = settings, batch, seed
        self.folder = _folder(settings.flux, "a nano FLUX", "gesso train flux-faces-nano")
        recogniser = _folder(settings.recogniser, "a recogniser", "gesso train faces-recogniser")
        self.flux, self.recogniser = flow_nano.load(self.folder), load_recogniser(recogniser)
        config = read_config(self.folder)
        self.side = self.flux.sizes[0][0]
        torch.manual_seed(seed)
        self.network = InfiniteYouNetwork(settings)
        self.velocity = self._frozen(parse(FluxConfig, config.get("network"), self.folder))
        self._check_fit()
        self._begin_from_flux()
        digests = [self.flux.digest, hashlib.sha256((recogniser / "manifest.json").read_bytes()).hexdigest()]
        self.encoding = PortraitEncoding(
            autoencoder=self.flux.autoencoder,
            token_ids=lambda captions: self.flux.text.token_ids(captions, self.flux.text.config.length),
            recogniser=self.recogniser,
            side=self.side,
            seed=seed,
            identity=hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        )
        self.latents: Latents = FreshLatents(self.encoding, batch)
        with torch.no_grad():
            self._black = moments(self.flux.autoencoder, torch.full((1, 3, self.side, self.side), -1.0))

    def heavy_modules(self) -> list[nn.Module]:
        return [self.velocity, self.network.infusenet]

    def prepare(self, folder: Path, report: Callable[[int], None]) -> None:
        """Store portraits in the run's folder, if settings ask for it."""
        if self.settings.precompute:
            self.latents = store(folder, self.encoding, self.settings.precompute, self.batch, report)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity of this step's batch."""
        settings = self.settings
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        clean, ids_BT, vector_BV, control = self.latents.batch(step)
        sigma_B = draw_sigmas(len(clean), mean=0.0, deviation=1.0, shift=settings.time_shift, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        dropped_B1 = torch.rand((len(clean), 1), generator=generator) < settings.condition_drop
        posed = torch.rand((len(clean), 1, 1, 1), generator=generator) < settings.pose_share
        ids_BT = torch.where(dropped_B1, self.encoding.token_ids([""]), ids_BT)
        control = torch.where(posed, control, self._unposed(len(clean), generator))
        return self._errors(clean, noise, sigma_B, ids_BT, vector_BV, control).mean(), {}

    def evaluate(self) -> dict[str, float]:
        """Loss on held-out people at fixed times, without a pose; then with strangers' vectors, which shall cost."""
        count = self.settings.held_out
        portraits = [faces.held_out_portrait(HELD_OUT_FROM + index) for index in range(count)]
        clean, ids_BT, vector_BV, _ = self.encoding.of(portraits, HELD_OUT_FROM)
        generator = torch.Generator().manual_seed(0)
        noise, black = torch.randn(clean.shape, generator=generator), self._unposed(count, generator)
        sigma_B = (torch.arange(count) + 0.5) / count
        figures = {}
        for name, vectors in (("validation_loss", vector_BV), ("validation_loss_stranger", vector_BV.roll(1, 0))):
            parts = (clean, noise, sigma_B, ids_BT, vectors, black)
            chunks = zip(*(part.split(_CHUNK) for part in parts), strict=True)
            figures[name] = float(torch.cat([self._errors(*chunk) for chunk in chunks]).mean())
        if self.settings.trials:
            figures |= self._likeness(self.settings.trials)
        return figures

    def samples(self) -> Image.Image:
        """Rows: a held-out person's portrait to paint from, the one described, and five pictures by it."""
        asked = trials(8, _TRIALS)
        with tempfile.TemporaryDirectory() as folder:
            paths, pipeline, rows = write_references(asked, Path(folder), self.side), self._pipeline(), []
            for trial, path in zip(asked, paths, strict=True):
                request = GenerationRequest(prompt=trial.prompt, identity=str(path), seed=0, num_images=5)  # type: ignore[arg-type]
                painted = [to_tensor(np.array(picture)[None])[0] for picture in paint(pipeline, [request])]
                drawn = to_tensor(faces.draw([trial.reference, trial.drawn], self.side))
                rows.append([*drawn, *painted])
        return sheet(rows)

    def export(self, folder: Path, facts: Mapping[str, object]) -> None:
        """The whole model: FLUX as it was, and what paints people beside it."""
        settings, source = self.settings, read_config(self.folder)
        config = {name: value for name, value in source.items() if name != "shared"} | {
            "identity": {"infusenet": asdict(settings.network), "resampler": asdict(settings.resampler)},
            "recogniser": asdict(self.recogniser.config),
        }
        parts = {
            "transformer": self.flux.network.state_dict(),
            "text": self.flux.text.state_dict(),
            "autoencoder": self.flux.autoencoder.state_dict(),
            "infusenet": self.network.infusenet.state_dict(),
            "resampler": self.network.resampler.state_dict(),
            "recogniser": self.recogniser.state_dict(),
        }
        save_model(folder, parts, config, facts)

    def _errors(
        self, clean: Tensor, noise: Tensor, sigma_B: Tensor, ids_BT: Tensor, vector_BV: Tensor, control: Tensor
    ) -> Tensor:
        """Squared error of the velocity, `[B]`, mean over a latent."""
        sigma_B111 = sigma_B[:, None, None, None]
        noisy = (1 - sigma_B111) * clean + sigma_B111 * noise
        with torch.no_grad():
            features_BTE, real_BT = self.flux.text(ids_BT), ids_BT != PAD
        _, pooled_BE = fixed_length(features_BTE, real_BT)
        with warnings.catch_warnings():  # torch's, that norms under autocast are slow: they are no tenth of a step
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            added = infusenet.residuals(
                self.network.infusenet,
                tokens_BLD=flux_network.pack(noisy),
                control_BLD=flux_network.pack(control),
                identity_BNE=self.network.resampler(vector_BV[:, None]),
                pooled_BP=pooled_BE,
                time_B=sigma_B,
                positions_L3=flux_network.positions(*noisy.shape[-2:]),
                scale=1.0,
            )
            velocity = self.velocity(noisy, sigma_B, features_BTE, real_BT, added)
        return F.mse_loss(velocity.float(), noise - clean, reduction="none").mean(dim=(1, 2, 3))

    def _unposed(self, count: int, generator: torch.Generator) -> Tensor:
        """Control latents `[count,C,h,w]` of black, each a sample of its own, as the pipeline draws them."""
        mean, log_variance = (part.expand(count, -1, -1, -1) for part in self._black)
        return kl_autoencoder.sample(self.flux.autoencoder, (mean, log_variance), generator)

    def _likeness(self, count: int) -> dict[str, float]:
        """How often people who are painted are told from 19 others, and by what cosines."""
        asked, pictures = trials(count, _TRIALS), []
        with tempfile.TemporaryDirectory() as folder:
            paths, pipeline = write_references(asked, Path(folder), self.side), self._pipeline()
            requests = [
                GenerationRequest(prompt=trial.prompt, identity=str(path), seed=number)  # type: ignore[arg-type]
                for number, (trial, path) in enumerate(zip(asked, paths, strict=True))
            ]
            for first in range(0, count, _TOGETHER):
                pictures += paint(pipeline, requests[first : first + _TOGETHER])
        found = cosines(self.recogniser, asked, pictures)
        right = (found.argmax(dim=1) == 0).float().mean()
        return {"right": float(right), "own": float(found[:, 0].mean()), "others": float(found[:, 1:].mean())}

    def _frozen(self, config: FluxConfig) -> FluxVelocity:
        velocity = FluxVelocity(config)
        fill(velocity.transformer, self.flux.network.state_dict(), self.folder)
        return velocity.eval().requires_grad_(False)

    def _begin_from_flux(self) -> None:
        """InfuseNet begins as FLUX's own first blocks, and adds nothing (arXiv:2302.05543, section 3.1)."""
        own, theirs = self.network.infusenet.state_dict(), self.flux.network.state_dict()
        same = {name: theirs[name] for name in own if name in theirs and theirs[name].shape == own[name].shape}
        self.network.infusenet.load_state_dict(own | same)

    def _check_fit(self) -> None:
        ours, theirs = self.settings.network, self.flux.network.config
        for name in ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim"):
            if getattr(ours, name) != theirs[name]:  # type: ignore[index]
                raise RequestError(name, getattr(ours, name), f"{theirs[name]}, as FLUX has")  # type: ignore[index]
        resampler, vector = self.settings.resampler, self.recogniser.config.vector
        for name, allowed in (("embedding_dim", vector), ("output_dim", ours.joint_attention_dim)):
            if getattr(resampler, name) != allowed:
                raise RequestError(name, getattr(resampler, name), f"{allowed}, as what it is between")

    def _pipeline(self) -> Pipeline:
        """The model as it is, painting as it will once it is exported."""
        infusenet_now = self.network.infusenet
        guest = InfiniteYou(
            faces=NanoFaceReader(lambda: self.recogniser),
            load=lambda variant: Networks(variant, infusenet_now, self.network.resampler),
            shapes=lambda variant: infusenet_now,
            device=torch.device(CPU),
            dtype=torch.float32,
        )
        return assemble(self.flux, "the model in training", self.folder, Build(device=CPU), guest)


def _folder(name: str, what: str, command: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise MissingError(f"{what} in {folder}", command)
    config = read_config(folder)
    if config.get("family") not in ("flux", "face-recogniser"):
        raise FileError(folder, f"holds a model of the family {config.get('family')}", command)
    return folder
