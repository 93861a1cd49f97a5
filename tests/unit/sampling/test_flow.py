"""Schedules, steps and guidance of flow matching: what holds for any number of steps, shift and size."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.sampling.flow import (
    complete,
    dynamic_shift,
    estimated_clean,
    euler_step,
    first_step,
    guide_velocity,
    linear_sigmas,
    noised,
    share_of_way,
    shift_of_tokens,
    static_shift,
)

STEPS = st.integers(1, 1000)
SHIFTS = st.floats(0.05, 20)


@given(steps=STEPS, shift=SHIFTS)
def test_a_schedule_falls_from_noise_to_clean(steps: int, shift: float) -> None:
    sigmas = complete(static_shift(linear_sigmas(steps), shift))
    assert (sigmas.dtype, len(sigmas)) == (torch.float32, steps + 1)
    assert (float(sigmas[0]), float(sigmas[-1])) == (1.0, 0.0)
    assert bool((sigmas.diff() < 0).all())


@given(steps=STEPS, shift=SHIFTS)
def test_shifts_undo_each_other_and_bend_one_way(steps: int, shift: float) -> None:
    sigmas = linear_sigmas(steps)
    shifted = static_shift(sigmas, shift)
    torch.testing.assert_close(static_shift(shifted, 1 / shift), sigmas, atol=1e-12, rtol=0)
    assert torch.equal(static_shift(sigmas, 1.0), sigmas)
    assert bool(((shifted >= sigmas - 1e-12) if shift >= 1 else (shifted <= sigmas + 1e-12)).all())


@given(steps=STEPS, mu=st.floats(-2, 3))
def test_a_dynamic_shift_is_a_static_one_of_its_exponential(steps: int, mu: float) -> None:
    sigmas = linear_sigmas(steps)
    published = math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))
    torch.testing.assert_close(dynamic_shift(sigmas, mu), published, atol=1e-12, rtol=0)


def test_mu_is_a_line_through_two_points() -> None:
    assert shift_of_tokens(256) == pytest.approx(0.5)
    assert shift_of_tokens(4096) == pytest.approx(1.15)
    assert shift_of_tokens(8192) == pytest.approx(1.15 + 0.65 * 4096 / 3840)
    assert shift_of_tokens(10, base_tokens=10, most_tokens=20, base_shift=1, most_shift=3) == pytest.approx(1)


def test_turbo_in_eight_steps() -> None:
    expected = [1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0.0]
    torch.testing.assert_close(complete(static_shift(linear_sigmas(8), 3.0)), torch.tensor(expected))


@given(steps=STEPS, strength=st.floats(0, 1))
def test_a_given_picture_skips_the_share_that_is_not_repainted(steps: int, strength: float) -> None:
    first = first_step(steps, strength)
    assert 0 <= first <= steps
    assert abs((steps - first) - steps * strength) < 1 + 1e-9
    assert first_step(steps, 1.0) == 0
    assert first_step(steps, 0.0) == steps
    assert strength < 1e-9 or first < steps


@settings(max_examples=25)
@given(steps=st.integers(1, 40), shift=SHIFTS)
def test_along_a_straight_line_any_schedule_ends_at_the_clean_picture(steps: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, generator=generator)
    sigmas = complete(static_shift(linear_sigmas(steps), shift)).tolist()
    latent, velocity = noise, noise - clean
    for now, after in itertools.pairwise(sigmas):
        torch.testing.assert_close(latent, noised(clean, noise, now), atol=1e-5, rtol=0)
        torch.testing.assert_close(estimated_clean(latent, velocity, now), clean, atol=1e-5, rtol=0)
        latent = euler_step(latent, velocity, now, after)
    torch.testing.assert_close(latent, clean, atol=1e-5, rtol=0)


def test_time_and_sigma_run_against_each_other() -> None:
    sigmas = complete(linear_sigmas(10))
    times = share_of_way(sigmas)
    assert times.dtype == torch.float32
    torch.testing.assert_close(times, 1 - sigmas, atol=1e-6, rtol=0)
    assert (float(times[0]), float(times[-1])) == (0.0, 1.0)


@given(scale=st.floats(0, 20), most=st.just(0.0) | st.floats(1e-30, 3))
def test_guidance_is_capped_and_keeps_its_direction(scale: float, most: float) -> None:
    """Lengths are measured in float64, since squares of the smallest leave what float32 can tell apart."""
    generator = torch.Generator().manual_seed(1)
    positive, negative = torch.randn(2, 4, 1, 3, 5, generator=generator)
    free = guide_velocity(positive, negative, scale)
    torch.testing.assert_close(free, positive + scale * (positive - negative))
    guided = guide_velocity(positive, negative, scale, most)
    if most > 0:
        limit = most * float(positive.double().norm())
        assert float(guided.double().norm()) <= limit * (1 + 1e-5)
        if float(free.double().norm()) <= limit * (1 - 1e-6):
            assert torch.equal(guided, free)
    if most > 0 and float(guided.norm()) > 1e-3:
        cosine = torch.nn.functional.cosine_similarity(guided.flatten(), free.flatten(), dim=0)
        assert float(cosine) > 0.999


def test_guidance_of_nothing_is_nothing() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert torch.equal(guide_velocity(one, zero, 0.0, 1.0), one)
    assert torch.equal(guide_velocity(zero, zero, 5.0, 1.0), zero)
    assert torch.equal(guide_velocity(zero, one, 5.0, 1.0), zero)
