"""Where every token of many samples lies: no padding between samples, equal lengths side by side.

Made once a company of samples, from numbers alone; the network then only gathers. Tokens of all samples lie one after
another, so that linears and norms waste nothing; attention runs over each group of equally long samples, without a
mask, so that nothing can leak. Where all samples are equally long, rows are a plain batch.
Not here: positions (`packing`), tensors of samples (`transformer`).
Shapes: B rows of n tokens: one a sample where all are equally long, else one row of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from gesso.devices import CPU
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.packing import (
    ContextShape,
    Size,
    caption_positions,
    feature_positions,
    padded,
    picture_positions,
    token_count,
)
from gesso.models.s3dit.rotary import turns


class Rows(NamedTuple):
    """Token sequences, ready to be gathered and attended to.

    `groups` are (samples, tokens of each), in order. `source_Bn` says where each token is taken from, `turns_Bn1P2` how
    it is rotated, and `time_B1` which row of the time table modulates it: `[B,1]`, `[B,n]`, or None for no modulation.
    """

    groups: tuple[tuple[int, int], ...]
    source_Bn: Tensor
    time_B1: Tensor | None
    turns_Bn1P2: Tensor


class Layout(NamedTuple):
    """What a forward needs to know of its samples; see `lay_out`.

    `pictures` are taken from (patches of all images, the padding token, conditions of all samples); `whole` from
    (pictures, contexts of all samples). `target_Bn` is where the tokens of the results lie in `whole`, and
    `target_time_B1` their row of the time table. `sizes` are those of the results. `clean` says whether the time table
    has a last row, for what is not noisy. `spans` are where each sample's tokens begin in the flat rows of `whole`, and
    how many they are; `picture_spans` the same of its pictures in those of `pictures`, which samples may share.
    """

    pictures: Rows
    whole: Rows
    target_Bn: Tensor
    target_time_B1: Tensor
    sizes: tuple[Size, ...]
    clean: bool
    spans: tuple[tuple[int, int], ...]
    picture_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sample:
    """One result of a forward: the image that it is made of, and the shape of the context that it is made with.

    Samples of one image (its prompt and its negative prompt) have the same conditions.
    """

    image: int
    context: ContextShape

    def sizes(self, images: Sequence[Size]) -> list[Size]:
        """Of its pictures in order: conditions, then what is made."""
        return [*self.context.conditions, images[self.image]]


@dataclass(frozen=True)
class _Tokens:
    """A sequence to be: where its tokens come from, what modulates them (empty for nothing), where they stand."""

    source_n: Tensor
    time_n: Tensor
    positions_n3: Tensor

    def __len__(self) -> int:
        return len(self.source_n)


def lay_out(
    config: S3DiTConfig, images: Sequence[Size], samples: Sequence[Sample], device: torch.device | str = CPU
) -> Layout:
    """The layout of samples of images of these sizes. Raises ValueError where a size or a position does not fit."""
    pictures = _all_pictures(config, images, samples)
    keys = [(sample.image, *sample.context.starts()) for sample in samples]  # equal ones are the same tokens
    distinct = dict(zip(keys, pictures, strict=True))
    picture_rows, begins = _rows(config, list(distinct.values()))
    begin_of = dict(zip(distinct, begins, strict=True))
    context_begin = sum(len(tokens) for tokens in distinct.values())
    whole: list[_Tokens] = []
    for sample, key, tokens in zip(samples, keys, pictures, strict=True):
        placed = replace(tokens, source_n=torch.arange(len(tokens)) + begin_of[key])
        whole.append(_whole(sample, len(images), placed, context_begin))
        context_begin += sample.context.caption_tokens + sample.context.feature_tokens
    whole_rows, begins = _rows(config, whole)
    targets = [begin + _target_offset(config, sample) for begin, sample in zip(begins, samples, strict=True)]
    counts = [token_count(images[sample.image], config.patch) for sample in samples]
    target = [torch.arange(begin, begin + count) for begin, count in zip(targets, counts, strict=True)]
    times = [torch.full((count,), sample.image) for count, sample in zip(counts, samples, strict=True)]
    return Layout(
        pictures=_moved(picture_rows, device),
        whole=_moved(whole_rows, device),
        target_Bn=_batched(target).to(device),
        target_time_B1=_shortened(_batched(times)).to(device),
        sizes=tuple(images[sample.image] for sample in samples),
        clean=any(sample.context.conditions for sample in samples),
        spans=tuple((begin, len(tokens)) for begin, tokens in zip(begins, whole, strict=True)),
        picture_spans=tuple((begin_of[key], len(tokens)) for key, tokens in zip(keys, pictures, strict=True)),
    )


def lay_out_alone(
    config: S3DiTConfig,
    lengths: Sequence[Sequence[int]],
    positions: Sequence[Tensor],
    device: torch.device | str = CPU,
) -> tuple[Rows, Tensor]:
    """Rows of sequences that are refined by themselves, and what puts them back in order.

    `lengths` are those of every piece of each sequence, before padding; `positions` `[n,3]` have the padding. Tokens
    are taken from (all tokens without padding, the padding token). The second value gathers the padded sequences from
    the flat rows, one after the other.
    """
    padding = sum(sum(pieces) for pieces in lengths)
    tokens: list[_Tokens] = []
    begin = 0
    for pieces, position_n3 in zip(lengths, positions, strict=True):
        source: list[Tensor] = []
        for length in pieces:
            source.append(_padded_source(begin, length, padding))
            begin += length
        tokens.append(_Tokens(torch.cat(source), torch.zeros(0), position_n3))
    rows, begins = _rows(config, tokens)
    order = [torch.arange(begin, begin + len(sequence)) for begin, sequence in zip(begins, tokens, strict=True)]
    return _moved(rows, device), torch.cat(order).to(device)


def _all_pictures(config: S3DiTConfig, images: Sequence[Size], samples: Sequence[Sample]) -> list[_Tokens]:
    """The pictures of each sample: conditions, then the target; each padded."""
    counts = [token_count(size, config.patch) for size in images]
    begins, padding = _begins(counts), sum(counts)
    condition = padding + 1
    pictures: list[_Tokens] = []
    for sample in samples:
        source: list[Tensor] = []
        for size in sample.context.conditions:
            source.append(torch.arange(condition, condition + padded(token_count(size, config.patch))))
            condition += len(source[-1])
        source.append(_padded_source(begins[sample.image], counts[sample.image], padding))
        times = [torch.full((len(part),), len(images)) for part in source[:-1]]
        times.append(torch.full((len(source[-1]),), sample.image))
        places = zip(sample.context.starts(), sample.sizes(images), strict=True)
        positions = [picture_positions(start, size, config.patch) for start, size in places]
        pictures.append(_Tokens(torch.cat(source), torch.cat(times), torch.cat(positions)))
    return pictures


def _whole(sample: Sample, image_count: int, pictures: _Tokens, begin: int) -> _Tokens:
    """All tokens of a sample whose context begins at `begin`.

    Pictures come before the caption; in editing they come between the caption and the features. What belongs to a
    condition is modulated as it is.
    """
    context = sample.context
    conditions = len(context.conditions)
    caption = _context_tokens(begin, context.captions, caption_positions(context), sample, image_count, conditions)
    if not context.editing:
        return _joined([pictures, caption])
    if not context.features:
        return _joined([caption, pictures])
    lengths, begin = context.feature_lengths, begin + context.caption_tokens
    features = _context_tokens(begin, lengths, feature_positions(context), sample, image_count, conditions)
    return _joined([caption, pictures, features])


def _context_tokens(
    begin: int, lengths: Sequence[int], positions_n3: Tensor, sample: Sample, image_count: int, conditions: int
) -> _Tokens:
    """Refined tokens that lie one after the other; as many first pieces as there are conditions belong to these."""
    times = [image_count if piece < conditions else sample.image for piece in range(len(lengths))]
    time_n = torch.tensor(times).repeat_interleave(torch.tensor([padded(length) for length in lengths]))
    return _Tokens(torch.arange(begin, begin + len(positions_n3)), time_n, positions_n3)


def _target_offset(config: S3DiTConfig, sample: Sample) -> int:
    """Tokens of a sample before those of what is made."""
    before = sample.context.caption_tokens if sample.context.editing else 0
    return before + sum(padded(token_count(size, config.patch)) for size in sample.context.conditions)


def _rows(config: S3DiTConfig, tokens: Sequence[_Tokens]) -> tuple[Rows, list[int]]:
    """Rows of sequences, equally long ones side by side, and where each of them begins in the flat rows."""
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    ordered = [tokens[index] for index in order]
    lengths = [len(sequence) for sequence in ordered]
    groups = tuple((lengths.count(length), length) for length in dict.fromkeys(lengths))
    turns_LP2 = turns(config, torch.cat([sequence.positions_n3 for sequence in ordered]))
    source_Bn = _batched([sequence.source_n for sequence in ordered])
    modulated = all(len(sequence.time_n) for sequence in ordered)
    rows = Rows(
        groups=groups,
        source_Bn=source_Bn,
        time_B1=_shortened(_batched([sequence.time_n for sequence in ordered])) if modulated else None,
        turns_Bn1P2=turns_LP2.view(*source_Bn.shape, 1, *turns_LP2.shape[1:]),
    )
    begin_of = dict(zip(order, _begins(lengths), strict=True))
    return rows, [begin_of[index] for index in range(len(tokens))]


def _batched(parts: Sequence[Tensor]) -> Tensor:
    """One row a part where all are equally long, else one row of all."""
    equal = len({len(part) for part in parts}) == 1
    return torch.stack(list(parts)) if equal else torch.cat(list(parts))[None]


def _shortened(time_Bn: Tensor) -> Tensor:
    """`[B,1]` where every row has one value only."""
    return time_Bn[:, :1] if bool((time_Bn == time_Bn[:, :1]).all()) else time_Bn


def _padded_source(begin: int, length: int, padding: int) -> Tensor:
    """`length` tokens from `begin`, then the padding token as often as it takes."""
    return torch.cat((torch.arange(begin, begin + length), torch.full((padded(length) - length,), padding)))


def _begins(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][: len(lengths)]


def _joined(parts: Sequence[_Tokens]) -> _Tokens:
    return _Tokens(
        torch.cat([part.source_n for part in parts]),
        torch.cat([part.time_n for part in parts]),
        torch.cat([part.positions_n3 for part in parts]),
    )


def _moved(rows: Rows, device: torch.device | str) -> Rows:
    time_B1 = None if rows.time_B1 is None else rows.time_B1.to(device)
    return Rows(rows.groups, rows.source_Bn.to(device), time_B1, rows.turns_Bn1P2.to(device))
