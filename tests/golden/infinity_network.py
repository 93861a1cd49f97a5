"""Building the product's Infinity from a side-car, for the checks of kinds d and e. Not here: the checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from gesso.models.infinity.checkpoint import blocks_per_chunk, transformer_state
from gesso.models.infinity.transformer import InfinityConfig, InfinityTransformer
from tests.golden.infinity_rotary import mode
from tests.golden.infinity_tokenizer import AutoencoderSettings
from tests.golden.side_car import BrokenGoldenError, NotYetError, SideCar


class TransformerSettings(SideCar):
    """A published transformer's configuration; defaults are the official settings."""

    depth: int
    embed_dim: int
    num_heads: int
    ffn_hidden: int | None = None
    mlp_ratio: float = 4
    block_chunks: int = 1
    text_channels: int
    text_maxlen: int
    pool_heads: int
    d_vae: int
    head_out: int | None = None
    use_bit_label: int = 1
    shared_aln: bool = True
    head_aln: bool = True
    head_depth: int = 1
    cos_attn: bool = True
    norm_eps: float = 1e-6
    rms_norm: bool = False
    swiglu: bool = False
    drop_path_rate: float = 0.0
    rope2d_each_sa_layer: int = 1
    rope2d_normalized_by_hw: int = 2
    add_lvl_embeding_only_first_block: int = 1
    use_scale_schedule_embedding: int = 0
    apply_spatial_patchify: int = 0
    cond_drop_rate: float = 0.1
    cross_attn_layer_scale: float = -1.0

    def refuse(self) -> None:
        """Raises NotYetError for the first setting that the product cannot express."""
        only: dict[str, tuple[object, object]] = {
            "use_bit_label": (self.use_bit_label, 1),
            "shared_aln": (self.shared_aln, True),
            "head_aln": (self.head_aln, True),
            "head_depth": (self.head_depth, 1),
            "cos_attn": (self.cos_attn, True),
            "norm_eps": (self.norm_eps, 1e-6),
            "rms_norm": (self.rms_norm, False),
            "swiglu": (self.swiglu, False),
            "use_scale_schedule_embedding": (self.use_scale_schedule_embedding, 0),
            "head_out": (self.head_out or 2 * self.d_vae, 2 * self.d_vae),
        }
        for name, (stated, known) in only.items():
            if stated != known:
                raise NotYetError(f"{name} {stated}; the product has only {known}")


class GenerationSideCar(SideCar):
    """What kind e says of one generation; lists have one value a scale."""

    config: TransformerSettings
    vae_config: AutoencoderSettings | None = None
    scale_schedule_thw: list[tuple[int, int, int]]
    text_lens: list[int]
    negative_text_lens: list[int] | None = None
    cfg_list: float | list[float]
    tau_list: float | list[float]
    top_k: int
    top_p: float
    g_seed: int = 0
    cfg_insertion_layer: int | list[int] = 0
    gt_leak: int = 0
    image_float_stats: dict[str, float] = Field(default_factory=dict)

    def guidance(self, scales: int) -> list[float]:
        """One value a scale. Raises BrokenGoldenError where there are too few."""
        return _listed("cfg_list", self.cfg_list, scales)

    def temperatures(self, scales: int) -> list[float]:
        """One value a scale. Raises BrokenGoldenError where there are too few."""
        return _listed("tau_list", self.tau_list, scales)

    @property
    def guided_layer(self) -> int:
        """0: logits are mixed; -k: hidden states. Raises NotYetError for several places at once."""
        layers = [self.cfg_insertion_layer] if isinstance(self.cfg_insertion_layer, int) else self.cfg_insertion_layer
        if len(layers) != 1 or layers[0] > 0:
            raise NotYetError(f"guidance at layers {layers}")
        return layers[0]


def _listed(name: str, stated: float | Sequence[float], scales: int) -> list[float]:
    values = [float(stated)] * scales if isinstance(stated, int | float) else [float(value) for value in stated]
    if len(values) < scales:
        raise BrokenGoldenError(f"{name} has {len(values)} values for {scales} scales")
    return values


def build_transformer(settings: TransformerSettings, published: Mapping[str, Tensor]) -> InfinityTransformer:
    """The product's network with a published state, loaded strictly by name and shape, in evaluation mode."""
    settings.refuse()
    if settings.add_lvl_embeding_only_first_block:
        every = 0
    else:
        every = blocks_per_chunk(published) or settings.depth // settings.block_chunks
    config = InfinityConfig(
        depth=settings.depth,
        width=settings.embed_dim,
        heads=settings.num_heads,
        bits=settings.d_vae,
        text_width=settings.text_channels,
        text_length=settings.text_maxlen,
        pool_heads=settings.pool_heads,
        patchify=bool(settings.apply_spatial_patchify),
        feed_forward_width=settings.ffn_hidden or round(settings.mlp_ratio * settings.embed_dim / 256) * 256,
        scale_embeddings=len(published["lvl_embed.weight"]) if "lvl_embed.weight" in published else 15,
        scale_embedding_every=every,
        rotary=mode(settings.rope2d_normalized_by_hw) if settings.rope2d_each_sa_layer else None,
        cross_attention_scale=None if settings.cross_attn_layer_scale < 0 else settings.cross_attn_layer_scale,
    )
    network = InfinityTransformer(config).eval()
    network.load_state_dict(transformer_state(published), strict=True)
    return network


def unpacked(rows: Tensor, lengths: Sequence[int], prefix_sums: Tensor | None = None) -> Tensor:
    """Packed text `[sum of lengths, E]` as the product takes it, `[B,T,E]`, zeros after each prompt's end."""
    if sum(lengths) != len(rows):
        raise BrokenGoldenError(f"{len(rows)} rows of text for lengths {list(lengths)}")
    if prefix_sums is not None and prefix_sums.diff().tolist() != list(lengths):
        raise BrokenGoldenError(f"prefix sums {prefix_sums.tolist()} for lengths {list(lengths)}")
    return torch.nn.utils.rnn.pad_sequence(list(rows.split(list(lengths))), batch_first=True)


def packed(features_BTE: Tensor, lengths: Sequence[int]) -> Tensor:
    """The inverse of `unpacked`."""
    return torch.cat([features[:length] for features, length in zip(features_BTE, lengths, strict=True)])
