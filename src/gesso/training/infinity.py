"""The task of training an Infinity transformer (with a word encoder) on a world's pictures, with self-correction.

Not here: the loop (`loop`), the loss (`infinity_loss`), the networks (`models/infinity`), generation
(`pipelines/infinity`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from gesso.errors import MissingError, RequestError
from gesso.models.infinity.autoencoder import Autoencoder
from gesso.models.infinity.correction import draw_flips, training_tokens
from gesso.models.infinity.initialization import InitialScales, initialize
from gesso.models.infinity.scales import ScaleSchedule
from gesso.models.infinity.transformer import InfinityConfig, InfinityTransformer, Layout
from gesso.models.word_encoder import PAD, UNKNOWN, WordEncoder, WordEncoderConfig
from gesso.pipelines.infinity import InfinityPipeline
from gesso.pipelines.infinity_state import GenerationDefaults
from gesso.training.export import save_model
from gesso.training.infinity_loss import bitwise_loss, margin_weights, scale_weights
from gesso.training.painting import sample_sheet, shapes_score
from gesso.training.pictures import held_out_scenes, scenes_of_step
from gesso.training.settings import MOST_SCENES, check
from gesso.weights.files import fill
from gesso.weights.infinity import load_schedules, load_tokenizer, load_transformer, load_word_encoder, parse


@dataclass(frozen=True, kw_only=True)
class InfinitySettings:
    """`tokenizer` is the folder of an exported tokenizer; `generation` are the defaults written into the model.

    `start_from` is the folder of an exported model of the same sizes to go on from, "" to begin from nothing; scales
    that it had not begin as its last one.
    `train_text` is whether the word encoder learns too, or stays that of `start_from`. `reweight` gives every scale its
    due (`scale_weights`), `weigh_margins` every bit (`margin_weights`). `score_prompts` questions of the world's judge
    are part of an evaluation.
    """

    network: InfinityConfig
    text: WordEncoderConfig
    tokenizer: str
    start_from: str = ""
    train_text: bool = True
    schedule: ScaleSchedule
    side: int
    flip_strength: float = 0.2
    flip_scales: int = 6
    condition_drop: float = 0.1
    unknown_share: float = 0.02
    reweight: bool = True
    weigh_margins: bool = False
    held_out: int = 128
    score_prompts: int = 0
    scales: InitialScales = field(default_factory=lambda: InitialScales(gate=1.0))
    generation: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        for name in ("flip_strength", "condition_drop", "unknown_share"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")
        check("flip_scales", self.flip_scales, self.flip_scales >= 0, "at least 0")
        check("held_out", self.held_out, 1 <= self.held_out <= MOST_SCENES, f"from 1 to {MOST_SCENES}")
        check("side", self.side, self.side >= 1, "at least 1")
        allowed = f"from 0 to {MOST_SCENES}"
        check("score_prompts", self.score_prompts, 0 <= self.score_prompts <= MOST_SCENES, allowed)
        learned = self.train_text or bool(self.start_from)
        check("train_text", self.train_text, learned, "true where there is no start_from, whose word encoder it reads")


class InfinityNetwork(nn.Module):
    """Word encoder and transformer as one module, so that both are trained, averaged and compiled together."""

    def __init__(self, settings: InfinitySettings) -> None:
        super().__init__()
        self.text = WordEncoder(settings.text)
        self.transformer = InfinityTransformer(settings.network)
        initialize(self.transformer, settings.scales)

    def forward(self, ids_BT: Tensor, dropped_B: Tensor, inputs_BLK: Tensor, layout: Layout) -> Tensor:
        """Logits `[B,L,2K]`."""
        features_BTE = self.transformer.drop_text(self.text(ids_BT).float(), dropped_B)
        text = self.transformer.read_text(features_BTE, ids_BT != PAD)
        return self.transformer(inputs_BLK, text, layout)


class InfinityTask:
    """Predict the bits of every scale from the scales before it, some of whose bits are wrong."""

    def __init__(self, settings: InfinitySettings, batch: int, seed: int) -> None:
        self.settings, self.batch, self.seed = settings, batch, seed
        self.tokenizer = _tokenizer(settings)
        torch.manual_seed(seed)
        self.network = InfinityNetwork(settings)
        if settings.start_from:
            _go_on_from(Path(settings.start_from), self.network, len(settings.schedule))
        self.network.text.requires_grad_(settings.train_text)
        self.grids = settings.schedule.latent_grids(settings.network.patchify)
        self.layout = self.network.transformer.layout(settings.schedule)
        self.weights_L = scale_weights(settings.schedule) if settings.reweight else None

    def heavy_modules(self) -> list[nn.Module]:
        return [self.network, self.tokenizer.encoder]

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Bitwise cross entropy of this step's batch."""
        settings = self.settings
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        image, captions = scenes_of_step(step, self.batch, settings.side, self.seed)
        with torch.no_grad():
            latent = self.tokenizer.encode(image).float()
        flips = draw_flips(
            latent, self.grids, strength=settings.flip_strength, scales=settings.flip_scales, generator=generator
        )
        tokens = training_tokens(latent, self.grids, flips, patchify=settings.network.patchify)
        ids_BT = self._ids(captions, generator)
        dropped_B = torch.rand(len(ids_BT), generator=generator) < settings.condition_drop
        logits = self.network(ids_BT, dropped_B, tokens.inputs_BLK, self.layout)
        weights_BLK = margin_weights(tokens.margins_BLK) if settings.weigh_margins else None
        loss = bitwise_loss(logits, tokens.labels_BLK, self.weights_L, weights_BLK)
        right = _bits(logits) == tokens.labels_BLK
        return loss, {"bit_accuracy": right.float().mean()}

    def evaluate(self) -> dict[str, float]:
        """Loss and bit accuracy on held-out scenes without flips, over all and by scale."""
        image, captions = held_out_scenes(self.settings.held_out, self.settings.side)
        latent = self.tokenizer.encode(image).float()
        tokens = training_tokens(latent, self.grids, patchify=self.settings.network.patchify)
        ids_BT = self.network.text.token_ids(captions)
        dropped_B = torch.zeros(len(ids_BT), dtype=torch.bool)
        logits = self.network(ids_BT, dropped_B, tokens.inputs_BLK, self.layout)
        right_BLK = _bits(logits) == tokens.labels_BLK
        figures = {
            "validation_loss": float(bitwise_loss(logits, tokens.labels_BLK)),
            "bit_accuracy": float(right_BLK.float().mean()),
        }
        starts = self.settings.schedule.starts
        for scale in range(len(self.settings.schedule)):
            part = right_BLK[:, starts[scale] : starts[scale + 1]]
            figures[f"bit_accuracy_{scale:02d}"] = float(part.float().mean())
        if self.settings.score_prompts:
            figures["score"] = shapes_score(self._pipeline(), self.settings.score_prompts)
        return figures

    def samples(self) -> Image.Image:
        """Rows: prompts; columns: seeds."""
        return sample_sheet(self._pipeline())

    def _pipeline(self) -> InfinityPipeline:
        """The model as it is, painting as it will once it is exported."""
        side = self.settings.side
        return InfinityPipeline(
            transformer=self.network.transformer,
            autoencoder=self.tokenizer,
            text=self.network.text,
            schedules={(side, side): self.settings.schedule},
            defaults=parse(GenerationDefaults, self._defaults(), Path("generation")),
            name="in training",
            digest="",
        )

    def export(self, folder: Path, facts: Mapping[str, object]) -> None:
        settings = self.settings
        config = {
            "family": "infinity",
            "network": asdict(settings.network),
            "text": asdict(settings.text),
            "tokenizer": asdict(self.tokenizer.config),
            "schedules": {f"{settings.side}x{settings.side}": asdict(settings.schedule)},
            "generation": self._defaults(),
        }
        parts = {
            "transformer": self.network.transformer.state_dict(),
            "text": self.network.text.state_dict(),
            "tokenizer": self.tokenizer.state_dict(),
        }
        save_model(folder, parts, config, facts)

    def _defaults(self) -> dict[str, object]:
        return {"width": self.settings.side, "height": self.settings.side, **dict(self.settings.generation)}

    def _ids(self, captions: list[str], generator: torch.Generator | None) -> Tensor:
        """Token ids, always as wide as the encoder is long; with a generator, some words are made unknown."""
        ids_BT = self.network.text.token_ids(captions, self.settings.text.length)
        if generator is None:
            return ids_BT
        hidden = torch.rand(ids_BT.shape, generator=generator) < self.settings.unknown_share
        return torch.where(hidden & (ids_BT > UNKNOWN + 1), UNKNOWN, ids_BT)


