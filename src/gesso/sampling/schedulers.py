"""diffusers' schedulers that can take a flow model's steps: names, classes, and how each is set to a number of steps.

A scheduler carries the state of one picture's way (its place, and a multistep solver's past), so every picture gets an
object of its own. diffusers is imported when the first one is made. Not here: any solver's arithmetic (diffusers), and
the loop (`engine`).

Time as everywhere in flow matching here: sigma is 1 for noise and 0 for clean; timesteps are 1000 times that.
Names and what they are:

    euler    one straight step an evaluation (FlowMatchEulerDiscreteScheduler), what FLUX is made for
    heun     a step is looked at from both of its ends: two evaluations each but the last (FlowMatchHeunDiscrete…)
    unipc    a predictor and corrector of order 2 that remembers its past (arXiv:2302.04867)
    dpm++    a multistep solver of order 2 (arXiv:2211.01095)
    euler-stochastic  Euler's schedule, and fresh noise in every step (diffusers: `stochastic_sampling`)
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gesso.devices import CPU
from gesso.errors import RequestError
from gesso.sampling.flow import STOCHASTIC, first_step, shift_of_tokens, stochastic_step


class Scheduler(Protocol):
    """What is used of a scheduler of diffusers."""

    order: int

    @property
    def timesteps(self) -> Tensor: ...

    def set_timesteps(self, num_inference_steps: int, **values: Any) -> None: ...

    def set_begin_index(self, begin_index: int = 0) -> None: ...

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor: ...

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class _Solver:
    """A class of diffusers. `settings` stand over the model's own; `from_picture` where it can begin in mid-way.

    `stretches` where it knows of schedules that are stretched to end at `shift_terminal`.
    """

    module: str
    kind: str
    settings: Mapping[str, object] = field(default_factory=dict)
    from_picture: bool = False
    stretches: bool = False


class _StochasticEuler:
    """diffusers' Euler for the schedule, and steps with noise of the picture's own generator.

    diffusers' own such steps draw from no picture's generator in the older versions that are welcome here.
    """

    order = 1

    def __init__(self, euler: Any, generator: torch.Generator | None) -> None:
        self._euler, self._generator = euler, generator
        self._sigmas: list[float] = []  # on the host: a step waits for no device
        self._index = 0

    @property
    def timesteps(self) -> Tensor:
        return self._euler.timesteps

    def set_timesteps(self, num_inference_steps: int, **values: Any) -> None:
        self._euler.set_timesteps(num_inference_steps, **values)
        self._sigmas, self._index = self._euler.sigmas.tolist(), 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._euler.set_begin_index(begin_index)
        self._index = begin_index

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        return self._euler.scale_noise(sample, timestep, noise)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """The next sample, in the dtype of the output, as diffusers has it. Raises ValueError without a generator."""
        if self._generator is None:
            raise ValueError("made without a generator: it is for planning alone")
        sigma, following = self._sigmas[self._index : self._index + 2]
        noise = torch.randn(sample.shape, generator=self._generator).to(sample.device)
        self._index += 1
        moved = stochastic_step(sample.float(), model_output, sigma, following, noise)
        return (moved.to(model_output.dtype),)


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_SOLVERS = {
    "euler": _Solver(
        module="scheduling_flow_match_euler_discrete",
        kind="FlowMatchEulerDiscreteScheduler",
        settings={"stochastic_sampling": False},  # its noise would come from no picture's generator
        from_picture=True,
        stretches=True,
    ),
    STOCHASTIC: _Solver(
        module="scheduling_flow_match_euler_discrete",
        kind="FlowMatchEulerDiscreteScheduler",
        from_picture=True,
        stretches=True,
    ),
    "heun": _Solver(
        module="scheduling_flow_match_heun_discrete", kind="FlowMatchHeunDiscreteScheduler", from_picture=True
    ),
    "unipc": _Solver(
        module="scheduling_unipc_multistep", kind="UniPCMultistepScheduler", settings=_FLOW, stretches=True
    ),
    "dpm++": _Solver(module="scheduling_dpmsolver_multistep", kind="DPMSolverMultistepScheduler", settings=_FLOW),
}

NAMES = tuple(_SOLVERS)


def check_name(name: str, *, from_picture: bool, stretched: bool = False) -> None:
    """Refuse a name that is not known, or one that cannot do what is wanted of it (RequestError).

    That is to begin from a picture, or, where it is `stretched`, to follow the model's schedule.
    """
    fitting = {known: solver for known, solver in _SOLVERS.items() if solver.stretches or not stretched}
    known = [known for known, solver in fitting.items() if solver.from_picture or not from_picture]
    if name not in _SOLVERS:
        raise RequestError("scheduler", name, "a scheduler that is known", f"one of: {', '.join(known)}")
    if name not in fitting:
        raise RequestError("scheduler", name, "one that ends where this model's does", f"one of: {', '.join(known)}")
    if name not in known:
        raise RequestError("scheduler", name, "one that begins from a picture", f"one of: {', '.join(known)}")


def make_scheduler(
    name: str,
    config: Mapping[str, Any],
    *,
    steps: int,
    tokens: int,
    strength: float = 1.0,
    device: torch.device | str = CPU,
    generator: torch.Generator | None = None,
) -> tuple[Scheduler, Tensor]:
    """A scheduler set to a number of steps, and the timestep `[N]` of every evaluation of the network.

    N is `steps` for most, twice that less one for Heun's; from a picture, the last `strength` of the steps are taken.
    `config` are the values of a model's `scheduler_config.json`, `tokens` those of the picture, which bend the
    schedule where `use_dynamic_shifting` says so. `generator` is the picture's own, for a scheduler that draws noise.

    Mirrors `retrieve_timesteps` and `get_timesteps` of diffusers' FLUX pipelines. They cannot drive Heun's scheduler,
    which takes neither sigmas nor a bend: it gets the bend as its constant shift, which is the same formula. Where
    `config` has a `shift_terminal`, Qwen-Image's pipelines are mirrored, which hand every solver its sigmas; a single
    step cannot be stretched.
    Raises RequestError for an unknown name, and for a strength that leaves no step.
    """
    stretched = bool(config.get("shift_terminal"))
    check_name(name, from_picture=False, stretched=stretched)
    if stretched and steps < 2:
        raise RequestError("steps", steps, "at least 2 for a model whose schedule ends above 0", "nearest: 2")
    solver, begins = _SOLVERS[name], np.linspace(1.0, 1 / steps, steps)
    make = getattr(importlib.import_module(f"diffusers.schedulers.{solver.module}"), solver.kind)
    mu = bend_of_tokens(tokens, config)
    bend = float(np.exp(mu)) if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))
    settings = {**config, **solver.settings, "flow_shift": bend}
    if name in ("heun", "dpm++"):
        settings |= {"shift": bend, "use_dynamic_shifting": False}
    known = inspect.signature(make.__init__).parameters
    scheduler: Scheduler = make(**{key: value for key, value in settings.items() if key in known})
    if name == STOCHASTIC:
        scheduler = _StochasticEuler(scheduler, generator)
    if name in ("euler", STOCHASTIC):
        scheduler.set_timesteps(steps, device=device, sigmas=begins, mu=mu)
    elif name == "unipc":
        scheduler.set_timesteps(steps, device=device, sigmas=begins if stretched else None, mu=mu)
    else:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of how DPM++ asks numpy
            scheduler.set_timesteps(steps, device=device)
    skipped = first_step(steps, strength) * scheduler.order
    scheduler.set_begin_index(skipped)
    timesteps_N = scheduler.timesteps[skipped:]
    if not len(timesteps_N):
        raise RequestError("init_strength", strength, f"enough to leave one of {steps} steps", "raise it")
    return scheduler, timesteps_N


def bend_of_tokens(tokens: int, config: Mapping[str, Any]) -> float:
    """mu for a picture of so many tokens; the defaults are those of diffusers' `calculate_shift`."""
    return shift_of_tokens(
        tokens,
        base_tokens=config.get("base_image_seq_len", 256),
        most_tokens=config.get("max_image_seq_len", 4096),
        base_shift=config.get("base_shift", 0.5),
        most_shift=config.get("max_shift", 1.15),
    )
