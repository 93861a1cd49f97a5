"""The task of training a flow model on a world's pictures: rectified flow in an autoencoder's latents, from captions.

The network learns the velocity noise - clean along straight lines from clean latents to noise (arXiv:2209.03003), at
times drawn logit-normally (arXiv:2403.03206); all times weigh the same. Some prompts are dropped, that is "", so that
guidance has something to push away from. Not here: the loop and its average (`loop`), the networks' own conventions
(`flow_networks`), where latents come from (`latents`), sampling (`pipelines`).
Shapes: B pictures, C latent channels, h w latent cells, T tokens of text, E text features.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gesso.devices import CPU
from gesso.engine.loading.build import Build
from gesso.engine.loading.flow_nano import assemble
from gesso.errors import FileError, MissingError, RequestError
from gesso.models.kl_autoencoder import KLAutoencoderConfig, encode
from gesso.models.word_encoder import PAD, UNKNOWN, WordEncoder, WordEncoderConfig
from gesso.pipelines.contract import Pipeline
from gesso.request import parse_request
from gesso.training.export import save_model
from gesso.training.flow_networks import FAMILIES, NetworkConfig, VelocityNetwork
from gesso.training.latents import Encoding, FreshLatents, Latents, store
from gesso.training.painting import sample_sheet, shapes_score
from gesso.training.pictures import World, held_out_scenes
from gesso.training.precision import autocast
from gesso.training.settings import MOST_SCENES, check
from gesso.weights import flow_nano, shared
from gesso.weights.catalogue import ZOO
from gesso.weights.files import digest, fill
from gesso.weights.infinity import load_word_encoder

_BUCKETS = 8  # of time, for the loss on held-out scenes
_CHUNK = 64  # pictures at once where nothing is learned


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """`autoencoder` and `text` are folders of exported models (`text` also the name of one that ships).

    The word encoder of `text` is used as it is, so that models share it, unless `train_text` trains it on; where `text`
    is a configuration a fresh one is trained.
    `precompute` scenes are stored before the first step, 0 draws fresh ones at each. `time_mean` and `time_std` are of
    the normal whose sigmoid is sigma (1 is noise), bent by `time_shift` as a schedule is by its shift;
    `sampling_shift` and `generation` are written into the model, for sampling. `score_prompts` questions are painted
    and judged at each evaluation. `start_from` is an exported model of the same sizes to go on from, "" for none.
    """

    network: NetworkConfig
    autoencoder: str
    text: str | WordEncoderConfig = "infinity-nano"
    world: World = "shapes"
    train_text: bool = False
    start_from: str = ""
    side: int
    precompute: int = 0
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0
    condition_drop: float = 0.1
    unknown_share: float = 0.02
    sampling_shift: float = 1.0
    held_out: int = 128
    score_prompts: int = 0
    generation: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        stored = 0 <= self.precompute <= MOST_SCENES
        check("precompute", self.precompute, stored, f"0, or a number of scenes up to {MOST_SCENES}")
        check("time_mean", self.time_mean, math.isfinite(self.time_mean), "a number")
        for name in ("time_std", "time_shift", "sampling_shift"):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and 0 < value <= 100, "a number above 0 and at most 100")
        for name in ("condition_drop", "unknown_share"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")
        check("held_out", self.held_out, 1 <= self.held_out <= MOST_SCENES, f"from 1 to {MOST_SCENES}")
        asked = 0 <= self.score_prompts <= (MOST_SCENES if self.world == "shapes" else 0)
        allowed = f"0, or, of the world of shapes, a number of questions up to {MOST_SCENES}"
        check("score_prompts", self.score_prompts, asked, allowed)
        trained = isinstance(self.text, str) or self.train_text
        check("train_text", self.train_text, trained, "true where text is a configuration, not a model")
        parse_request({"prompt": "-", "width": self.side, "height": self.side, **dict(self.generation)})


class FlowNetwork(nn.Module):
    """What is trained: the network in its adapter, and the word encoder where that is trained too."""

    def __init__(self, velocity: VelocityNetwork, text: WordEncoder | None) -> None:
        super().__init__()
        self.velocity = velocity
        self.text = text


class FlowTask:
    """Predict the velocity of noisy latents."""

    def __init__(self, settings: FlowSettings, batch: int, seed: int) -> None:
        self.settings, self.batch, self.seed = settings, batch, seed
        self.family, make = FAMILIES[type(settings.network)]
        torch.manual_seed(seed)
        self.text = _text_encoder(settings.text)
        folder = _autoencoder_folder(settings.autoencoder, settings.world)
        self.autoencoder, self.autoencoder_config = flow_nano.load_autoencoder(folder)
        self._check_fit()
        torch.manual_seed(seed)
        self.text.requires_grad_(settings.train_text)
        self.network = FlowNetwork(make(settings.network), self.text if settings.train_text else None)
        self._pipeline()  # what it cannot use is told now, and not after the first thousand steps
        if settings.start_from:
            self._go_on_from(Path(settings.start_from).expanduser())
        self.encoding = Encoding(
            encode=lambda image: encode(self.autoencoder, image),
            token_ids=lambda captions: self.text.token_ids(captions, self.text.config.length),
            side=settings.side,
            seed=seed,
            identity=encoders_digest(folder, self.autoencoder_config, self.text.config),
            world=settings.world,
        )
        self.latents: Latents = FreshLatents(self.encoding, batch)

    @property
    def transformer(self) -> nn.Module:
        """The family's network, without its adapter."""
        return self.network.velocity.transformer

    def heavy_modules(self) -> list[nn.Module]:
        encoder = [] if self.settings.precompute else [self.autoencoder.encoder]
        return [*self.network.velocity.heavy_modules(), *encoder]

    def prepare(self, folder: Path, report: Callable[[int], None]) -> None:
        """Store latents of scenes in the run's folder, if settings ask for it."""
        if self.settings.precompute:
            with autocast():  # in bfloat16 errors of 0.004, where latents deviate by 1
                self.latents = store(folder, self.encoding, self.settings.precompute, self.batch, report)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity of this step's batch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        clean, ids_BT = self.latents.batch(step)[:2]
        sigma_B = self._sigmas(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator)
        ids_BT = self._spoilt(ids_BT, generator)
        return self._errors(clean, noise, sigma_B, ids_BT).mean(), {}

    def evaluate(self) -> dict[str, float]:
        """Loss on held-out scenes at fixed times and noise, over all and by bucket of time; 00 is nearly clean."""
        settings = self.settings
        image, captions = held_out_scenes(settings.held_out, settings.side, settings.world)
        clean = torch.cat([encode(self.autoencoder, chunk) for chunk in image.split(_CHUNK)])
        ids_BT = self.encoding.token_ids(captions)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        losses = []
        for bucket in range(_BUCKETS):
            sigma_B = torch.full((len(clean),), (bucket + 0.5) / _BUCKETS)
            parts = zip(*(whole.split(_CHUNK) for whole in (clean, noise, sigma_B, ids_BT)), strict=True)
            losses.append(float(torch.cat([self._errors(*part) for part in parts]).mean()))
        figures = {"validation_loss": sum(losses) / _BUCKETS}
        figures |= {f"validation_loss_{bucket:02d}": loss for bucket, loss in enumerate(losses)}
        if settings.score_prompts:
            figures["score"] = shapes_score(self._pipeline(), settings.score_prompts)
        return figures

    def samples(self) -> Image.Image:
        """Rows: prompts; columns: seeds."""
        return sample_sheet(self._pipeline(), self.settings.world)

    def export(self, folder: Path, facts: Mapping[str, object]) -> None:
        settings = self.settings
        config = {
            "family": self.family,
            "network": asdict(settings.network),
            "text": asdict(self.text.config),
            "autoencoder": asdict(self.autoencoder_config),
            "scheduler": {"shift": settings.sampling_shift},
            "sizes": [[settings.side, settings.side]],
            "generation": self._defaults(),
        }
        parts = {
            "transformer": self.transformer.state_dict(),
            "text": self.text.state_dict(),
            "autoencoder": self.autoencoder.state_dict(),
        }
        save_model(folder, parts, config, facts)

    def _sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        settings = self.settings
        return draw_sigmas(
            count,
            mean=settings.time_mean,
            deviation=settings.time_std,
            shift=settings.time_shift,
            generator=generator,
        )

    def _errors(self, clean: Tensor, noise: Tensor, sigma_B: Tensor, ids_BT: Tensor) -> Tensor:
        """Squared error of the velocity, `[B]`, mean over a latent."""
        sigma_B111 = sigma_B[:, None, None, None]
        noisy = (1 - sigma_B111) * clean + sigma_B111 * noise
        return self._velocity_errors(noisy, sigma_B, ids_BT, noise - clean)

    def _velocity_errors(self, noisy: Tensor, sigma_B: Tensor, ids_BT: Tensor, wanted: Tensor) -> Tensor:
        """Squared error against the velocity that is wanted, `[B]`, mean over a latent."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.settings.train_text):
            features_BTE = self.text(ids_BT)
        with quiet_norms():
            velocity = self.network.velocity(noisy, sigma_B, features_BTE, ids_BT != PAD)
        return F.mse_loss(velocity.float(), wanted, reduction="none").mean(dim=(1, 2, 3))

    def _spoilt(self, ids_BT: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids with some words made unknown, and some prompts made empty."""
        settings = self.settings
        hidden = torch.rand(ids_BT.shape, generator=generator) < settings.unknown_share
        ids_BT = torch.where(hidden & (ids_BT > UNKNOWN + 1), UNKNOWN, ids_BT)
        dropped_B1 = torch.rand((len(ids_BT), 1), generator=generator) < settings.condition_drop
        return torch.where(dropped_B1, self.encoding.token_ids([""]), ids_BT)

    def _defaults(self) -> dict[str, object]:
        return {"width": self.settings.side, "height": self.settings.side, **dict(self.settings.generation)}

    def _check_fit(self) -> None:
        settings = self.settings
        problem = flow_nano.misfit(settings.network, self.text.config, self.autoencoder_config)
        if problem:
            raise RequestError("network", self.family, "made for its text encoder and autoencoder", problem)
        edge = 2 * self.autoencoder_config.stride
        if settings.side % edge:
            raise RequestError("side", settings.side, f"a multiple of {edge} pixels, which a token has")

    def _go_on_from(self, folder: Path) -> None:
        """Take the weights of an exported model.

        Raises WeightsError where its sizes differ, RequestError where it reads words by another encoder.
        """
        model = flow_nano.load(folder)
        fill(self.transformer, model.network.state_dict(), folder)
        if self.network.text is not None:
            fill(self.network.text, model.text.state_dict(), folder)
        elif not _same(self.text, model.text):
            raise RequestError("text", str(self.settings.text), "the word encoder of start_from", f"set text={folder}")

    def _pipeline(self) -> Pipeline:
        """The model as it is, painting as it will once it is exported. Raises RequestError for unusable defaults."""
        settings = self.settings
        model = flow_nano.FlowNano(
            family=self.family,
            network=self.transformer,
            text=self.text,
            autoencoder=self.autoencoder,
            stride=self.autoencoder_config.stride,
            shift=settings.sampling_shift,
            sizes=((settings.side, settings.side),),
            defaults=self._defaults(),
            digest="",
        )
        try:
            return assemble(model, "the model in training", Path("generation"), Build(device=CPU))
        except FileError as error:
            allowed = f"defaults that {self.family} can use"
            raise RequestError("generation", dict(settings.generation), allowed, error.problem) from error


