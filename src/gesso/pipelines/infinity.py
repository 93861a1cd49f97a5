"""Infinity as a pipeline: one step is one scale of the bits, for a batch of pictures at the same scale.

Here: what is peculiar to the family. Guidance runs a second row a picture (null text or negative prompt) up to the
last scale that is guided; keys and values lie in one cache a company, which is copied only when company changes.
Not here: files and dtypes (`engine/loading`), the loop (`engine`), the network (`models/infinity`).

A revision decodes what is painted so far, codes it by the tokenizer as if it were given, and goes on from there. What
bits that were drawn independently left between two pictures becomes one of them, for true pictures are what tokenizer
and network know best. Coding the sum of codes itself, without pixels between, mends nothing. Keys and values of the
scales before stay as they were: each scale's inputs are the whole sum.

Random numbers: picture i has one CPU generator seeded `seed + i`; each scale draws its Exp(1) noise `[n,2K]` from it,
in order of scales, whether or not sampling leaves anything to chance.
Shapes: B pictures, R rows, n tokens of the scale, K bits a token, k bits a latent cell, h w a grid of cells, H W the
final one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gesso.devices import CPU
from gesso.models.infinity.autoencoder import Autoencoder, to_uint8
from gesso.models.infinity.cache import CacheRow, gather
from gesso.models.infinity.quantizer import (
    codes,
    enlarge,
    from_tokens,
    quantize,
    shrink,
    sum_of_codes,
    to_tokens,
)
from gesso.models.infinity.scales import ScaleSchedule
from gesso.models.infinity.transformer import InfinityTransformer, LayerGuidance, TextCondition, text_mask
from gesso.pictures import cover_crop, read_pixels
from gesso.pipelines.contract import Output, Plan
from gesso.pipelines.infinity_plan import InfinityPlanner, is_guided, per_scale
from gesso.pipelines.infinity_state import (
    Company,
    GenerationDefaults,
    InfinityConditioning,
    InfinityState,
    TextEncoder,
    join_text,
    split_text,
)
from gesso.pipelines.planning import chunks
from gesso.request import GenerationRequest
from gesso.sampling.bits import choose_bits, exponential_noise
from gesso.sampling.guidance import NEGATIVE, PROMPT, branches, guide

_PREVIEW_CELLS = 32  # longer edge of what a preview decodes


class InfinityPipeline:
    """The six verbs for Infinity of any size. It is handed its components; keys of `schedules` are (height, width).

    `device` is that of the arithmetic, `dtype` that of the blocks' matmuls.
    """

    def __init__(
        self,
        *,
        transformer: InfinityTransformer,
        autoencoder: Autoencoder,
        text: TextEncoder,
        schedules: Mapping[tuple[int, int], ScaleSchedule],
        defaults: GenerationDefaults,
        name: str,
        digest: str,
        device: torch.device | str = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.schedules, self.defaults, self.name, self.digest = dict(schedules), defaults, name, digest
        self.config, self.device, self.dtype = transformer.config, torch.device(device), dtype
        self.planner = InfinityPlanner(transformer, autoencoder, text, self.schedules, defaults, name, dtype)

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, lists and the prompt's length, and count the work. Raises RequestError."""
        return self.planner.plan(request)

    # ---- encode and begin -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, plans: Sequence[Plan]) -> list[InfinityConditioning]:
        """Text of each plan, read once for all its pictures and scales; bits of a given picture."""
        guided = [plan for plan in plans if is_guided(plan)]
        prompts = self.text.features([plan.request.prompt for plan in plans])
        negatives = iter(self.text.features([text for plan in guided if (text := plan.request.negative)]))
        nulls = [
            next(negatives) if plan.request.negative else self.transformer.null_text[: len(features_TE)]
            for plan, features_TE in zip(plans, prompts, strict=True)
            if is_guided(plan)
        ]
        texts = split_text(self._read([*prompts, *nulls]), [len(features_TE) for features_TE in (*prompts, *nulls)])
        rest = iter(texts[len(plans) :])
        return [
            InfinityConditioning(text, next(rest) if is_guided(plan) else None, self._prefix(plan.request))
            for plan, text in zip(plans, texts, strict=False)
        ]

    def _read(self, features: Sequence[Tensor]) -> TextCondition:
        """Texts of any lengths, projected as one batch."""
        features_RTE = pad_sequence([text_TE.to(self.device).float() for text_TE in features], batch_first=True)
        return self.transformer.read_text(features_RTE, text_mask([len(text_TE) for text_TE in features], self.device))

    def _prefix(self, request: GenerationRequest) -> tuple[Tensor, ...]:
        """Bits of the first scales of the given picture: the share of scales that `init_strength` does not repaint."""
        if request.init_image is None or request.init_strength is None:
            return ()
        assert request.width is not None and request.height is not None
        schedule = self.schedules[request.height, request.width]
        picture = cover_crop(read_pixels(Path(request.init_image)), request.width, request.height, request.init_image)
        pixels_HW3 = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, -1, 3)
        image_13HW = (pixels_HW3.movedim(-1, 0).float() / 127.5 - 1)[None].to(self.device)
        latent = self.autoencoder.encode(image_13HW)
        given = self.planner.given_scales(request, schedule)
        return tuple(quantize(latent, schedule.latent_grids(self.config.patchify)).bits[:given])

    def begin(self, plan: Plan, conditioning: InfinityConditioning, image: int) -> InfinityState:
        request = plan.request
        assert request.seed is not None and request.width is not None and request.height is not None
        schedule = self.schedules[request.height, request.width]
        height, width = schedule.latent_grids(self.config.patchify)[-1]
        seed = request.seed + image
        tokens = conditioning.prompt.keys_values[0][0].shape[2]
        return InfinityState(
            request=request,
            seed=seed,
            schedule=schedule,
            conditioning=conditioning,
            guidance=per_scale(request.guidance, len(schedule)),
            temperature=per_scale(request.temperature, len(schedule)),
            costs=self.planner.costs(request, schedule, tokens),
            generator=torch.Generator().manual_seed(seed),
            sum_kHW=torch.zeros(self.autoencoder.config.bits, height, width, device=self.device),
            first_revised=self.planner.first_revised(request, schedule),
        )

    # ---- step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, states: Sequence[InfinityState]) -> None:
        """Paint one scale of every state: logits, guidance, bits, codes, and the next scale's inputs."""
        schedule, scale = states[0].schedule, states[0].scale
        doubled = [state for state in states if state.doubled]
        company = self._company(states, doubled)
        inputs = [state.inputs_nK for state in (*states, *doubled) if state.inputs_nK is not None]
        inputs_RnK = torch.stack(inputs) if inputs else None
        layer = states[0].request.guidance_layer or 0
        guided_now = any(state.guidance[scale] != 1 for state in doubled)
        inside = LayerGuidance(self.config.depth + layer, self._column(doubled, "guidance", scale)) \
            if layer and guided_now else None  # fmt: skip
        samples = [(row, PROMPT) for row in range(len(states))]
        samples += [(row, NEGATIVE) for row, state in enumerate(states) if state.doubled]
        with branches(samples):
            logits_RnV = self.transformer.step(inputs_RnK, company.text, schedule, scale, company.cache, inside)
        logits_BnV = logits_RnV[: len(states)] / self._column(states, "temperature", scale)
        if inside is None:
            logits_BnV = self._guided(logits_BnV, logits_RnV[len(states) :], states, doubled)
        bits_BnK = self._draw(logits_BnV, states)
        self._advance(states, bits_BnK)
        if revised := [state for state in states if state.first_revised <= state.scale < len(schedule)]:
            self._revise(revised)

    def _company(self, states: Sequence[InfinityState], doubled: Sequence[InfinityState]) -> Company:
        """The company these states already are, or a new one whose cache holds their rows."""
        prompts, nulls = tuple(state.number for state in states), tuple(state.number for state in doubled)
        old = states[0].company
        if old is not None and (old.prompts, old.nulls) == (prompts, nulls):
            return old
        texts = [state.conditioning.prompt for state in states]
        texts += [state.conditioning.null for state in doubled if state.conditioning.null is not None]
        rows = [state.prompt_row for state in states] + [state.null_row for state in doubled]
        known = [row for row in rows if row is not None]
        schedule, scale = states[0].schedule, states[0].scale
        if len(known) == len(rows):
            cache = gather(known, schedule.starts[scale])
        else:
            cache = self.transformer.empty_cache(len(rows), schedule)
        company = Company(prompts, nulls, join_text(texts), cache)
        for index, state in enumerate(states):
            state.company, state.prompt_row, state.null_row = company, CacheRow(cache, index), None
        for index, state in enumerate(doubled):
            state.null_row = CacheRow(cache, len(states) + index)
        return company

    def _guided(
        self,
        logits_BnV: Tensor,
        nulls_NnV: Tensor,
        states: Sequence[InfinityState],
        doubled: Sequence[InfinityState],
    ) -> Tensor:
        """Logits (after temperature) pushed away from those of the null rows, for the pictures guided at this scale."""
        scale = states[0].scale
        mixing = [index for index, state in enumerate(doubled) if state.guidance[scale] != 1]
        if not mixing:
            return logits_BnV
        pictures = [doubled[index] for index in mixing]
        chosen = [index for index, state in enumerate(states) if state.doubled and state.guidance[scale] != 1]
        null_BnV = nulls_NnV[mixing] / self._column(pictures, "temperature", scale)
        logits_BnV[chosen] = guide(logits_BnV[chosen], null_BnV, self._column(pictures, "guidance", scale))
        return logits_BnV

    def _draw(self, logits_BnV: Tensor, states: Sequence[InfinityState]) -> Tensor:
        tokens, bits = logits_BnV.shape[1], logits_BnV.shape[2] // 2
        noise_BnV = torch.stack([exponential_noise(tokens, bits, state.generator) for state in states])
        top_k = torch.tensor([state.request.top_k or 0 for state in states], device=self.device)[:, None, None]
        top_p = torch.tensor([state.request.top_p or 0.0 for state in states], device=self.device)[:, None, None]
        return choose_bits(logits_BnV, noise_BnV.to(self.device), top_k, top_p)

    def _advance(self, states: Sequence[InfinityState], bits_BnK: Tensor) -> None:
        """Add the scale's codes to every picture's sum and prepare the next scale's inputs."""
        schedule, scale, patchify = states[0].schedule, states[0].scale, self.config.patchify
        grids = schedule.latent_grids(patchify)
        bits_Bkhw = from_tokens(bits_BnK.to(torch.uint8), schedule.grids[scale], patchify).bool()
        for index, state in enumerate(states):
            if scale < len(state.conditioning.prefix):
                bits_Bkhw[index] = state.conditioning.prefix[scale][0]
        sum_BkHW = torch.stack([state.sum_kHW for state in states]) + enlarge(codes(bits_Bkhw), grids[-1])
        last = scale + 1 == len(schedule)
        inputs_BnK = None if last else to_tokens(enlarge(sum_BkHW, grids[scale + 1]), patchify)
        for index, state in enumerate(states):
            state.sum_kHW, state.inputs_nK = sum_BkHW[index], None if inputs_BnK is None else inputs_BnK[index]
            state.bits.append(bits_Bkhw[index])
            state.scale = scale + 1
            if last:  # nothing will attend to these any more
                state.company = state.prompt_row = state.null_row = None

    def _revise(self, states: Sequence[InfinityState]) -> None:
        """Put what is painted so far in terms of the tokenizer: the same scales of what it sees there.

        One by one: coding is a threshold, and the noise of arithmetic in company would carry bits over it.
        """
        patchify, scale = self.config.patchify, states[0].scale
        grids = states[0].schedule.latent_grids(patchify)
        for state in states:
            latent_1kHW = self.autoencoder.encode(self.autoencoder.decode(state.sum_kHW[None]))
            bits = quantize(latent_1kHW, grids).bits[:scale]
            sum_1kHW = sum_of_codes(bits, grids[-1])
            state.sum_kHW, state.inputs_nK = sum_1kHW[0], to_tokens(enlarge(sum_1kHW, grids[scale]), patchify)[0]
            state.bits = [bits_1khw[0] for bits_1khw in bits]

    def _column(self, states: Sequence[InfinityState], name: str, scale: int) -> Tensor:
        """A per-picture setting of this scale as `[B,1,1]`."""
        return torch.tensor([getattr(state, name)[scale] for state in states], device=self.device)[:, None, None]

    # ---- pixels -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def preview(self, state: InfinityState) -> Image.Image:
        """The sum of codes so far, decoded on at most 32 cells of its longer edge."""
        sum_1kHW = state.sum_kHW[None]
        height, width = sum_1kHW.shape[-2:]
        factor = min(1.0, _PREVIEW_CELLS / max(height, width))
        grid = (max(1, round(height * factor)), max(1, round(width * factor)))
        return self._pictures(shrink(sum_1kHW, grid))[0]

    def decode(self, states: Sequence[InfinityState]) -> Iterator[Output]:
        """Finished sums to pictures, as many at once as make about half a megapixel."""
        for chunk in self._chunks(states):
            with torch.inference_mode():
                pictures = self._pictures(torch.stack([state.sum_kHW for state in chunk]))
            for state, picture in zip(chunk, pictures, strict=True):
                yield Output(image=picture, seed=state.seed)

    def _chunks(self, states: Sequence[InfinityState]) -> Iterator[Sequence[InfinityState]]:
        height, width = states[0].sum_kHW.shape[-2:] if states else (1, 1)
        return chunks(states, height * width * self.autoencoder.config.stride**2)

    def _pictures(self, sum_BkHW: Tensor) -> list[Image.Image]:
        pixels_BHW3 = to_uint8(self.autoencoder.decode(sum_BkHW)).cpu().numpy()
        return [Image.fromarray(pixels) for pixels in pixels_BHW3]
