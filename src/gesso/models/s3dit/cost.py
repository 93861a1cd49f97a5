"""What an S3-DiT costs: floating-point operations and bytes, counted from its sizes.

A multiply-add counts as two operations. Norms, rotations, activations and sampling are left out: they are below 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence

from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.packing import ContextShape, Size, padded, token_count


def read_flops(config: S3DiTConfig, context: ContextShape) -> float:
    """Operations of reading a prompt, once a picture: captions and features refined, conditions embedded."""
    embedding = 2.0 * sum(context.captions) * config.cap_feat_dim * config.dim
    embedding += 2.0 * sum(context.feature_lengths) * (config.siglip_feat_dim or 0) * config.dim
    conditions = sum(token_count(size, config.patch) for size in context.conditions)
    embedding += 2.0 * conditions * config.patch_width * config.dim
    sequences = (context.caption_tokens, context.feature_tokens)
    return embedding + config.n_refiner_layers * sum(_block_flops(config, tokens) for tokens in sequences)


def evaluation_flops(config: S3DiTConfig, size: Size, contexts: Sequence[ContextShape]) -> float:
    """Operations of evaluating one image of this size, in cells, with each of these contexts."""
    pictures = {tuple(context.starts()): picture_tokens(config, size, context) for context in contexts}
    refined = sum(_block_flops(config, tokens) for tokens in pictures.values())
    main = sum(_block_flops(config, whole_tokens(config, size, context)) for context in contexts)
    modulation = 2.0 * config.modulation_width * 4 * config.dim * (config.n_refiner_layers + config.n_layers)
    ends = 2.0 * token_count(size, config.patch) * config.patch_width * config.dim * (1 + len(contexts))
    return config.n_refiner_layers * refined + config.n_layers * main + modulation + ends


def picture_tokens(config: S3DiTConfig, size: Size, context: ContextShape) -> int:
    """Tokens of a sample's pictures, padding included."""
    return sum(padded(token_count(each, config.patch)) for each in (*context.conditions, size))


def whole_tokens(config: S3DiTConfig, size: Size, context: ContextShape) -> int:
    """Tokens of a whole sample, padding included."""
    return picture_tokens(config, size, context) + context.caption_tokens + context.feature_tokens


def working_bytes(config: S3DiTConfig, tokens: int, bytes_each: int) -> int:
    """About what an evaluation of so many tokens holds at once beside weights.

    That is the stream, what a branch reads and makes of it, and the feed-forward's two halves.
    """
    return tokens * (4 * config.dim + 2 * config.hidden) * bytes_each


def _block_flops(config: S3DiTConfig, tokens: int) -> float:
    linear = 2.0 * tokens * (4 * config.dim**2 + 3 * config.dim * config.hidden)
    return linear + 4.0 * tokens**2 * config.dim
