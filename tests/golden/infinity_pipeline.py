"""Infinity goldens of kind e once more, through the pipeline: the six verbs as the engine calls them.

The pictures of a golden step in one company, each a request of its own. Text features are the recorded ones; noise is
the recorded one, where it is recorded, in place of the pipeline's own draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from gesso.models.infinity.autoencoder import Autoencoder, AutoencoderConfig
from gesso.models.infinity.scales import ScaleSchedule
from gesso.models.infinity.transformer import InfinityTransformer
from gesso.pipelines.infinity import InfinityPipeline
from gesso.pipelines.infinity_state import GenerationDefaults
from gesso.request import GenerationRequest
from gesso.sampling.bits import exponential_noise
from tests.golden.comparison import Comparison
from tests.golden.infinity_network import GenerationSideCar
from tests.golden.side_car import Golden

_SIDE = 512  # stands for whatever size the schedule has: the pipeline looks it up


@dataclass(frozen=True)
class RecordedText:
    """A text encoder that knows the golden's prompts by name."""

    by_prompt: dict[str, Tensor]

    @property
    def max_tokens(self) -> int:
        return max(len(features) for features in self.by_prompt.values())

    def count(self, prompt: str) -> int:
        return len(self.by_prompt[prompt])

    def unknown(self, prompt: str) -> list[str]:
        return []

    def features(self, prompts: Sequence[str]) -> list[Tensor]:
        return [self.by_prompt[prompt] for prompt in prompts]


def check_pipeline(
    golden: Golden,
    comparison: Comparison,
    side_car: GenerationSideCar,
    network: InfinityTransformer,
    autoencoder: Autoencoder | None,
    schedule: ScaleSchedule,
) -> None:
    """Sums of codes and inputs after every scale, and the picture."""
    pipeline = InfinityPipeline(
        transformer=network,
        autoencoder=autoencoder or _stand_in(network),
        text=_text(golden, side_car),
        schedules={(_SIDE, _SIDE): schedule},
        defaults=GenerationDefaults(width=_SIDE, height=_SIDE),
        name="golden",
        digest="",
    )
    plans = [pipeline.plan(request) for request in _requests(side_car, len(schedule))]
    conditionings = pipeline.encode(plans)
    states = [pipeline.begin(plan, made, 0) for plan, made in zip(plans, conditionings, strict=True)]
    atol = golden.tolerances.get("floats", default=1e-3)
    with patch("gesso.pipelines.infinity.exponential_noise", side_effect=_noise_source(golden, schedule)):
        for scale in range(len(schedule)):
            pipeline.step(states)
            name = f"s{scale:02d}"
            if (summed := golden.tensors.get(f"{name}.summed_codes")) is not None:
                measured = torch.stack([state.sum_kHW for state in states])[:, :, None]
                comparison.close(f"{name}.summed_codes (pipeline)", measured, summed, atol)
            inputs = [state.inputs_nK for state in states if state.inputs_nK is not None]
            if (recorded := golden.tensors.get(f"{name}.next_input")) is not None:
                comparison.close(f"{name}.next_input (pipeline)", torch.stack(inputs), recorded, atol)
    if "final_latent" in golden.tensors:
        latent = torch.stack([state.sum_kHW for state in states])
        comparison.close("final_latent (pipeline)", latent, golden.tensor("final_latent"), atol)
    if autoencoder is not None:
        pictures = [np.array(output.image)[..., ::-1].copy() for output in pipeline.decode(states)]
        _check_pictures(golden, comparison, torch.from_numpy(np.stack(pictures)))


def _check_pictures(golden: Golden, comparison: Comparison, pixels_BHW3: Tensor) -> None:
    for name, recorded in golden.tensors.items():
        if name.startswith("image_u8_bgr"):
            crop = pixels_BHW3[:, : recorded.shape[1], : recorded.shape[2]]
            comparison.close(f"{name} (pipeline)", crop, recorded, golden.tolerances.get("uint8", default=1))


def _requests(side_car: GenerationSideCar, scales: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt=f"prompt {index}",
            negative=f"negative {index}" if side_car.negative_text_lens else "",
            seed=side_car.g_seed,
            guidance=tuple(side_car.guidance(scales)),
            temperature=tuple(side_car.temperatures(scales)),
            guidance_layer=side_car.guided_layer,
            top_k=side_car.top_k,
            top_p=side_car.top_p,
        )
        for index in range(len(side_car.text_lens))
    ]


def _text(golden: Golden, side_car: GenerationSideCar) -> RecordedText:
    prompts = golden.tensor("text_features").split(side_car.text_lens)
    known = {f"prompt {index}": features for index, features in enumerate(prompts)}
    if side_car.negative_text_lens:
        negatives = golden.tensor("negative_text_features").split(side_car.negative_text_lens)
        known |= {f"negative {index}": features for index, features in enumerate(negatives)}
    return RecordedText(known)


def _noise_source(golden: Golden, schedule: ScaleSchedule) -> Iterator[Tensor] | Callable[..., Tensor]:
    """Recorded draws as the pipeline asks for them, scale by scale, picture by picture; else its own draws."""
    recorded = [golden.tensors.get(f"s{scale:02d}.exp_noise") for scale in range(len(schedule))]
    if any(noise_BnV is None for noise_BnV in recorded):
        return exponential_noise
    return iter([noise_nV for noise_BnV in recorded if noise_BnV is not None for noise_nV in noise_BnV])


def _stand_in(network: InfinityTransformer) -> Autoencoder:
    """A tokenizer of the right number of bits, for goldens that have none; it decodes nothing."""
    bits = network.config.bits // (4 if network.config.patchify else 1)
    one = AutoencoderConfig(
        bits=bits, width=1, encoder_multipliers=(1,), decoder_multipliers=(1,), residual_blocks=1, stride=1, groups=1
    )
    return Autoencoder(one)
