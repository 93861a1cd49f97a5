"""Z-Image as a pipeline: one step is one evaluation of S3-DiT, for pictures of any sizes, prompts and times together.

Here: what is peculiar to the family. Prompts and negative prompts of a company go through the network at once, packed
without padding; what does not change from step to step is made once. A picture that is given is where painting starts,
or, for models that edit, a condition. What a request means to Z-Image is in `z_image_plan`.
Not here: files and dtypes (`engine/loading`), the loop (`engine`), the network (`models/s3dit`).

The network's own convention (time 0 at noise, output clean - noise) ends here: states hold sigmas and velocities as
`sampling/flow` has them. Latents are float32; only what the network reads is cast.
Random numbers: picture i has one CPU generator seeded `seed + i`, which draws the initial noise `[C,h,w]` and, for the
stochastic scheduler alone, that of every step but the last. A given picture's latent is its posterior's mean.
Shapes: B pictures, C latent channels, h w latent cells, T text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from gesso.devices import CPU
from gesso.models.s3dit.transformer import Prompt, S3DiT, size_of
from gesso.pictures import cover_crop, read_pixels
from gesso.pipelines.contract import Output, Plan
from gesso.pipelines.latent_preview import LinearPreview
from gesso.pipelines.planning import chunks
from gesso.pipelines.z_image_plan import ZImagePlanner
from gesso.pipelines.z_image_state import (
    EditingTextEncoder,
    PictureEncoder,
    TextEncoder,
    Together,
    ZImageConditioning,
    ZImageDefaults,
    ZImageState,
    guidance_of_steps,
)
from gesso.request import GenerationRequest
from gesso.sampling.flow import FlowSchedule, guide_velocity, noised
from gesso.sampling.guidance import NEGATIVE, PROMPT, branches

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Preview = Callable[[Tensor], Image.Image]


class ZImagePipeline:
    """The six verbs for Z-Image: Turbo, Base, Edit, and small networks of their kind. It is handed its components.

    `pictures` encodes what is edited, for models that read such features. `preview` shows a latent `[C,h,w]`; None
    fits a linear map to the autoencoder at first use. The networks may be on the meta device; it can plan then, and
    nothing else. `device` and `dtype` are those of the network's arithmetic.
    """

    def __init__(
        self,
        *,
        transformer: S3DiT,
        autoencoder: AutoencoderKL,
        text: TextEncoder,
        shift: FlowSchedule,
        defaults: ZImageDefaults,
        name: str,
        digest: str,
        pictures: PictureEncoder | None = None,
        preview: Preview | None = None,
        device: torch.device | str = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.transformer, self.autoencoder, self.text, self.pictures = transformer, autoencoder, text, pictures
        self.defaults, self.name, self.digest = defaults, name, digest
        self.device, self.dtype = torch.device(device), dtype
        self.planner = ZImagePlanner(transformer, autoencoder, text, pictures, shift, defaults, name, dtype)
        values: Any = autoencoder.config
        self._scale, self._shift = values["scaling_factor"], values["shift_factor"] or 0.0
        self._preview = preview or LinearPreview(self.latents_of, transformer.config.in_channels)

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill blanks, check sizes, scheduler, lists and the picture, and count the work. Raises RequestError."""
        return self.planner.plan(request)

    # ---- encode and begin -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, plans: Sequence[Plan]) -> list[ZImageConditioning]:
        """Each text once for all plans and pictures (to edit one, once a plan); the latent of a given picture."""
        guided = [any(guidance_of_steps(plan.request, self.planner.sigmas(plan.request))) for plan in plans]
        both = list(zip(plans, guided, strict=True))
        if self.defaults.editing:
            prompts = [prompt for plan, doubled in both for prompt in self._editing_prompts(plan.request, doubled)]
            contexts = iter(self.transformer.read(prompts))
        else:
            texts = [text for plan, doubled in both for text in _texts(plan.request, doubled)]
            different = list(dict.fromkeys(texts))
            read = self.transformer.read([Prompt([features_TE]) for features_TE in self.text.features(different)])
            found = dict(zip(different, read, strict=True))
            contexts = iter([found[text] for text in texts])
        return [
            ZImageConditioning(
                prompt=next(contexts),
                negative=next(contexts) if doubled else None,
                start_C1hw=None if self.defaults.editing else self._start(plan.request),
            )
            for plan, doubled in both
        ]

    def _editing_prompts(self, request: GenerationRequest, guided: bool) -> list[Prompt]:
        """What the network reads of a prompt, and of the negative prompt, with the picture that is edited."""
        texts = _texts(request, guided)
        if request.init_image is None:
            return [Prompt([features_TE], editing=True) for features_TE in self.text.features(texts)]
        assert isinstance(self.text, EditingTextEncoder)
        picture = read_pixels(Path(request.init_image))
        fitting, size = self.planner.condition_sizes(picture.width, picture.height)
        if fitting != picture.size:
            picture = picture.resize(fitting, Image.Resampling.LANCZOS)
        latent_C1hw = self.latents_of(_pixels(cover_crop(picture, *size, request.init_image)))[0, :, None]
        features = [] if self.pictures is None else [self.pictures.features(picture)]
        return [Prompt(self.text.pieces(text, 1), [latent_C1hw], features, editing=True) for text in texts]

    def _start(self, request: GenerationRequest) -> Tensor | None:
        """The latent of the picture to start from, cut to the size that is painted."""
        if request.init_image is None:
            return None
        assert request.width is not None and request.height is not None
        picture = cover_crop(read_pixels(Path(request.init_image)), request.width, request.height, request.init_image)
        return self.latents_of(_pixels(picture))[0, :, None]

    @torch.inference_mode()
    def begin(self, plan: Plan, conditioning: ZImageConditioning, image: int) -> ZImageState:
        """Noise for picture `image`, mixed with the given picture if there is one to start from."""
        request = plan.request
        assert request.seed is not None
        size, sigmas_N = self.planner.size(request), self.planner.sigmas(request)
        generator = torch.Generator().manual_seed(request.seed + image)
        noise_Chw = torch.randn((self.transformer.config.in_channels, *size[1:]), generator=generator)
        latent_C1hw = noise_Chw[:, None].to(self.device)
        if conditioning.start_C1hw is not None:
            latent_C1hw = noised(conditioning.start_C1hw, latent_C1hw, float(sigmas_N[0]))
        guidance = guidance_of_steps(request, sigmas_N)
        negative = conditioning.negative
        shapes = (conditioning.prompt.shape, None if negative is None else negative.shape)
        return ZImageState(
            request=request,
            seed=request.seed + image,
            conditioning=conditioning,
            sigmas_N=sigmas_N,
            guidance=guidance,
            costs=self.planner.step_costs(size, guidance, *shapes),
            latent_C1hw=latent_C1hw,
            generator=generator,
        )

    # ---- step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, states: Sequence[ZImageState]) -> None:
        """One evaluation: all prompts, then the negative prompts of those that are guided; each takes its own step."""
        guided = [index for index, state in enumerate(states) if state.guided]
        together = self._together(states, guided)
        time_B = torch.tensor([state.time for state in states], device=self.device)
        latents = [state.latent_C1hw.to(self.dtype) for state in states]
        with branches([*((index, PROMPT) for index in range(len(states))), *((index, NEGATIVE) for index in guided)]):
            outputs = [output.float() for output in self.transformer(latents, time_B, together.company)]
        negatives = dict(zip(guided, outputs[len(states) :], strict=True))
        for index, state in enumerate(states):
            output = outputs[index]
            if index in negatives:
                most = state.request.guidance_normalization or 0.0
                output = guide_velocity(output, negatives[index], state.guidance[state.index], most)
            state.together = together
            state.advance(-output)

    def _together(self, states: Sequence[ZImageState], guided: Sequence[int]) -> Together:
        """The company that these states already are, or a new one."""
        pictures = tuple(state.number for state in states)
        doubled = tuple(states[index].number for index in guided)
        old = states[0].together
        if old is not None and (old.pictures, old.guided) == (pictures, doubled):
            return old
        contexts = [state.conditioning.prompt for state in states]
        contexts += [context for index in guided if (context := states[index].conditioning.negative) is not None]
        sizes = [size_of(state.latent_C1hw) for state in states]
        company = self.transformer.join(sizes, contexts, [*range(len(states)), *guided])
        return Together(pictures, doubled, company)

    # ---- pixels -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def preview(self, state: ZImageState) -> Image.Image:
        """What the picture is on its way to, as far as a linear map from latents to colours can show it."""
        return self._preview(state.estimate()[:, 0])

    def decode(self, states: Sequence[ZImageState]) -> Iterator[Output]:
        """Finished latents to pictures, as many of a size at once as make about half a megapixel."""
        for size, same in groupby(states, key=lambda state: size_of(state.latent_C1hw)):
            run = list(same)
            for chunk in chunks(run, size[1] * size[2] * self.planner.stride**2):
                with torch.inference_mode():
                    pictures = self._pictures(torch.stack([state.latent_C1hw[:, 0] for state in chunk]))
                for state, picture in zip(chunk, pictures, strict=True):
                    yield Output(image=picture, seed=state.seed)

    def _pictures(self, latent_BChw: Tensor) -> list[Image.Image]:
        unscaled_BChw = latent_BChw / self._scale + self._shift
        decoded: Any = self.autoencoder.decode(unscaled_BChw.to(self.autoencoder.dtype), return_dict=False)
        pixels_BHW3 = to_uint8(decoded[0]).cpu().numpy()
        return [Image.fromarray(pixels) for pixels in pixels_BHW3]

    def latents_of(self, image_B3HW: Tensor) -> Tensor:
        """Scaled latents `[B,C,h,w]` of pictures in [-1,1]: the posterior's mean, float32."""
        encoded: Any = self.autoencoder.encode(image_B3HW.to(self.device, self.autoencoder.dtype))
        return (encoded.latent_dist.mode().float() - self._shift) * self._scale


def to_uint8(image_B3HW: Tensor) -> Tensor:
    """Pictures in [-1,1] to pixels, uint8 `[B,H,W,3]`, rounded to the nearest."""
    return ((image_B3HW.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _texts(request: GenerationRequest, guided: bool) -> list[str]:
    return [request.prompt, request.negative] if guided else [request.prompt]


def _pixels(picture: Image.Image) -> Tensor:
    """A picture as `[1,3,H,W]` in [-1,1]."""
    pixels_HW3 = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, -1, 3)
    return (pixels_HW3.movedim(-1, 0).float() / 127.5 - 1)[None]