@contextmanager
def quiet_norms() -> Iterator[None]:
    """Without torch's warning that norms under autocast are slow: they are no tenth of a step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


def draw_sigmas(count: int, *, mean: float, deviation: float, shift: float, generator: torch.Generator) -> Tensor:
    """Times `[B]` of a batch, from 0 (clean) to 1 (noise): the sigmoid of a normal, bent towards noise by `shift`.

    Each of `count` equal shares of probability gives one, so that every batch has its early and its late times.
    """
    return bent_sigmas(draw_shares(count, generator), mean=mean, deviation=deviation, shift=shift)


def draw_shares(count: int, generator: torch.Generator) -> Tensor:
    """A number from each of `count` equal parts of 0 to 1, `[B]`."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


def bent_sigmas(shares_B: Tensor, *, mean: float, deviation: float, shift: float) -> Tensor:
    """The times below which these shares of all times lie, `[B]`."""
    sigma_B = torch.sigmoid(mean + deviation * torch.special.ndtri(shares_B))
    return shift * sigma_B / (1 + (shift - 1) * sigma_B)


def _text_encoder(source: str | WordEncoderConfig) -> WordEncoder:
    """A fresh one, or that of a model that ships or of a folder. Raises MissingError."""
    if isinstance(source, WordEncoderConfig):
        return WordEncoder(source)
    name = source
    folder = ZOO / name
    if "/" in name or not (folder / "config.json").is_file():
        folder = Path(name).expanduser()
    if not folder.is_dir():
        raise MissingError(f"the model {name} with a word encoder", "gesso train infinity-nano")
    return load_word_encoder(folder)


def _same(one: WordEncoder, other: WordEncoder) -> bool:
    """Whether two encoders have the same weights."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _autoencoder_folder(name: str, world: World) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise MissingError(f"the trained autoencoder {folder}", f"gesso train {world}-autoencoder")
    return folder


def encoders_digest(folder: Path, autoencoder: KLAutoencoderConfig, text: WordEncoderConfig) -> str:
    """What latents and token ids depend on."""
    weights = digest([shared.part(folder, "autoencoder.safetensors")])
    words = [text.vocabulary, text.length]
    return hashlib.sha256(json.dumps([weights, asdict(autoencoder), words]).encode()).hexdigest()
