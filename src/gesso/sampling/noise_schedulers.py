"""diffusers' schedulers for networks that predict noise or velocity: names, classes, and how each is set and stepped.

The schedule of noise is the variance-preserving one that Stable Diffusion was trained with. A scheduler carries the
state of one picture's way, so every picture gets an object of its own; the noise of stochastic ones comes from the
picture's own generator. They count on the CPU, which keeps a step free of waiting for the device. diffusers is imported
when the first one is made. Not here: solvers of flow models (`schedulers`), any solver's arithmetic (diffusers).

Names and what they are, by diffusers' class; "-karras" spaces the noise as arXiv:2206.00364, equation 5:

    euler        one straight step an evaluation (EulerDiscrete)
    euler-a      the same with fresh noise at every step (EulerAncestralDiscrete)
    heun         a step is looked at from both of its ends: two evaluations each but the last (HeunDiscrete)
    ddim         arXiv:2010.02502 without noise (DDIM); ddpm: arXiv:2006.11239, fresh noise at every step (DDPM)
    pndm         arXiv:2202.09778, linear multistep; one evaluation more than steps (PNDM)
    dpm++2m      multistep of order 2 (arXiv:2211.01095; DPMSolverMultistep); dpm++2m-sde: its stochastic form
    dpm++sde     single step of order 2, stochastic: every second evaluation is half-way (DPMSolverSinglestep)
    deis         exponential integrator, multistep of order 2 (arXiv:2204.13902; DEISMultistep)
    lms          linear multistep of order 4 (LMSDiscrete); from noise alone, see `FROM_NOISE_ALONE`
    unipc        a predictor and corrector of order 2 (arXiv:2302.04867; UniPCMultistep)
    lcm          few steps, for networks distilled to it (arXiv:2310.04378; LCM)
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gesso.devices import CPU
from gesso.errors import RequestError

DIFFUSERS_CLASSES = "diffusers.schedulers.scheduling_"
_LCM_STEPS = 50  # steps that consistency distillation knows, unless a model says otherwise


class NoiseScheduler(Protocol):
    """What is used of a scheduler of diffusers."""

    order: int
    timesteps: Tensor
    alphas_cumprod: Tensor

    @property
    def init_noise_sigma(self) -> float | Tensor: ...

    def set_timesteps(self, num_inference_steps: int, **values: Any) -> None: ...

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **values: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class _Solver:
    """A class of diffusers, and settings that stand over the model's own.

    `from_picture` where it can take the last of its steps alone.
    """

    module: str
    kind: str
    settings: Mapping[str, object] = field(default_factory=dict)
    from_picture: bool = True

    def load(self) -> Any:
        return getattr(importlib.import_module(f"{DIFFUSERS_CLASSES}{self.module}"), self.kind)


_PLAIN = {"use_karras_sigmas": False}
_KARRAS = {"use_karras_sigmas": True}
_MULTISTEP = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_MULTISTEP_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
# Its last step must be one of order 1: diffusers would say so, and set it.
_SINGLE_STEP_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "lower_order_final": True}


def _dpm_multistep(**settings: object) -> _Solver:
    return _Solver(module="dpmsolver_multistep", kind="DPMSolverMultistepScheduler", settings=settings)


def _dpm_single_step(**settings: object) -> _Solver:
    return _Solver(module="dpmsolver_singlestep", kind="DPMSolverSinglestepScheduler", settings=settings)


_SOLVERS = {
    "euler": _Solver(module="euler_discrete", kind="EulerDiscreteScheduler", settings=_PLAIN),
    "euler-karras": _Solver(module="euler_discrete", kind="EulerDiscreteScheduler", settings=_KARRAS),
    "euler-a": _Solver(module="euler_ancestral_discrete", kind="EulerAncestralDiscreteScheduler"),
    "heun": _Solver(module="heun_discrete", kind="HeunDiscreteScheduler", settings=_PLAIN),
    "dpm++2m": _dpm_multistep(**_MULTISTEP, **_PLAIN),
    "dpm++2m-karras": _dpm_multistep(**_MULTISTEP, **_KARRAS),
    "dpm++2m-sde": _dpm_multistep(**_MULTISTEP_SDE, **_PLAIN),
    "dpm++2m-sde-karras": _dpm_multistep(**_MULTISTEP_SDE, **_KARRAS),
    "dpm++sde": _dpm_single_step(**_SINGLE_STEP_SDE, **_PLAIN),
    "dpm++sde-karras": _dpm_single_step(**_SINGLE_STEP_SDE, **_KARRAS),
    "ddim": _Solver(module="ddim", kind="DDIMScheduler"),
    "ddpm": _Solver(module="ddpm", kind="DDPMScheduler"),
    "pndm": _Solver(module="pndm", kind="PNDMScheduler", settings={"skip_prk_steps": True}),
    "deis": _Solver(module="deis_multistep", kind="DEISMultistepScheduler", settings=_PLAIN),
    "lms": _Solver(module="lms_discrete", kind="LMSDiscreteScheduler", settings=_PLAIN, from_picture=False),
    "lms-karras": _Solver(module="lms_discrete", kind="LMSDiscreteScheduler", settings=_KARRAS, from_picture=False),
    "unipc": _Solver(module="unipc_multistep", kind="UniPCMultistepScheduler", settings=_PLAIN),
    "lcm": _Solver(module="lcm", kind="LCMScheduler"),
}

NAMES = tuple(_SOLVERS)
FROM_NOISE_ALONE = tuple(name for name, solver in _SOLVERS.items() if not solver.from_picture)
"""Those whose last steps weigh outputs of the first ones, also where diffusers did not take these."""


def check_name(name: str) -> None:
    """Refuse a name that is not known. Raises RequestError."""
    if name not in _SOLVERS:
        raise RequestError("scheduler", name, "a scheduler that is known", f"one of: {', '.join(NAMES)}")


def name_of(config: Mapping[str, Any]) -> str:
    """The name of the scheduler that a model's `scheduler_config.json` describes, "" where it is none of these."""
    for name, solver in _SOLVERS.items():
        alike = all(config.get(field, value) == value for field, value in solver.settings.items())
        if solver.kind == config.get("_class_name") and alike:
            return name
    return ""


