"""HunyuanVideo as a pipeline: one step is one evaluation of diffusers' network, for videos of one size at any time.

Here: what is peculiar to the family. Text, latents, solvers and pixels are diffusers' and transformers'; the loop is
the engine's. With the same weights, in the same batches, it makes the same bits as diffusers' `HunyuanVideoPipeline`
with its autoencoder's `enable_tiling`; comments name what mirrors it. What a request means is in `hunyuan_video_plan`.
Not here: files and dtypes (`engine/loading`), networks (diffusers), tiles (`models/hunyuan_video_tiles`).

Latents begin as float32 and have the network's dtype from the first step on. Random numbers: video i has one CPU
generator seeded `seed + i`, which draws the initial noise `[1,C,f,h,w]`, and after it only those of `euler-stochastic`.
Shapes: B videos, C latent channels, f h w latent frames, rows and columns, F H W those of pixels, T text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from gesso.models.hunyuan_video_tiles import decode_in_tiles
from gesso.pipelines.contract import Output, Plan
from gesso.pipelines.hunyuan_video_plan import HunyuanVideoPlanner, guidance_values, guides_truly
from gesso.pipelines.hunyuan_video_state import (
    HunyuanVideoConditioning,
    HunyuanVideoDefaults,
    HunyuanVideoState,
    ReadText,
    TextEncoder,
)
from gesso.pipelines.latent_preview import LinearPreview
from gesso.pipelines.token_state import join
from gesso.request import GenerationRequest
from gesso.sampling.guidance import NEGATIVE, branch

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel


class HunyuanVideoPipeline:
    """The six verbs for HunyuanVideo and small networks of its kind. It is handed its components.

    `scheduler` are the values of the model's `scheduler_config.json`: how its schedule bends. The networks may be on
    the meta device; it can plan then, and nothing else. Arithmetic runs on `device`, wherever the weights lie.
    """

    def __init__(
        self,
        *,
        transformer: HunyuanVideoTransformer3DModel,
        autoencoder: AutoencoderKLHunyuanVideo,
        text: TextEncoder,
        scheduler: Mapping[str, Any],
        defaults: HunyuanVideoDefaults,
        device: torch.device,
        dtype: torch.dtype,
        name: str,
        digest: str,
    ) -> None:
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.scheduler, self.defaults, self.name, self.digest = dict(scheduler), defaults, name, digest
        self.device, self.dtype = device, dtype
        self.planner = HunyuanVideoPlanner(transformer, autoencoder, text, self.scheduler, defaults, name, dtype)
        values: Any = autoencoder.config
        self.latent_channels: int = values["latent_channels"]
        self._scale: float = values["scaling_factor"]
        self._pixels = VaeImageProcessor(vae_scale_factor=self.planner.stride)
        self._preview = LinearPreview(self.latents_of, self.latent_channels)

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, frames, scheduler and lists, and count the work. Raises RequestError."""
        return self.planner.plan(request)

    # ---- encode and begin -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, plans: Sequence[Plan]) -> list[HunyuanVideoConditioning]:
        """Every text once for all videos of all plans: the prompts as one batch, the negatives as another."""
        requests = [plan.request for plan in plans]
        prompts = self._read([request.prompt for request in requests])
        negatives = self._read([request.negative for request in requests if guides_truly(request)])
        return [
            HunyuanVideoConditioning(
                prompts[request.prompt], negatives[request.negative] if guides_truly(request) else None
            )
            for request in requests
        ]

    def _read(self, texts: Sequence[str]) -> dict[str, ReadText]:
        different = list(dict.fromkeys(texts))
        if not different:
            return {}
        features_BTE, mask_BT, pooled_BP = (
            found.to(self.device, self.dtype) for found in self.text.encode(different, self.device)
        )
        rows = zip(features_BTE.split(1), mask_BT.split(1), pooled_BP.split(1), strict=True)
        return {text: ReadText(*row) for text, row in zip(different, rows, strict=True)}

    @torch.inference_mode()
    def begin(self, plan: Plan, conditioning: HunyuanVideoConditioning, image: int) -> HunyuanVideoState:
        """Noise for video `image`, and a scheduler of its own."""
        request = plan.request
        assert request.seed is not None and request.true_guidance is not None
        seed = request.seed + image
        generator = torch.Generator().manual_seed(seed)
        scheduler, timesteps_N = self.planner.schedule(request, self.device, generator)
        shape = (1, self.latent_channels, *self.planner.latent_size(request))
        return HunyuanVideoState(
            request=request,
            seed=seed,
            conditioning=conditioning,
            scheduler=scheduler,
            timesteps_N=timesteps_N,
            guidance=guidance_values(plan),
            true_guidance=request.true_guidance,
            step_cost=self.planner.step_cost(request),
            latent_1Cfhw=randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32),
        )

    # ---- step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, states: Sequence[HunyuanVideoState]) -> None:
        """One evaluation for all prompts, one for all negatives if they are guided, then each takes its own step."""
        latent_BCfhw = join([state.latent_1Cfhw for state in states]).to(self.dtype)
        time_B = torch.stack([state.time for state in states])
        velocity_BCfhw = self._velocity(states, [state.conditioning.prompt for state in states], latent_BCfhw, time_B)
        velocities = list(velocity_BCfhw.split(1))
        if states[0].doubled:
            negatives = [state.conditioning.negative for state in states if state.conditioning.negative is not None]
            with branch(NEGATIVE):
                negative_BCfhw = self._velocity(states, negatives, latent_BCfhw, time_B)
            for row, (state, away_1Cfhw) in enumerate(zip(states, negative_BCfhw.split(1), strict=True)):
                velocities[row] = away_1Cfhw + state.true_guidance * (velocities[row] - away_1Cfhw)
        for state, velocity_1Cfhw in zip(states, velocities, strict=True):
            state.advance(velocity_1Cfhw)

    def _velocity(
        self, states: Sequence[HunyuanVideoState], texts: Sequence[ReadText], latent_BCfhw: Tensor, time_B: Tensor
    ) -> Tensor:
        """The network's velocity `[B,C,f,h,w]`, noise less clean, given these texts."""
        scales = [state.guidance[state.index] for state in states]
        (velocity_BCfhw,) = self.transformer(
            hidden_states=latent_BCfhw,
            timestep=time_B,
            encoder_hidden_states=join([text.features_1TE for text in texts]),
            encoder_attention_mask=join([text.mask_1T for text in texts]),
            pooled_projections=join([text.pooled_1P for text in texts]),
            guidance=torch.tensor(scales, dtype=self.dtype, device=self.device) * 1000.0,
            return_dict=False,
        )
        return velocity_BCfhw

    # ---- pixels -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def preview(self, state: HunyuanVideoState) -> tuple[Image.Image, ...]:
        """One frame for every latent one, as far as a linear map from latents to colours can show it."""
        return tuple(self._preview(latent_Chw) for latent_Chw in state.clean_latent()[0].unbind(1))

    def decode(self, states: Sequence[HunyuanVideoState]) -> Iterator[Output | None]:
        """Finished latents to videos, one after the other, with a breath after every tile."""
        for state in states:
            frames: list[Image.Image] = []
            latent_1Cfhw = state.latent_1Cfhw.to(self.dtype) / self._scale
            for stretch_13FHW in decode_in_tiles(self.autoencoder, latent_1Cfhw):
                if stretch_13FHW is None:
                    yield None
                else:
                    frames += self._pictures(stretch_13FHW)
            yield Output(image=frames[0], seed=state.seed, frames=tuple(frames), fps=state.request.fps)

    @torch.inference_mode()
    def _pictures(self, stretch_13FHW: Tensor) -> list[Image.Image]:
        """Frames of pixels, each for itself as `VideoProcessor.postprocess_video` makes them."""
        frames_F3HW = stretch_13FHW[0].permute(1, 0, 2, 3)
        return self._pixels.postprocess(frames_F3HW, output_type="pil")  # pyright: ignore[reportReturnType]

    def latents_of(self, image_B3SS: Tensor) -> Tensor:
        """Scaled latents of pictures, each a video of one frame, for the preview's fit."""
        encoded: Any = self.autoencoder.encode(image_B3SS[:, :, None].to(self.device, self.dtype))
        return encoded.latent_dist.mode()[:, :, 0] * self._scale
