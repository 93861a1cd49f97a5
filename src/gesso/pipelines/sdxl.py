"""Stable Diffusion XL as a pipeline: one step is one evaluation of its UNet, for pictures of one size at any time.

Here: what is peculiar to the family. Text, latents, schedulers and pixels are diffusers' and transformers'; the loop
is the engine's. With the same weights, in the same batches, it makes the same bits as diffusers'
`StableDiffusionXLPipeline`, `…Img2ImgPipeline` and `…InpaintPipeline`; comments name what mirrors them. What a request
means to SDXL is in `sdxl_plan`, what its refiner is in `sdxl_refiner`. Not here: files and dtypes (`engine/loading`),
networks (diffusers).

Random numbers: picture i has one CPU generator seeded `seed + i`. It draws, in this order: where a picture is given,
the sample of that picture's posterior; the initial noise; where a mask is given, the sample of the posterior of what
stays of the picture; then whatever noise the scheduler takes at its steps, and where a refiner begins anew, the noise
for that. All are of the latent's shape `[1,C,h,w]`.
Shapes: B pictures, C latent channels, h w latent cells, H W pixels, T text tokens, E P text widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from gesso.pictures import read_pixels
from gesso.pipelines import sdxl_refiner
from gesso.pipelines.contract import Output, Plan
from gesso.pipelines.latent_preview import LinearPreview
from gesso.pipelines.planning import chunks
from gesso.pipelines.sdxl_plan import SdxlPlanner, guidance_values
from gesso.pipelines.sdxl_refiner import RefinerNetwork, Schedule, SdxlRefiner
from gesso.pipelines.sdxl_state import (
    GivenPicture,
    Inpainting,
    Leg,
    ReadText,
    SdxlConditioning,
    SdxlDefaults,
    SdxlState,
    TextEncoder,
    Texts,
)
from gesso.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


class SdxlPipeline:
    """The six verbs for Stable Diffusion XL and what was made of it. It is handed its components.

    `scheduler` are the values of the model's `scheduler_config.json`: its noise schedule and what the network predicts.
    `zero_empty` says that an empty negative prompt is no text at all but zeros. Networks work on `device` in `dtype`,
    the autoencoder in float32 where its configuration says `force_upcast`. They may be on the meta device; it can plan
    then, and nothing else. `refiner` is the guest that finishes pictures whose requests have one.
    """

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        autoencoder: AutoencoderKL,
        text: TextEncoder,
        scheduler: Mapping[str, Any],
        defaults: SdxlDefaults,
        device: torch.device,
        dtype: torch.dtype,
        name: str,
        digest: str,
        zero_empty: bool = True,
        refiner: SdxlRefiner | None = None,
    ) -> None:
        self.unet, self.autoencoder, self.text, self.zero_empty = unet, autoencoder, text, zero_empty
        self.scheduler, self.defaults, self.name, self.digest = dict(scheduler), defaults, name, digest
        self.device, self.dtype, self.refiner = device, dtype, refiner
        self.planner = SdxlPlanner(unet, autoencoder, text, self.scheduler, defaults, dtype, name, refiner)
        values: Any = autoencoder.config
        self.stride, self.latent_channels = self.planner.stride, self.planner.latent_channels
        self._scale: float = values["scaling_factor"]
        self._pixel_dtype = torch.float32 if values["force_upcast"] else dtype
        self._pixels = VaeImageProcessor(vae_scale_factor=self.stride, vae_latent_channels=self.latent_channels)
        self._masks = VaeImageProcessor(
            vae_scale_factor=self.stride, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        self._preview = LinearPreview(self.latents_of, self.latent_channels)

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check all values and pictures, and count the work. Raises RequestError or FileError."""
        return self.planner.plan(request)

    # ---- encode and begin -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, plans: Sequence[Plan]) -> list[SdxlConditioning]:
        """Every text once for all pictures of all plans: the prompts as one batch, the negatives as another."""
        guided = [max(guidance_values(plan)) > 1 for plan in plans]
        prompts = self._read([_prompt(plan) for plan in plans], self.zero_empty)
        negatives = self._read(
            [(plan.request.negative, 0) for plan, doubled in zip(plans, guided, strict=True) if doubled],
            self.zero_empty,
        )
        texts = [
            Texts(prompts[_prompt(plan)], negatives[plan.request.negative, 0] if doubled else None)
            for plan, doubled in zip(plans, guided, strict=True)
        ]
        return [
            SdxlConditioning(each, self._refined(plan.request, each), self._given(plan.request))
            for plan, each in zip(plans, texts, strict=True)
        ]

    def _refined(self, request: GenerationRequest, texts: Texts) -> tuple[RefinerNetwork, Texts] | None:
        """The refiner, if there is one, and what it reads: of an empty negative it has its own idea."""
        if request.refiner is None or self.refiner is None:
            return None
        network, negative = self.refiner.network(request.refiner), texts.negative
        if negative is not None and not request.negative and network.zero_empty != self.zero_empty:
            negative = self._read([("", 0)], network.zero_empty)["", 0]
        return network, network.texts(texts.prompt, negative)

    def _read(self, texts: Sequence[tuple[str, int]], zero_empty: bool) -> dict[tuple[str, int], ReadText]:
        """Each different text, less so many layers, as a network reads it to which an empty one is zeros, or is not.

        A prompt is never empty.
        """
        different = list(dict.fromkeys(texts))
        spoken = [(text, skip) for text, skip in different if text or not zero_empty]
        found: dict[tuple[str, int], ReadText] = {}
        if spoken:
            words, skips = zip(*spoken, strict=True)
            features_BTE, pooled_BP = (made.to(self.device, self.dtype) for made in self.text.encode(words, skips))
            rows = zip(features_BTE.split(1), pooled_BP.split(1), strict=True)
            found |= {text: ReadText(*row) for text, row in zip(spoken, rows, strict=True)}
        if len(spoken) < len(different):
            features, pooled = self.planner.text_widths
            shape = (1, self.text.max_tokens, features)
            where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            found["", 0] = ReadText(torch.zeros(shape, **where), torch.zeros(1, pooled, **where))
        return found

    def _given(self, request: GenerationRequest) -> GivenPicture | None:
        """The picture to start from and its mask, both stretched to the size that is painted."""
        if request.init_image is None:
            return None
        height, width = request.height, request.width
        image_13HW = self._pixels.preprocess(read_pixels(Path(request.init_image)), height=height, width=width)  # pyright: ignore
        posterior = self._posterior(image_13HW)
        if request.mask is None:
            return GivenPicture(posterior)
        marks = read_pixels(Path(request.mask), background="black")
        mask_11HW = self._masks.preprocess(marks, height=height, width=width)  # pyright: ignore
        cells = (mask_11HW.shape[-2] // self.stride, mask_11HW.shape[-1] // self.stride)
        mask_11hw = F.interpolate(mask_11HW, size=cells).to(self.device, self.dtype)
        rest = self._posterior(image_13HW * (mask_11HW < 0.5)) if self.planner.sees_mask else None
        return GivenPicture(posterior, mask_11hw, rest)

    def _posterior(self, image_13HW: Tensor) -> DiagonalGaussianDistribution:
        """What the autoencoder makes of a picture in [-1,1]."""
        image_13HW = image_13HW.to(self.device, self._pixel_dtype)
        return self.autoencoder.encode(image_13HW).latent_dist  # pyright: ignore[reportAttributeAccessIssue]

    @torch.inference_mode()
    def begin(self, plan: Plan, conditioning: SdxlConditioning, image: int) -> SdxlState:
        """Noise for picture `image`, over the given picture if there is one, and schedulers of its own."""
        request = plan.request
        assert request.seed is not None
        generator = torch.Generator().manual_seed(request.seed + image)
        schedules = self.planner.schedules(request)
        start_1Chw, kept, beside = self._start(request, conditioning.picture, schedules[0], generator)
        guidance = guidance_values(plan)
        return SdxlState(
            request=request,
            seed=request.seed + image,
            legs=self._legs(request, conditioning, schedules),
            generator=generator,
            guidance=guidance,
            costs=self.planner.step_costs(request, guidance, [len(each.timesteps_N) for each in schedules]),
            latent_1Chw=start_1Chw,
            kept=kept,
            beside=beside,
            refiner=conditioning.refined[0].digest if conditioning.refined else "",
        )

    def _legs(
        self, request: GenerationRequest, conditioning: SdxlConditioning, schedules: Sequence[Schedule]
    ) -> tuple[Leg, ...]:
        """The model's evaluations and, if there is one, its refiner's."""
        own = Leg(
            network=self.unet,
            texts=conditioning.texts,
            sizes=(_time_ids(request), _time_ids(request)),
            prediction=self.scheduler.get("prediction_type", "epsilon"),
            **schedules[0]._asdict(),
        )
        if conditioning.refined is None:
            return (own,)
        assert request.refiner is not None and request.height is not None and request.width is not None
        network, texts = conditioning.refined
        refined = Leg(
            network=network.unet,
            texts=texts,
            sizes=sdxl_refiner.sizes(request.height, request.width),
            prediction=network.scheduler.get("prediction_type", "epsilon"),
            afresh=request.refiner.start is None,
            **schedules[1]._asdict(),
        )
        return own, refined

    def _start(
        self,
        request: GenerationRequest,
        picture: GivenPicture | None,
        schedule: Schedule,
        generator: torch.Generator,
    ) -> tuple[Tensor, Inpainting | None, Tensor | None]:
        """The first latent `[1,C,h,w]`, what is put back at every step, and what the network sees beside the latent.

        The order of draws is that of `prepare_latents` and `prepare_mask_latents` of diffusers' three pipelines.
        """
        assert request.width is not None and request.height is not None
        shape = (1, self.latent_channels, request.height // self.stride, request.width // self.stride)
        masked, whole = picture is not None and picture.mask_11hw is not None, request.init_strength in (None, 1.0)
        clean_1Chw = None
        if picture is not None and not (masked and whole and self.planner.sees_mask):
            clean_1Chw = self._drawn(picture.posterior, generator)
        if masked and clean_1Chw is not None:
            clean_1Chw = clean_1Chw.contiguous()  # as diffusers' `repeat` leaves it: sums go by the layout
        noise_1Chw = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        scheduler, timesteps_N, _ = schedule
        if clean_1Chw is None or (masked and whole):
            start_1Chw = noise_1Chw * scheduler.init_noise_sigma
        else:
            start_1Chw = scheduler.add_noise(clean_1Chw, noise_1Chw, timesteps_N[:1])
        if picture is None or picture.mask_11hw is None:
            return start_1Chw, None, None
        if picture.rest is not None:
            return start_1Chw, None, torch.cat([picture.mask_11hw, self._drawn(picture.rest, generator)], dim=1)
        # diffusers draws a sample of what stays although this network does not see it; stochastic schedulers go on
        # from there.
        randn_tensor(shape, generator=generator, dtype=self._pixel_dtype)
        assert clean_1Chw is not None
        kept = Inpainting(mask_11hw=picture.mask_11hw, clean_1Chw=clean_1Chw, noise_1Chw=noise_1Chw)
        return start_1Chw, kept, None

    def _drawn(self, posterior: DiagonalGaussianDistribution, generator: torch.Generator) -> Tensor:
        """A sample, scaled as the network knows it."""
        return self._scale * posterior.sample(generator).to(self.dtype)

    # ---- step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, states: Sequence[SdxlState]) -> None:
        """One evaluation, of the negatives first where they are guided, then each takes its own scheduler's step."""
        doubled = states[0].doubled
        inputs = [state.network_input() for state in states]
        output_BChw = self._evaluate(states, inputs, doubled)
        outputs = list(output_BChw.split(1))
        for row, (state, seen_1Chw) in enumerate(zip(states, inputs, strict=True)):
            output_1Chw = outputs[row]
            if doubled:
                towards_1Chw = outputs[len(states) + row]
                output_1Chw = output_1Chw + state.guidance[state.index] * (towards_1Chw - output_1Chw)
            state.advance(seen_1Chw, output_1Chw)

    def _evaluate(self, states: Sequence[SdxlState], inputs: Sequence[Tensor], doubled: bool) -> Tensor:
        """What the network says `[B,C,h,w]`; doubled, `[2B,C,h,w]` with the negatives first."""
        times, legs = 2 if doubled else 1, [state.leg for state in states]
        texts, sizes = [leg.texts.prompt for leg in legs], [leg.sizes[0] for leg in legs]
        if doubled:
            texts = [leg.texts.negative for leg in legs if leg.texts.negative] + texts
            sizes = [leg.sizes[1] for leg in legs] + sizes
        rows = [
            seen_1Chw if state.beside is None else torch.cat([seen_1Chw, state.beside], dim=1)
            for state, seen_1Chw in zip(states, inputs, strict=True)
        ]
        # Times and sizes are whole numbers that bfloat16 could not hold; the network makes features of them itself.
        time_B = torch.stack([state.timestep.float() for state in states] * times).to(self.device)
        sizes_BN = torch.tensor(sizes, device=self.device)
        return legs[0].network(
            torch.cat(rows * times),
            time_B,
            encoder_hidden_states=torch.cat([text.features_1TE for text in texts]),
            added_cond_kwargs={"text_embeds": torch.cat([text.pooled_1P for text in texts]), "time_ids": sizes_BN},
            return_dict=False,
        )[0]

    # ---- pixels -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def preview(self, state: SdxlState) -> Image.Image:
        """What the picture is on its way to, as far as a linear map from latents to colours can show it."""
        return self._preview(state.clean()[0])

    def decode(self, states: Sequence[SdxlState]) -> Iterator[Output]:
        """Finished latents to pictures, as many at once as make about half a megapixel."""
        height, width = states[0].latent_1Chw.shape[-2:] if states else (1, 1)
        for chunk in chunks(states, height * width * self.stride**2):
            with torch.inference_mode():
                latent_BChw: Any = torch.cat([state.latent_1Chw for state in chunk]).to(self._pixel_dtype)
                image_B3HW = self.autoencoder.decode(latent_BChw / self._scale, return_dict=False)[0]
                pictures: Any = self._pixels.postprocess(image_B3HW, output_type="pil")
            for state, picture in zip(chunk, pictures, strict=True):
                measured = {"refiner": state.refiner} if state.refiner else {}
                yield Output(image=picture, seed=state.seed, measured=measured)

    def latents_of(self, image_B3SS: Tensor) -> Tensor:
        """Scaled latents of pictures, the posterior's mean, for the preview's fit."""
        return self._posterior(image_B3SS).mode() * self._scale


def _prompt(plan: Plan) -> tuple[str, int]:
    """The prompt, and how many layers it leaves out; a negative leaves out none, as in diffusers."""
    return plan.request.prompt, plan.request.clip_skip or 0


def _time_ids(request: GenerationRequest) -> list[float]:
    """Size before any cut, what was cut off above and at the left, and the size: of a picture trained on whole."""
    assert request.width is not None and request.height is not None
    size = (float(request.height), float(request.width))
    return [*size, 0.0, 0.0, *size]
