"""Qwen-Image as a pipeline: one step is one evaluation of diffusers' network, or two where it is guided.

Here: what is peculiar to the family. Latents, solvers and pixels are diffusers', the loop is the engine's. With the
same weights, in the same batches, it makes the same bits as diffusers' `QwenImagePipeline` and
`QwenImageImg2ImgPipeline`; comments name what mirrors them. What a request means to Qwen-Image is in `qwen_image_plan`.
Not here: files and dtypes (`engine/loading`), the network (diffusers), text (`models/qwen_image_text`).

In company, prompts of unequal length are padded with zeros to the longest of them, and a mask keeps every token from
looking at the padding; where all are equally long there is no mask. That changes sums in their last bits, no more.
Random numbers: picture i has one CPU generator seeded `seed + i`. It draws the initial noise `[1,1,C,h,w]`; before
that, and only where a picture is given, the sample of that picture's posterior, of as many numbers. After it come only
the noises of `euler-stochastic`.
Shapes: B pictures, C latent channels, h w latent cells, L = h/2 * w/2 tokens, D = 4C, T text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gesso.models import flux_network
from gesso.pictures import read_pixels
from gesso.pipelines.contract import Output, Plan
from gesso.pipelines.latent_preview import LinearPreview
from gesso.pipelines.planning import chunks
from gesso.pipelines.qwen_image_plan import QwenImagePlanner, guidance_values, negative_text
from gesso.pipelines.qwen_image_state import QwenImageConditioning, QwenImageDefaults, QwenImageState, TextEncoder
from gesso.pipelines.token_state import join
from gesso.request import GenerationRequest
from gesso.sampling.guidance import NEGATIVE, PROMPT, branch, guide_keeping_length

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel


class QwenImagePipeline:
    """The six verbs for Qwen-Image, and small networks of its kind. It is handed its components.

    `scheduler` are the values of the model's `scheduler_config.json`: how its schedule bends. Arithmetic runs on
    `device`, in `dtype`, which is the networks' own. On the meta device it can plan, and nothing else.
    """

    def __init__(
        self,
        *,
        transformer: QwenImageTransformer2DModel,
        autoencoder: AutoencoderKLQwenImage,
        text: TextEncoder,
        scheduler: Mapping[str, Any],
        defaults: QwenImageDefaults,
        name: str,
        digest: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.scheduler, self.defaults, self.name, self.digest = dict(scheduler), defaults, name, digest
        self.device, self.dtype = device, dtype
        self.planner = QwenImagePlanner(transformer, autoencoder, text, self.scheduler, defaults, name, dtype)
        self.stride = self.planner.stride
        values: Any = autoencoder.config
        self.latent_channels: int = values["z_dim"]
        self._pixels = VaeImageProcessor(vae_scale_factor=2 * self.stride, vae_latent_channels=self.latent_channels)
        self._mean_C111, deviation_C111 = (
            torch.tensor(values[name]).view(-1, 1, 1, 1).to(device, dtype) for name in ("latents_mean", "latents_std")
        )
        self._inverse_deviation_C111 = 1.0 / deviation_C111
        self._preview = LinearPreview(self.latents_of, self.latent_channels)

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, scheduler, lists and the picture, and count the work. Raises RequestError."""
        return self.planner.plan(request)

    # ---- encode and begin -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, plans: Sequence[Plan]) -> list[QwenImageConditioning]:
        """Every text once for all pictures of all plans: the prompts as one batch, the negatives as another."""
        guided = [max(guidance_values(plan.request, plan.steps)) > 1 for plan in plans]
        both = list(zip(plans, guided, strict=True))
        prompts = self._read([plan.request.prompt for plan in plans])
        negatives = self._read([negative_text(plan.request) for plan, doubled in both if doubled])
        return [
            QwenImageConditioning(
                prompts[plan.request.prompt],
                negatives[negative_text(plan.request)] if doubled else None,
                self._posterior(plan.request),
            )
            for plan, doubled in both
        ]

    def _read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        different = list(dict.fromkeys(texts))
        features = self.text.features(different, self.device) if different else []
        return {text: found_TE.to(self.dtype) for text, found_TE in zip(different, features, strict=True)}

    def _posterior(self, request: GenerationRequest) -> DiagonalGaussianDistribution | None:
        """What the autoencoder makes of the given picture, which is stretched to the size that is painted."""
        if request.init_image is None:
            return None
        image = read_pixels(Path(request.init_image))
        image_13HW = self._pixels.preprocess(image, height=request.height, width=request.width)  # pyright: ignore
        return self._encoded(image_13HW.to(dtype=torch.float32))

    def _encoded(self, image_B3HW: Tensor) -> DiagonalGaussianDistribution:
        """The posterior of pictures in [-1,1], which are videos of one frame to the autoencoder."""
        encoded: Any = self.autoencoder.encode(image_B3HW[:, :, None].to(device=self.device, dtype=self.dtype))
        return encoded.latent_dist

    def _scaled(self, latent_BC1hw: Tensor) -> Tensor:
        """As the network sees latents: every channel of mean 0 and deviation 1."""
        return (latent_BC1hw - self._mean_C111) * self._inverse_deviation_C111

    @torch.inference_mode()
    def begin(self, plan: Plan, conditioning: QwenImageConditioning, image: int) -> QwenImageState:
        """Noise for picture `image`, mixed with the given picture if there is one, and a scheduler of its own."""
        request = plan.request
        assert request.seed is not None and request.width is not None and request.height is not None
        size = (request.height // self.stride, request.width // self.stride)
        generator = torch.Generator().manual_seed(request.seed + image)
        scheduler, timesteps_N = self.planner.schedule(request, self.device, generator)
        # The order of draws is that of QwenImageImg2ImgPipeline.prepare_latents.
        picture = conditioning.picture
        clean_1C1hw = None if picture is None else self._scaled(picture.sample(generator))
        latent_11Chw = randn_tensor(
            (1, 1, self.latent_channels, *size), generator=generator, device=self.device, dtype=self.dtype
        )
        if clean_1C1hw is not None:
            latent_11Chw = scheduler.scale_noise(clean_1C1hw.transpose(1, 2), timesteps_N[:1], latent_11Chw)
        guidance = guidance_values(request, plan.steps)
        return QwenImageState(
            request=request,
            seed=request.seed + image,
            size=size,
            conditioning=conditioning,
            scheduler=scheduler,
            timesteps_N=timesteps_N,
            guidance=guidance,
            costs=self.planner.step_costs(request, guidance),
            tokens_1LD=flux_network.pack(latent_11Chw[:, 0]),
        )

    # ---- step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, states: Sequence[QwenImageState]) -> None:
        """One evaluation for all prompts, one for all negatives if they are guided, then each takes its own step."""
        tokens_BLD = join([state.tokens_1LD for state in states])
        # As QwenImagePipeline hands it over: in the latents' dtype, then divided; here every sample has its own.
        time_B = torch.stack([state.timesteps_N[state.index].to(tokens_BLD.dtype) for state in states]) / 1000
        with branch(PROMPT):
            prompts = [state.conditioning.prompt_TE for state in states]
            velocities = list(self._velocity(states, prompts, tokens_BLD, time_B).split(1))
        if states[0].doubled:
            negatives = [found for state in states if (found := state.conditioning.negative_TE) is not None]
            with branch(NEGATIVE):
                away_BLD = self._velocity(states, negatives, tokens_BLD, time_B)
            for row, (state, away_1LD) in enumerate(zip(states, away_BLD.split(1), strict=True)):
                velocities[row] = guide_keeping_length(velocities[row], away_1LD, state.guidance[state.index])
        for state, velocity_1LD in zip(states, velocities, strict=True):
            state.advance(velocity_1LD)

    def _velocity(
        self, states: Sequence[QwenImageState], texts: Sequence[Tensor], tokens_BLD: Tensor, time_B: Tensor
    ) -> Tensor:
        """The network's velocity `[B,L,D]`, noise less clean, given these texts `[T,E]` each."""
        features_BTE, mask_BT = padded(texts)
        height, width = states[0].size
        (velocity_BLD,) = self.transformer(
            hidden_states=tokens_BLD,
            timestep=time_B,
            encoder_hidden_states=features_BTE,
            encoder_hidden_states_mask=mask_BT,
            img_shapes=[[(1, height // 2, width // 2)]] * len(states),  # pyright: ignore[reportArgumentType]
            return_dict=False,
        )
        return velocity_BLD

    # ---- pixels -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def preview(self, state: QwenImageState) -> Image.Image:
        """What the picture is on its way to, as far as a linear map from latents to colours can show it."""
        return self._preview(flux_network.unpack(state.clean_tokens(), *state.size)[0])

    def decode(self, states: Sequence[QwenImageState]) -> Iterator[Output]:
        """Finished latents to pictures, as many at once as make about half a megapixel."""
        height, width = states[0].size if states else (1, 1)
        for chunk in chunks(states, height * width * self.stride**2):
            with torch.inference_mode():
                tokens_BLD = join([state.tokens_1LD for state in chunk])
                pictures = self._pictures(flux_network.unpack(tokens_BLD, *chunk[0].size))
            for state, picture in zip(chunk, pictures, strict=True):
                yield Output(image=picture, seed=state.seed)

    def _pictures(self, latent_BChw: Tensor) -> list[Image.Image]:
        unscaled_BC1hw = latent_BChw[:, :, None] / self._inverse_deviation_C111 + self._mean_C111
        decoded: Any = self.autoencoder.decode(unscaled_BC1hw, return_dict=False)
        return self._pixels.postprocess(decoded[0][:, :, 0], output_type="pil")  # pyright: ignore[reportReturnType]

    def latents_of(self, image_B3SS: Tensor) -> Tensor:
        """Scaled latents `[B,C,h,w]` of pictures, the posterior's mean, for the preview's fit."""
        return self._scaled(self._encoded(image_B3SS).mode())[:, :, 0]


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Texts `[T,E]` as one batch `[B,T,E]`, zeros after the shorter ones, and which tokens are theirs, `[B,T]`.

    No mask where all are equally long, as `QwenImagePipeline.encode_prompt` has it.

    Example:
        >>> padded([torch.ones(2, 4), torch.ones(1, 4)])[1]
        tensor([[ True,  True],
                [ True, False]])
    """
    features_BTE = pad_sequence(list(texts), batch_first=True)
    lengths_B = torch.tensor([len(text_TE) for text_TE in texts])
    if (lengths_B == features_BTE.shape[1]).all():
        return features_BTE, None
    mask_BT = torch.arange(features_BTE.shape[1]) < lengths_B[:, None]
    return features_BTE, mask_BT.to(features_BTE.device)
