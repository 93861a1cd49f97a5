"""S3-DiT: noisy latents, a time each and captions in; velocities out. One stream for pictures and text.

Notable: captions and pictures are first refined apart, captions without regard to time; every token of a sample then
attends to all others; norms before and after each branch; one linear a block makes scales and gates of the time.
Source: Z-Image, arXiv:2511.22699; names of parameters are those of the official files.

Convention of time: 0 is noise, 1 is clean, and the output is clean - noise: the sampler's velocity negated.

Everything that stays the same from step to step is made once: `read` refines captions (and, for editing, pictures and
their features), `join` lays out samples that step together. `forward` then runs without a look at any number on the
device. Where samples differ in length nothing is padded to the longest.
Not here: the sampling loop (`pipelines/z_image`), files (`weights/z_image`), sizes (`config`).
Shapes: S samples, I images, B rows of n tokens, D width, C latent channels, F frames, h w latent cells, P numbers of a
patch, E text width, M width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.layers import Block, FinalLayer, TimeEmbedder
from gesso.models.s3dit.layout import Layout, Sample, lay_out, lay_out_alone
from gesso.models.s3dit.packing import (
    ContextShape,
    Size,
    caption_positions,
    feature_positions,
    feature_rows,
    padded,
    patchify,
    token_count,
    unpatchify,
)


class Prompt(NamedTuple):
    """What a sample is made with, as it comes from encoders.

    `captions` are features `[L,E]` of each piece. More than one piece, `conditions` (clean latents `[C,F,h,w]`) and
    `features` of these pictures (`[rows,columns,width]`, one each or none) are for `editing`.
    """

    captions: Sequence[Tensor]
    conditions: Sequence[Tensor] = ()
    features: Sequence[Tensor] = ()
    editing: bool = False

    @property
    def shape(self) -> ContextShape:
        return ContextShape(
            captions=tuple(len(piece) for piece in self.captions),
            conditions=tuple(size_of(latent) for latent in self.conditions),
            features=tuple((grid.shape[0], grid.shape[1]) for grid in self.features),
            editing=self.editing,
        )


class Context(NamedTuple):
    """What the network has made of a prompt: refined caption and features `[N,D]`, embedded conditions `[M,D]`."""

    tokens_ND: Tensor
    conditions_MD: Tensor
    shape: ContextShape


class Company(NamedTuple):
    """Samples that are evaluated together: where their tokens lie, and the contexts of all of them."""

    layout: Layout
    tokens_ND: Tensor
    conditions_MD: Tensor


class S3DiT(nn.Module):
    """The whole network. Fill it with `initialize` (training) or a checkpoint (`weights/z_image`).

    `repeated_blocks` are what is worth compiling.
    """

    repeated_blocks: ClassVar = (Block,)

    def __init__(self, config: S3DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, refiners = config.dim, range(config.n_refiner_layers)
        patch = f"{config.patch[1]}-{config.patch[0]}"
        self.all_x_embedder = nn.ModuleDict({patch: nn.Linear(config.patch_width, width)})
        self.all_final_layer = nn.ModuleDict({patch: FinalLayer(config)})
        self.t_embedder = TimeEmbedder(config)
        self.cap_embedder = _embedder(config, config.cap_feat_dim)
        self.noise_refiner = nn.ModuleList(Block(config) for _ in refiners)
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in refiners)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.x_pad_token = nn.Parameter(torch.zeros(1, width))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, width))
        if config.siglip_feat_dim is not None:
            self.siglip_embedder = _embedder(config, config.siglip_feat_dim)
            self.siglip_refiner = nn.ModuleList(Block(config, modulated=False) for _ in refiners)
            self.siglip_pad_token = nn.Parameter(torch.zeros(1, width))
        self._patch = patch

    @property
    def dtype(self) -> torch.dtype:
        return self.x_pad_token.dtype

    @property
    def device(self) -> torch.device:
        return self.x_pad_token.device

    # ---- once a prompt ----------------------------------------------------------------------------------------------

    def read(self, prompts: Sequence[Prompt]) -> list[Context]:
        """Everything of prompts that stays the same over all steps. Raises ValueError for parts that do not fit."""
        shapes = [prompt.shape for prompt in prompts]
        captions = self._refined(
            "context_refiner",
            self.cap_embedder(self._joined([piece for prompt in prompts for piece in prompt.captions])),
            self.cap_pad_token,
            [shape.captions for shape in shapes],
            [caption_positions(shape) for shape in shapes],
        )
        features = self._features(prompts, shapes)
        return [
            Context(
                tokens_ND=torch.cat((caption_ND, features[index])) if index in features else caption_ND,
                conditions_MD=self._conditions(prompts[index].conditions),
                shape=shapes[index],
            )
            for index, caption_ND in enumerate(captions)
        ]

    def _features(self, prompts: Sequence[Prompt], shapes: Sequence[ContextShape]) -> dict[int, Tensor]:
        """Refined features of pictures, by the number of the prompt that has any."""
        having = [index for index, prompt in enumerate(prompts) if prompt.features]
        if not having:
            return {}
        if self.config.siglip_feat_dim is None:
            raise ValueError("this network reads no features of pictures")
        refined = self._refined(
            "siglip_refiner",
            self.siglip_embedder(self._joined([feature_rows(g) for index in having for g in prompts[index].features])),
            self.siglip_pad_token,
            [shapes[index].feature_lengths for index in having],
            [feature_positions(shapes[index]) for index in having],
        )
        return dict(zip(having, refined, strict=True))

    def _refined(
        self,
        refiner: str,
        embedded_ND: Tensor,
        pad_1D: Tensor,
        lengths: Sequence[Sequence[int]],
        positions: Sequence[Tensor],
    ) -> list[Tensor]:
        """Each sequence padded and through a refiner without time; the pieces of one attend to each other."""
        rows, order_N = lay_out_alone(self.config, lengths, positions, self.device)
        x_BnD = torch.cat((embedded_ND, pad_1D))[rows.source_Bn]
        for block in self.get_submodule(refiner).children():
            x_BnD = block(x_BnD, rows)
        return list(x_BnD.flatten(0, 1)[order_N].split([len(position_n3) for position_n3 in positions]))

    def _conditions(self, latents: Sequence[Tensor]) -> Tensor:
        """Embedded patches of clean latents, each picture padded."""
        parts: list[Tensor] = []
        for latent_CFhw in latents:
            embedded_nD = self._embed(latent_CFhw)
            missing = padded(len(embedded_nD)) - len(embedded_nD)
            parts += [embedded_nD, self.x_pad_token.expand(missing, -1)]
        return torch.cat(parts) if parts else self.x_pad_token[:0]

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.to(self.device, self.dtype) for part in parts])

    def _embed(self, latent_CFhw: Tensor) -> Tensor:
        patches_nP = patchify(latent_CFhw.to(self.device, self.dtype), self.config.patch)
        return self.all_x_embedder[self._patch](patches_nP)

    # ---- once a company ---------------------------------------------------------------------------------------------

    def join(
        self, images: Sequence[Size], contexts: Sequence[Context], image_of: Sequence[int] | None = None
    ) -> Company:
        """Samples that will be evaluated together, as often as wanted.

        `images` are sizes of latents in cells; `image_of` says of which of them each context makes a result, in order
        if not given. Pictures that two samples see alike go through their own refiner once.
        Raises ValueError for a size that patches do not divide, or that has more positions than the network.
        """
        chosen = range(len(images)) if image_of is None else image_of
        samples = [Sample(image, context.shape) for image, context in zip(chosen, contexts, strict=True)]
        return Company(
            layout=lay_out(self.config, images, samples, self.device),
            tokens_ND=torch.cat([context.tokens_ND for context in contexts]),
            conditions_MD=torch.cat([context.conditions_MD for context in contexts]),
        )

    # ---- every step -------------------------------------------------------------------------------------------------

    def forward(self, latents: Sequence[Tensor], time_I: Tensor, company: Company) -> list[Tensor]:
        """A velocity `[C,F,h,w]` for each sample of the company, from its image's latent at its image's time.

        `latents` are `[C,F,h,w]` each, in the network's dtype; `time_I` is float32, 0 noise to 1 clean.
        """
        layout = company.layout
        if layout.clean:  # a last row, for what is not noisy
            time_I = torch.cat((time_I, time_I.new_ones(1)))
        time_IM = self.t_embedder(time_I)
        patches_NP = torch.cat([patchify(latent_CFhw, self.config.patch) for latent_CFhw in latents])
        embedded_ND = self.all_x_embedder[self._patch](patches_NP)
        x_BnD = torch.cat((embedded_ND, self.x_pad_token, company.conditions_MD))[layout.pictures.source_Bn]
        for block in self.noise_refiner:
            x_BnD = block(x_BnD, layout.pictures, time_IM)
        x_BnD = torch.cat((x_BnD.flatten(0, 1), company.tokens_ND))[layout.whole.source_Bn]
        for block in self.layers:
            x_BnD = block(x_BnD, layout.whole, time_IM)
        x_BnD = x_BnD.flatten(0, 1)[layout.target_Bn]
        patches_NP = self.all_final_layer[self._patch](x_BnD, time_IM, layout.target_time_B1).flatten(0, 1)
        counts = [token_count(size, self.config.patch) for size in layout.sizes]
        parts = zip(patches_NP.split(counts), layout.sizes, strict=True)
        return [unpatchify(patches_nP, size, self.config.patch) for patches_nP, size in parts]


def size_of(latent_CFhw: Tensor) -> Size:
    """Frames, height and width of a latent."""
    _, frames, height, width = latent_CFhw.shape
    return frames, height, width


def _embedder(config: S3DiTConfig, width: int) -> nn.Sequential:
    return nn.Sequential(nn.RMSNorm(width, eps=config.norm_eps), nn.Linear(width, config.dim))
