"""Flow matching (arXiv:2210.02747; rectified flow, arXiv:2209.03003) as arithmetic: schedules, a step, guidance.

Convention of time, here and everywhere that imports this: sigma is 1 at noise and 0 at clean, a noisy latent is
(1 - sigma) * clean + sigma * noise, and a velocity is noise - clean. Networks that see time or velocity otherwise are
translated to by their pipelines. Schedules are computed in float64 and rounded to float32 once, at the end.
Not here: networks, which picture is guided when (pipelines).
Shapes: N steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EULER, STOCHASTIC = "euler", "euler-stochastic"
"""The names of the schedulers that take `euler_step` and `stochastic_step`."""


@dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """How a schedule bends towards noise: by `shift` or, with `use_dynamic_shifting`, by more for more tokens.

    Names and defaults are those of diffusers' `FlowMatchEulerDiscreteScheduler`. Raises ValueError.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self) -> None:
        if not 0 < self.shift <= 1000:
            raise ValueError(f"shift {self.shift} is not above 0 and at most 1000")
        if (most := self.max_image_seq_len) <= (few := self.base_image_seq_len):
            raise ValueError(f"max_image_seq_len {most} is not above base_image_seq_len {few}")


def linear_sigmas(steps: int, end: float = 0.0) -> Tensor:
    """Where each of `steps` steps begins, float64 `[N]`: evenly from 1 down towards `end`, which is not among them."""
    return torch.linspace(1.0, end, steps + 1, dtype=torch.float64)[:-1]


def static_shift(sigmas_N: Tensor, shift: float) -> Tensor:
    """Sigmas bent towards noise: shift * s / (1 + (shift - 1) * s). 1 changes nothing. Source: arXiv:2403.03206."""
    return shift * sigmas_N / (1 + (shift - 1) * sigmas_N)


def dynamic_shift(sigmas_N: Tensor, mu: float) -> Tensor:
    """Sigmas bent by a shift of e^mu, see `shift_of_tokens`: e^mu / (e^mu + 1/s - 1). 0 stays 0."""
    return static_shift(sigmas_N, math.exp(mu))


def shift_of_tokens(
    tokens: int,
    *,
    base_tokens: int = 256,
    most_tokens: int = 4096,
    base_shift: float = 0.5,
    most_shift: float = 1.15,
) -> float:
    """mu for a picture of so many tokens: the straight line through the two given points, not cut off beyond them."""
    slope = (most_shift - base_shift) / (most_tokens - base_tokens)
    return tokens * slope + (base_shift - slope * base_tokens)  # in this order it is diffusers' to the last bit


def complete(sigmas_N: Tensor) -> Tensor:
    """A schedule to step along: where each step begins, then 0; float32 `[N+1]` on the CPU."""
    return torch.cat((sigmas_N, sigmas_N.new_zeros(1))).float()


def share_of_way(sigmas_N: Tensor) -> Tensor:
    """How far from noise (0) to clean (1), float32: 1 - sigma, by way of a thousand steps as published models have it.

    Rounding matters: some networks multiply it by a thousand and take its sine.
    """
    return (1000 - sigmas_N.float() * 1000) / 1000


def first_step(steps: int, strength: float) -> int:
    """The step at which painting over a given picture begins; `strength` is the share of steps that are done.

    0 for strength 1, `steps` (nothing is done) for 0. Source: image-to-image in diffusers.
    """
    return int(max(steps - min(steps * strength, steps), 0))


def noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The point between clean and noise at sigma."""
    return sigma * noise + (1.0 - sigma) * clean


def estimated_clean(latent: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Where a straight line from here would end."""
    return latent - sigma * velocity


def euler_step(latent: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One step of Euler's method along dx/dsigma = velocity, in the latent's dtype.

    The difference of sigmas, which come from a float32 schedule, is rounded to float32 as well.
    """
    difference = float(torch.tensor(next_sigma) - torch.tensor(sigma))
    return latent + difference * velocity


def stochastic_step(latent: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Tensor) -> Tensor:
    """To where the straight line ends, and from there back to `next_sigma` with noise that is fresh.

    What an early step got wrong is drowned and looked at anew, where Euler's method would carry it along. It is what
    diffusers' `FlowMatchEulerDiscreteScheduler` does with `stochastic_sampling`.
    """
    return noised(estimated_clean(latent, velocity, sigma), noise, next_sigma)


def guide_velocity(positive: Tensor, negative: Tensor, scale: float, most: float = 0.0) -> Tensor:
    """positive + scale * (positive - negative), of one whole sample: 0 is no guidance (elsewhere that is called 1).

    `most` caps the length of the result at so many lengths of `positive`; 0 does not. Source: Z-Image's published
    code. Looks at no number on the host.
    """
    guided = positive + scale * (positive - negative)
    if most == 0:
        return guided
    limit = torch.linalg.vector_norm(positive) * most
    length = torch.linalg.vector_norm(guided)
    return torch.where(length > limit, guided * (limit / length), guided)
