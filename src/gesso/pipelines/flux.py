"""FLUX.1 as a pipeline: one step is one evaluation of diffusers' network, for pictures of one size at any time.

Here: what is peculiar to the family. Text, latents, solvers and pixels are diffusers' and transformers'; the loop is
the engine's. With the same weights, in the same batches, it makes the same bits as diffusers' `FluxPipeline` and
`FluxImg2ImgPipeline`; comments name what mirrors them. What a request means to FLUX is in `flux_plan`.
Not here: files and dtypes (`engine/loading`), the network (diffusers; its tokens in `models/flux_network`).

Random numbers: picture i has one CPU generator seeded `seed + i`. It draws the initial noise `[1,C,h,w]`; before that,
and only where a picture is given, the sample of that picture's posterior, of the same shape; and first of all, only
where an identity is, what its guest draws (`infinite_you`). After it come only the noises of `euler-stochastic`.
Shapes: B pictures, C latent channels, h w latent cells, L = h/2 * w/2 tokens, D = 4C, T text tokens, E P text widths.
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

from gesso.devices import CPU
from gesso.models import flux_network
from gesso.models.infusenet import Residuals
from gesso.pictures import read_pixels
from gesso.pipelines.contract import Output, Plan
from gesso.pipelines.flux_plan import FluxPlanner, guidance_values
from gesso.pipelines.flux_state import FluxConditioning, FluxDefaults, FluxState, ReadText, TextEncoder
from gesso.pipelines.infinite_you import IdentityConditioning, InfiniteYou, Presence, residuals, scales_of
from gesso.pipelines.latent_preview import LinearPreview
from gesso.pipelines.planning import chunks
from gesso.pipelines.token_state import join
from gesso.request import GenerationRequest
from gesso.sampling.forecasts import output_is_forecast
from gesso.sampling.guidance import NEGATIVE, PROMPT, branch

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel


class FluxPipeline:
    """The six verbs for FLUX.1 dev, schnell, and small networks of their kind. It is handed its components.

    `scheduler` are the values of the model's `scheduler_config.json`: how its schedule bends. The networks may be on
    the meta device; it can plan then, and nothing else. `device` and `dtype` are those of the arithmetic. `guest`
    paints a person's likeness, where requests want one.
    """

    def __init__(
        self,
        *,
        transformer: FluxTransformer2DModel,
        autoencoder: AutoencoderKL,
        text: TextEncoder,
        scheduler: Mapping[str, Any],
        defaults: FluxDefaults,
        name: str,
        digest: str,
        guest: InfiniteYou | None = None,
        device: torch.device | str = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.scheduler, self.defaults, self.name, self.digest = dict(scheduler), defaults, name, digest
        self.guest, self.device, self.dtype = guest, torch.device(device), dtype
        self.planner = FluxPlanner(transformer, autoencoder, text, self.scheduler, defaults, name, guest, dtype)
        self.stride = self.planner.stride
        values: Any = autoencoder.config
        self.latent_channels: int = values["latent_channels"]
        self._scale, self._shift = values["scaling_factor"], values["shift_factor"] or 0.0
        self._pixels = VaeImageProcessor(vae_scale_factor=2 * self.stride, vae_latent_channels=self.latent_channels)
        self._preview = LinearPreview(self.latents_of, self.latent_channels)

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, scheduler, lists and the picture, and count the work. Raises RequestError."""
        return self.planner.plan(request)

    # ---- encode and begin -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, plans: Sequence[Plan]) -> list[FluxConditioning]:
        """Every text once for all pictures of all plans: the prompts as one batch, the negatives as another."""
        guided = [max(guidance_values(plan, self.planner)[1]) > 1 for plan in plans]
        prompts = self._read([plan.request.prompt for plan in plans])
        negatives = self._read([plan.request.negative for plan, doubled in zip(plans, guided, strict=True) if doubled])
        return [
            FluxConditioning(
                prompts[plan.request.prompt],
                negatives[plan.request.negative] if doubled else None,
                self._posterior(plan.request),
                self._identity(plan.request),
            )
            for plan, doubled in zip(plans, guided, strict=True)
        ]

    def _read(self, texts: Sequence[str]) -> dict[str, ReadText]:
        different = list(dict.fromkeys(texts))
        if not different:
            return {}
        features_BTE, pooled_BP = (found.to(self.device, self.dtype) for found in self.text.encode(different))
        rows = zip(features_BTE.split(1), pooled_BP.split(1), strict=True)
        return {text: ReadText(*row) for text, row in zip(different, rows, strict=True)}

    def _posterior(self, request: GenerationRequest) -> DiagonalGaussianDistribution | None:
        """What the autoencoder makes of the given picture, which is stretched to the size that is painted."""
        if request.init_image is None:
            return None
        return self._encoded(read_pixels(Path(request.init_image)), request)

    def _identity(self, request: GenerationRequest) -> IdentityConditioning | None:
        if request.identity is None or self.guest is None:
            return None
        return self.guest.encode(request, lambda image: self._encoded(image, request))

    def _encoded(self, image: Image.Image, request: GenerationRequest) -> DiagonalGaussianDistribution:
        image_13HW = self._pixels.preprocess(image, height=request.height, width=request.width)  # pyright: ignore
        image_13HW = image_13HW.to(dtype=torch.float32).to(device=self.device, dtype=self.dtype)
        return self.autoencoder.encode(image_13HW).latent_dist  # pyright: ignore[reportAttributeAccessIssue]

    @torch.inference_mode()
    def begin(self, plan: Plan, conditioning: FluxConditioning, image: int) -> FluxState:
        """Noise for picture `image`, mixed with the given picture if there is one, and a scheduler of its own."""
        request = plan.request
        assert request.seed is not None and request.width is not None and request.height is not None
        size = (request.height // self.stride, request.width // self.stride)
        generator = torch.Generator().manual_seed(request.seed + image)
        scheduler, timesteps_N = self.planner.schedule(request, self.device, generator)
        presence = self._presence(request, conditioning, len(timesteps_N), generator)
        # The order of draws is that of FluxImg2ImgPipeline.prepare_latents.
        picture = conditioning.picture
        clean_1Chw = None if picture is None else (picture.sample(generator) - self._shift) * self._scale
        latent_1Chw = randn_tensor(
            (1, self.latent_channels, *size), generator=generator, device=self.device, dtype=self.dtype
        )
        if clean_1Chw is not None:
            latent_1Chw = scheduler.scale_noise(clean_1Chw, timesteps_N[:1], latent_1Chw)
        guidance, true_guidance = guidance_values(plan, self.planner)
        return FluxState(
            request=request,
            seed=request.seed + image,
            size=size,
            conditioning=conditioning,
            scheduler=scheduler,
            timesteps_N=timesteps_N,
            guidance=guidance,
            true_guidance=true_guidance,
            costs=self.planner.step_costs(request, true_guidance),
            positions_L3=flux_network.positions(*size).to(self.device, self.dtype),
            tokens_1LD=flux_network.pack(latent_1Chw),
            presence=presence,
        )

    def _presence(
        self, request: GenerationRequest, conditioning: FluxConditioning, evaluations: int, generator: torch.Generator
    ) -> Presence | None:
        """The guest's part in a picture, with a sample of its control picture, the first that is drawn."""
        identity = conditioning.identity
        if identity is None or request.identity is None:
            return None
        control_1Chw = (identity.control.sample(generator) - self._shift) * self._scale
        scales = scales_of(request.identity, evaluations)
        control_1LD = flux_network.pack(control_1Chw)
        return Presence(identity.networks, identity.vector_V, identity.tokens_1NE, control_1LD, scales)

    # ---- step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, states: Sequence[FluxState]) -> None:
        """One evaluation for all prompts, one for all negatives if they are guided, then each takes its own step."""
        tokens_BLD = join([state.tokens_1LD for state in states])
        # As FluxPipeline hands it over: in the latents' dtype, then divided; here every sample has its own.
        time_B = torch.stack([state.timesteps_N[state.index].to(tokens_BLD.dtype) for state in states]) / 1000
        prompts = [state.conditioning.prompt for state in states]
        added = self._residuals(states, prompts, tokens_BLD, time_B)
        velocity_BLD = self._velocity(states, prompts, tokens_BLD, time_B, added)
        velocities = list(velocity_BLD.split(1))
        if states[0].doubled:
            negatives = [state.conditioning.negative for state in states if state.conditioning.negative is not None]
            with branch(NEGATIVE):
                negative_BLD = self._velocity(states, negatives, tokens_BLD, time_B)
            for row, (state, away_1LD) in enumerate(zip(states, negative_BLD.split(1), strict=True)):
                scale = state.true_guidance[state.index]
                velocities[row] = away_1LD + scale * (velocities[row] - away_1LD)
        for state, velocity_1LD in zip(states, velocities, strict=True):
            state.advance(velocity_1LD)

    def _residuals(
        self, states: Sequence[FluxState], texts: Sequence[ReadText], tokens_BLD: Tensor, time_B: Tensor
    ) -> Residuals | None:
        """What the guest adds in this evaluation, which has one network and scale for all of a key; or nothing.

        Nothing too where the network's output is forecast, so that nobody would read it.
        """
        presences = [state.presence for state in states if state.presence is not None and state.presence_key]
        if not presences or output_is_forecast(PROMPT):
            return None
        return residuals(
            presences,
            states[0].index,
            tokens_BLD=tokens_BLD,
            pooled_BP=join([text.pooled_1P for text in texts]),
            time_B=time_B,
            positions_L3=states[0].positions_L3,
        )

    def _velocity(
        self,
        states: Sequence[FluxState],
        texts: Sequence[ReadText],
        tokens_BLD: Tensor,
        time_B: Tensor,
        added: Residuals | None = None,
    ) -> Tensor:
        """The network's velocity `[B,L,D]`, noise less clean, given these texts and what a guest adds."""
        guidance_B = None
        if self.planner.embeds_guidance:
            scales = [state.guidance[state.index] for state in states]
            guidance_B = torch.tensor(scales, device=self.device, dtype=torch.float32)
        features_BTE = join([text.features_1TE for text in texts])
        (velocity_BLD,) = self.transformer(
            hidden_states=tokens_BLD,
            timestep=time_B,
            guidance=guidance_B,
            pooled_projections=join([text.pooled_1P for text in texts]),
            encoder_hidden_states=features_BTE,
            txt_ids=features_BTE.new_zeros(features_BTE.shape[1], 3),
            img_ids=states[0].positions_L3,
            return_dict=False,
            **(added.arguments() if added is not None else {}),
        )
        return velocity_BLD

    # ---- pixels -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def preview(self, state: FluxState) -> Image.Image:
        """What the picture is on its way to, as far as a linear map from latents to colours can show it."""
        return self._preview(flux_network.unpack(state.clean_tokens(), *state.size)[0])

    def decode(self, states: Sequence[FluxState]) -> Iterator[Output]:
        """Finished latents to pictures, as many at once as make about half a megapixel."""
        height, width = states[0].size if states else (1, 1)
        for chunk in chunks(states, height * width * self.stride**2):
            with torch.inference_mode():
                pictures = self._pictures(
                    flux_network.unpack(join([state.tokens_1LD for state in chunk]), *chunk[0].size)
                )
            for state, picture in zip(chunk, pictures, strict=True):
                yield Output(image=picture, seed=state.seed, measured=self._measured(state, picture))

    def _measured(self, state: FluxState, picture: Image.Image) -> dict[str, object]:
        """How like the person a picture is, where one was asked for."""
        if state.presence is None or self.guest is None:
            return {}
        return {"likeness": self.guest.likeness(state.presence, picture)}

    def _pictures(self, latent_BChw: Tensor) -> list[Image.Image]:
        unscaled_BChw = (latent_BChw / self._scale) + self._shift
        image_B3HW = self.autoencoder.decode(unscaled_BChw, return_dict=False)[0]
        return self._pixels.postprocess(image_B3HW, output_type="pil")  # pyright: ignore[reportReturnType]

    def latents_of(self, image_B3SS: Tensor) -> Tensor:
        """Scaled latents of pictures, the posterior's mean, for the preview's fit."""
        encoded: Any = self.autoencoder.encode(image_B3SS.to(self.device, self.dtype))
        return (encoded.latent_dist.mode() - self._shift) * self._scale