def settings_of(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler of that name is made with: of the model's configuration as much as its class knows.

    Mirrors `from_config` of diffusers. Raises RequestError where the class lacks the last step from pure noise that
    the model was trained with.
    """
    known = _known(name)
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        able = ", ".join(each for each in NAMES if "rescale_betas_zero_snr" in _known(each))
        raise RequestError("scheduler", name, "one that begins from pure noise, as this model does", f"one of: {able}")
    return {key: value for key, value in {**config, **_SOLVERS[name].settings}.items() if key in known}


def _known(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_SOLVERS[name].load().__init__).parameters


def make_noise_scheduler(
    name: str, config: Mapping[str, Any], *, steps: int, strength: float = 1.0, start: float = 0.0
) -> tuple[NoiseScheduler, Tensor]:
    """A scheduler set to a number of steps, and the timestep `[N]` of every evaluation of the network, on the CPU.

    N is `steps` for most, see the list above; from a picture, the last `strength` of the steps are taken, rounded down;
    from where another network stopped, those of which `before` says that they do not lie before the share `start`.
    `config` are the values of a model's `scheduler_config.json`.

    Mirrors `retrieve_timesteps` and `get_timesteps` of diffusers' Stable Diffusion XL pipelines.
    Raises RequestError for an unknown name, more steps than the schedule has, a strength or start that leaves no step,
    and a beginning other than from noise where the scheduler has none.
    """
    check_name(name)
    settings = settings_of(name, config)
    most = settings.get("original_inference_steps", _LCM_STEPS) if name == "lcm" else config["num_train_timesteps"] - 1
    if steps > most:
        raise RequestError("steps", steps, f"at most {most} for the scheduler {name}", f"nearest: {most}")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of how some of them ask numpy
        scheduler: Any = _SOLVERS[name].load()(**settings)
        scheduler.set_timesteps(steps, device=CPU)
    skipped = (steps - min(int(steps * strength), steps)) * scheduler.order
    if start:
        skipped = before(start, scheduler, scheduler.timesteps, config["num_train_timesteps"])
    if skipped and name in FROM_NOISE_ALONE:
        able = ", ".join(each for each in NAMES if each not in FROM_NOISE_ALONE)
        raise RequestError("scheduler", name, "one that can begin part of the way", f"one of: {able}")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    timesteps_N = scheduler.timesteps[skipped:]
    if start and not len(timesteps_N):
        raise RequestError("start", start, f"low enough to leave one of {steps} steps", "lower it")
    if skipped >= steps * scheduler.order or not len(timesteps_N):
        raise RequestError("init_strength", strength, f"enough to leave one of {steps} steps", "raise it")
    return scheduler, timesteps_N


def before(start: float, scheduler: NoiseScheduler, timesteps_N: Tensor, count: int) -> int:
    """How many of these evaluations are of steps that begin before a share of the `count` timesteps of training.

    Mirrors `denoising_end` and `denoising_start` of diffusers, but that a step of two evaluations is never divided.
    """
    noisier = int((timesteps_N >= round(count - start * count)).sum())
    return min(-(-noisier // scheduler.order) * scheduler.order, len(timesteps_N))


def step(
    scheduler: NoiseScheduler, output: Tensor, timestep: Tensor, latent: Tensor, generator: torch.Generator
) -> Tensor:
    """The latent after one step along the network's output; noise, where any is needed, is the generator's."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if takes else {}
    return scheduler.step(output, timestep, latent, **noise, return_dict=False)[0].to(latent.dtype)


def noise_to_signal(scheduler: NoiseScheduler, timestep: Tensor, index: int) -> float:
    """Sigma over alpha at the evaluation of that timestep, `index` of the whole schedule: how much noise there is."""
    sigmas: Tensor | None = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        return float(sigmas[index])
    signal = float(scheduler.alphas_cumprod[int(timestep)])
    return math.sqrt((1 - signal) / signal) if signal else math.inf


def estimated_clean(seen: Tensor, output: Tensor, ratio: float, prediction: str) -> Tensor:
    """The clean latent that a network's `output` for the input `seen` speaks of; `ratio` is sigma over alpha.

    `seen` is alpha * clean + sigma * noise with alpha² + sigma² = 1. `prediction` is "epsilon" (the noise) or
    "v_prediction" (arXiv:2202.00512, appendix D).
    """
    alpha = 1 / math.sqrt(1 + ratio**2)
    sigma = math.sqrt(max(0.0, 1 - alpha**2))
    return alpha * seen - sigma * output if prediction == "v_prediction" else (seen - sigma * output) / max(alpha, 1e-4)
