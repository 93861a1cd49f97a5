"""Schedulers by name: how many evaluations each takes, how schedules bend, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gesso.errors import RequestError
from gesso.sampling.flow import STOCHASTIC
from gesso.sampling.schedulers import NAMES, bend_of_tokens, check_name, make_scheduler

DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_times_fall_from_noise(name: str, steps: int) -> None:
    scheduler, timesteps_N = make_scheduler(name, DYNAMIC, steps=steps, tokens=256)
    assert len(timesteps_N) == (2 * steps - 1 if name == "heun" else steps)
    assert timesteps_N[0] >= 999
    assert (timesteps_N.diff() <= 0).all() and timesteps_N[-1] > 0
    assert scheduler.order == (2 if name == "heun" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_way_is_straight_where_the_velocity_is_constant(name: str) -> None:
    """All noise at the start, and with the true velocity, noise less clean, all clean at the end.

    Where noise is fresh in every step, the noise that is there is what lies between a sample and clean.
    """
    generator = torch.Generator().manual_seed(1)
    scheduler, timesteps_N = make_scheduler(name, {"shift": 2.0}, steps=4, tokens=16, generator=generator)
    clean_LD, noise_LD = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    x_LD = noise_LD
    for timestep in timesteps_N:
        velocity_LD = (x_LD - clean_LD) / timestep * 1000 if name == STOCHASTIC else noise_LD - clean_LD
        (x_LD,) = scheduler.step(velocity_LD, timestep, x_LD, return_dict=False)
    assert torch.allclose(x_LD, clean_LD, atol=2e-3)  # DPM++ begins a little below sigma 1


def test_schedulers_share_nothing() -> None:
    one, timesteps_N = make_scheduler("heun", DYNAMIC, steps=3, tokens=16)
    other, _ = make_scheduler("heun", DYNAMIC, steps=3, tokens=16)
    one.step(torch.ones(1, 1, 1), timesteps_N[0], torch.ones(1, 1, 1), return_dict=False)
    assert vars(other)["_step_index"] is None and vars(other)["prev_derivative"] is None


def test_more_tokens_bend_the_schedule_towards_noise() -> None:
    few, many = (make_scheduler("euler", DYNAMIC, steps=4, tokens=tokens)[1] for tokens in (256, 4096))
    assert (many[1:] > few[1:]).all()
    constant = make_scheduler("euler", {"shift": 1.0}, steps=4, tokens=4096)[1]
    assert np.allclose(constant, [1000, 750, 500, 250])


def test_the_bend_is_diffusers() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (1, 16, 256, 1000, 4096, 20000):
        assert bend_of_tokens(tokens, {}) == calculate_shift(tokens)
        config = {"base_image_seq_len": 64, "max_image_seq_len": 1024, "base_shift": 0.3, "max_shift": 2.0}
        assert bend_of_tokens(tokens, config) == calculate_shift(tokens, 64, 1024, 0.3, 2.0)


@pytest.mark.parametrize(("steps", "strength", "left"), [(4, 0.6, 3), (28, 0.6, 17), (4, 1.0, 4), (4, 0.01, 1)])
def test_strength_leaves_the_last_steps(steps: int, strength: float, left: int) -> None:
    for name in ("euler", "heun"):
        _, whole = make_scheduler(name, DYNAMIC, steps=steps, tokens=16)
        _, timesteps_N = make_scheduler(name, DYNAMIC, steps=steps, tokens=16, strength=strength)
        assert len(timesteps_N) == (2 * left - 1 if name == "heun" else left)
        assert torch.equal(timesteps_N, whole[len(whole) - len(timesteps_N) :])


@pytest.mark.parametrize("strength", [0.0, 1e-20])
def test_a_strength_that_leaves_no_step(strength: float) -> None:
    with pytest.raises(RequestError, match=r"init_strength .* is not enough to leave one of 4 steps"):
        make_scheduler("euler", DYNAMIC, steps=4, tokens=16, strength=strength)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(RequestError, match=r"one of: euler, euler-stochastic, heun, unipc, dpm\+\+"):
        check_name("ddim", from_picture=False)
    with pytest.raises(RequestError, match=r"one of: euler, euler-stochastic, heun$"):
        check_name("unipc", from_picture=True)
    for name in NAMES:
        check_name(name, from_picture=False)


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("steps", [2, 9])
def test_a_stretched_schedule_ends_where_it_is_said(name: str, steps: int) -> None:
    _, timesteps_N = make_scheduler(name, {**DYNAMIC, "shift_terminal": 0.02}, steps=steps, tokens=16)
    assert len(timesteps_N) == steps
    assert timesteps_N[0] >= 999 and round(float(timesteps_N[-1]), 3) in (20, 19)  # UniPC has whole timesteps


def test_what_cannot_be_stretched_is_refused() -> None:
    config = {**DYNAMIC, "shift_terminal": 0.02}
    with pytest.raises(
        RequestError, match=r"is not one that ends where this model's does; one of: euler, euler-stochastic, unipc$"
    ):
        make_scheduler("heun", config, steps=4, tokens=16)
    with pytest.raises(RequestError, match=r"one of: euler, euler-stochastic$"):
        check_name("unipc", from_picture=True, stretched=True)
    with pytest.raises(RequestError, match="steps 1 is not at least 2"):
        make_scheduler("euler", config, steps=1, tokens=16)


def test_noise_is_never_drawn_elsewhere() -> None:
    """A model's own setting that would draw from the global generator is put aside."""
    before = torch.get_rng_state()
    scheduler, timesteps_N = make_scheduler("euler", {**DYNAMIC, "stochastic_sampling": True}, steps=2, tokens=16)
    scheduler.step(torch.ones(1, 1, 1), timesteps_N[0], torch.ones(1, 1, 1), return_dict=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stochastic_one_is_that_of_diffusers(strength: float, dtype: torch.dtype) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    scheduler, timesteps_N = make_scheduler(STOCHASTIC, DYNAMIC, steps=5, tokens=256, strength=strength, generator=ours)
    rival: Any = FlowMatchEulerDiscreteScheduler(**DYNAMIC, stochastic_sampling=True)
    rival.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5), mu=bend_of_tokens(256, DYNAMIC))
    rival.set_begin_index(5 - len(timesteps_N))
    sample = other = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    for timestep in timesteps_N:
        velocity = torch.tanh(sample).to(dtype)
        (sample,) = scheduler.step(velocity, timestep, sample, return_dict=False)
        (other,) = rival.step(velocity, timestep, other.float(), generator=theirs, return_dict=False)
        assert sample.dtype == other.dtype == dtype
        rounding = 0.0 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(sample, other, atol=1e-6 + rounding, rtol=0)


def test_without_a_generator_it_is_for_planning_alone() -> None:
    scheduler, timesteps_N = make_scheduler(STOCHASTIC, DYNAMIC, steps=2, tokens=16)
    with pytest.raises(ValueError, match="planning"):
        scheduler.step(torch.ones(1, 1, 1), timesteps_N[0], torch.ones(1, 1, 1), return_dict=False)