def _tokenizer(settings: InfinitySettings) -> Autoencoder:
    """The trained tokenizer, checked to fit. Raises MissingError where there is none, RequestError where it differs."""
    folder = Path(settings.tokenizer)
    if not folder.is_dir():
        raise MissingError(f"the trained tokenizer {folder}", "gesso train shapes-tokenizer")
    tokenizer = load_tokenizer(folder)
    cells = 4 if settings.network.patchify else 1
    if tokenizer.config.bits * cells != settings.network.bits:
        bits = f"a tokenizer of {settings.network.bits} bits a token"
        raise RequestError("tokenizer", settings.tokenizer, bits, f"it has {tokenizer.config.bits * cells}")
    side = settings.schedule.latent_grids(settings.network.patchify)[-1][0] * tokenizer.config.stride
    if side != settings.side:
        raise RequestError("side", settings.side, f"what schedule and tokenizer make, which is {side} pixels")
    return tokenizer


def _go_on_from(folder: Path, network: InfinityNetwork, scales: int) -> None:
    """Take the weights of an exported model; scales that it had not begin as its last one.

    Raises WeightsError where its sizes differ.
    """
    for part, source in ((network.transformer, load_transformer(folder)), (network.text, load_word_encoder(folder))):
        fill(part, source.state_dict(), folder)
    known = max(map(len, load_schedules(folder).values()))
    embedding_NC = network.transformer.scale_embedding.weight.detach()
    embedding_NC[known:scales] = embedding_NC[known - 1]


def _bits(logits_BLV: Tensor) -> Tensor:
    zero, one = logits_BLV.detach().unflatten(-1, (-1, 2)).unbind(-1)
    return one > zero
