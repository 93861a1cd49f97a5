"""Infinity painted slowly and plainly, to hold the pipeline against: one picture, two rows at every scale, no company.

Every scale runs prompt and null rows as one batch over one cache of its own, whether or not that scale is guided; bits
are drawn from sorted, filtered probabilities as the published code draws them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gesso.models.infinity.quantizer import enlarge, from_tokens, quantize, sum_of_codes, to_tokens
from gesso.models.infinity.transformer import LayerGuidance, TextCondition, text_mask
from gesso.pipelines.infinity import InfinityPipeline
from gesso.request import GenerationRequest
from tests.oracles import filtered_logits


@torch.no_grad()
def paint_always_doubled(pipeline: InfinityPipeline, request: GenerationRequest) -> list[Tensor]:
    """Bits of every scale, bool `[k,h,w]` each, of the request's first picture."""
    filled = pipeline.plan(request).request
    assert filled.width is not None and filled.height is not None and filled.seed is not None
    schedule = pipeline.schedules[filled.height, filled.width]
    generator = torch.Generator().manual_seed(filled.seed)
    network, patchify = pipeline.transformer, pipeline.config.patchify
    text = _both_texts(pipeline, filled)
    cache = network.empty_cache(2, schedule)
    grids = schedule.latent_grids(patchify)
    inputs: Tensor | None = None
    bits: list[Tensor] = []
    for scale, grid in enumerate(schedule.grids):
        guidance, temperature = _at(filled.guidance, scale), _at(filled.temperature, scale)
        layer = filled.guidance_layer or 0
        inside = None
        if layer:  # as published: mixed at every scale, at 1 too
            inside = LayerGuidance(network.config.depth + layer, torch.full((1, 1, 1), guidance))
        doubled = None if inputs is None else torch.cat((inputs, inputs))
        logits = network.step(doubled, text, schedule, scale, cache, inside) / temperature
        prompt, null = logits.chunk(2)
        mixed = prompt if layer else guidance * prompt + (1 - guidance) * null
        drawn = _draw(mixed, filled.top_k or 0, filled.top_p or 0.0, generator)
        bits.append(from_tokens(drawn.to(torch.uint8), grid, patchify).bool())
        if len(schedule) - (filled.revisions or 0) <= scale + 1 < len(schedule):
            picture = pipeline.autoencoder.decode(sum_of_codes(bits, grids[-1]))
            bits = list(quantize(pipeline.autoencoder.encode(picture), grids).bits[: scale + 1])
        if scale + 1 < len(schedule):
            inputs = to_tokens(enlarge(sum_of_codes(bits, grids[-1]), grids[scale + 1]), patchify)
    return [bits_1khw[0] for bits_1khw in bits]


def _both_texts(pipeline: InfinityPipeline, request: GenerationRequest) -> TextCondition:
    prompt = pipeline.text.features([request.prompt])[0]
    null = pipeline.transformer.null_text[: len(prompt)]
    if request.negative:
        null = pipeline.text.features([request.negative])[0]
    padded = torch.nn.utils.rnn.pad_sequence([prompt, null], batch_first=True)
    return pipeline.transformer.read_text(padded, text_mask([len(prompt), len(null)]))


def _draw(logits_1nV: Tensor, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Filter by sorting, then take the class whose probability over Exp(1) noise is largest."""
    pairs = logits_1nV.unflatten(-1, (-1, 2))
    noise = torch.empty(logits_1nV.shape).exponential_(generator=generator).view(pairs.shape)
    return (filtered_logits(pairs, top_k, top_p).softmax(-1) / noise).argmax(-1).bool()


def _at(value: float | tuple[float, ...] | None, scale: int) -> float:
    assert value is not None
    return value[scale] if isinstance(value, tuple) else value
