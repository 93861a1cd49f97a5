"""The training loop: any task, one process. Resuming continues bit for bit.

All that is random in a step follows from the seed and the step's number, so a checkpoint holds parameters, optimizer,
average and the step, and no generator. Not here: what is learned (`autoencoder`, `infinity`), configurations
(`recipes/`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gesso.errors import FileError, RequestError, RunError
from gesso.files import ready_folder, written_aside
from gesso.training import checkpoint
from gesso.training.ema import ExponentialAverage
from gesso.training.precision import PRECISIONS, autocast
from gesso.training.schedules import warmup_cosine
from gesso.training.settings import check

Report = Callable[[int, int, Mapping[str, float]], None]

_KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
_RECIPE, _LOG = "recipe.json", "log.jsonl"
_EVERY = ("log_every", "evaluate_every", "checkpoint_every")
_MOST_STEPS, _MOST_SAMPLES = 10**9, 1 << 16


class Task(Protocol):
    """What is learned from what."""

    @property
    def network(self) -> nn.Module: ...

    def heavy_modules(self) -> list[nn.Module]:
        """The parts worth compiling, each called with one shape only."""
        ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this step's own batch, and further figures to log. Draws only from generators seeded by the step."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, with the network as it is."""
        ...

    def samples(self) -> Image.Image:
        """A sheet that shows what the network does."""
        ...

    def export(self, folder: Path, facts: Mapping[str, object]) -> None:
        """Write the network where the engine can load it."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """A task that makes something in the run's folder before its first step, and finds it there when resumed."""

    def prepare(self, folder: Path, report: Callable[[int], None]) -> None:
        """Make what is missing; `report` hears how much there is. Raises FileError, RunError."""
        ...


@runtime_checkable
class InRounds(Protocol):
    """A task whose steps use what was made at the first of every `round_steps` steps, by the network as it was then."""

    @property
    def round_steps(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of the loop itself. `precision` is what the loss is computed in (`precision.PRECISIONS`).

    `attention` names the scaled-dot-product kernels allowed, of `torch.nn.attention.SDPBackend`: on CPU the backward
    pass of "MATH" is several times faster than the flash one where keys are few.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    final_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.97)
    weight_decay: float = 0.005
    clip: float = 2.0
    average_decay: float = 0.999
    precision: str = "auto"
    compile: bool = False
    attention: tuple[str, ...] = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    seed: int = 0
    threads: int | None = None
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for name, most in (("steps", _MOST_STEPS), ("batch", _MOST_SAMPLES), *((name, _MOST_STEPS) for name in _EVERY)):
            check(name, getattr(self, name), 1 <= getattr(self, name) <= most, f"from 1 to {most}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and value > 0, "a number above 0")
        for name in ("warmup", "weight_decay"):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and value >= 0, "a number from 0")
        for name in ("final_rate", "average_decay"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")
        check("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        check("precision", self.precision, self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        check("seed", self.seed, 0 <= self.seed < 128, "from 0 to 127")  # beyond, seeds of scenes meet held-out ones
        check("threads", self.threads, self.threads is None or self.threads >= 1, "at least 1")
        known = bool(self.attention) and all(name in _KERNELS for name in self.attention)
        check("attention", self.attention, known, f"a list of {', '.join(_KERNELS)}")


class Trainer:
    """Runs a task in a folder: `log.jsonl`, `samples-….png`, `step-….pt`, and at the end `export/`."""

    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        folder: Path,
        *,
        recipe: Mapping[str, object],
        report: Report | None = None,
    ) -> None:
        if isinstance(task, InRounds) and settings.checkpoint_every % task.round_steps:
            allowed = f"a multiple of {task.round_steps}, from where it resumes bit for bit"
            raise RequestError("checkpoint_every", settings.checkpoint_every, allowed)
        self.task, self.settings, self.folder, self.recipe = task, settings, folder, dict(recipe)
        self.report = report or (lambda step, steps, figures: None)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.network = task.network
        self.optimizer = torch.optim.AdamW(parameter_groups(self.network, settings.weight_decay), betas=settings.betas)
        self.average = ExponentialAverage(self.network, settings.average_decay)
        # Without this the "MATH" kernel does its matmuls in float32 even under bf16 autocast.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        self.step = 0
        self._began = self._window_began = time.perf_counter()
        self._window_step = 0

    def run(self, *, resume: bool = False) -> dict[str, float]:
        """Train to the last step, export the average, and return the last evaluation.

        Raises FileError for a folder that holds another run, one that nobody asked to resume, or one that is trained in
        just now; RunError where the loss is no number any more, or the disk is full.
        """
        with checkpoint.alone(ready_folder(self.folder)):
            return self._run(resume)

    def _run(self, resume: bool) -> dict[str, float]:
        self._open(resume)
        settings, evaluation = self.settings, dict[str, float]()
        if self.step < settings.steps and isinstance(self.task, Prepares):
            self.task.prepare(self.folder, lambda made: self.report(self.step, settings.steps, {"prepared": made}))
        if settings.compile:
            for module in self.task.heavy_modules():
                module.compile()
        self._began = time.perf_counter()
        self._begin_window()
        while self.step < settings.steps:
            figures = self._train_step()
            self.step += 1
            logs, evaluates, saves = (
                self.step % every == 0 or self.step == settings.steps
                for every in (settings.log_every, settings.evaluate_every, settings.checkpoint_every)
            )
            if logs or saves:  # never save what cannot be mended by resuming
                self._check_finite(figures)
            if logs:
                self._log_window(figures)
            if evaluates:
                evaluation = self._evaluate()
            if saves:  # last, so that nothing of a saved step is missing from the log
                self._save()
            if logs or evaluates:
                self._begin_window()
        evaluation = evaluation or self._evaluate()  # a finished run, resumed
        with self.average.swapped_in():
            self.task.export(self.folder / "export", {"recipe": self.recipe, "evaluation": evaluation})
        return evaluation

    def _train_step(self) -> dict[str, Tensor]:
        settings = self.settings
        factor = warmup_cosine(self.step, steps=settings.steps, warmup=settings.warmup, final=settings.final_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self.network.train()
        torch.manual_seed(settings.seed * 1_000_003 + self.step)  # for layers that draw by themselves
        with autocast(settings.precision), sdpa_kernel([getattr(SDPBackend, name) for name in settings.attention]):
            loss, figures = self.task.loss(self.step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        return {"loss": loss.detach(), "gradient_norm": norm.detach(), **figures}

    def _check_finite(self, figures: Mapping[str, Tensor]) -> None:
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(value := float(figures[name])):
                words = name.replace("_", " ")
                raise RunError(f"{words} is {value} at step {self.step}; lower learning_rate and resume")

    def _begin_window(self) -> None:
        self._window_began, self._window_step = time.perf_counter(), self.step

    def _log_window(self, figures: Mapping[str, Tensor]) -> None:
        """A step's figures, and the seconds of a step since the last line."""
        now = time.perf_counter()
        each = (now - self._window_began) / (self.step - self._window_step)
        values = {name: round(float(value), 6) for name, value in figures.items()}
        self._log(values | {"seconds_per_step": round(each, 4), "seconds": round(now - self._began, 1)})

    def _evaluate(self) -> dict[str, float]:
        self.network.eval()
        # Held-out batches have other shapes: compiling for them would cost more than it saves.
        with torch.no_grad(), self.average.swapped_in(), torch.compiler.set_stance("force_eager"):
            figures = self.task.evaluate()
            with written_aside(self.folder / f"samples-{self.step:08d}.png") as path:
                self.task.samples().save(path)
        self._log({f"evaluation/{name}": round(value, 6) for name, value in figures.items()})
        return figures

    def _open(self, resume: bool) -> None:
        """Prepare the folder and, on resuming, take up the newest checkpoint."""
        found = checkpoint.newest(self.folder)
        if not resume and (found or (self.folder / _RECIPE).exists()):
            raise FileError(self.folder, "a run lies here already", "pass --resume to continue it, or name another")
        if found is not None:
            self._check_same_run()
            self._load(*found)
        self._cut_log()
        with written_aside(self.folder / _RECIPE) as path:
            path.write_text(json.dumps(self.recipe, indent=1) + "\n", encoding="utf-8")

    def _check_same_run(self) -> None:
        """A run goes on by the recipe, the seed and the model that it began with. Raises FileError."""
        try:
            begun = json.loads((self.folder / _RECIPE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return  # the checkpoint itself says whether it fits
        for name, theirs, ours in (
            ("recipe", begun.get("recipe"), self.recipe.get("recipe")),
            ("seed", _value_of(begun, "loop", "seed"), _value_of(self.recipe, "loop", "seed")),
            ("model", _value_of(begun, "settings", "model"), _value_of(self.recipe, "settings", "model")),
        ):
            if None not in (theirs, ours) and theirs != ours:
                raise FileError(self.folder, f"holds a run with {name} {theirs}, not {ours}", "name another folder")

    def _load(self, path: Path, state: dict[str, object]) -> None:
        try:
            self.network.load_state_dict(state["network"])  # type: ignore[arg-type]
            own = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
            for group, settings in zip(self.optimizer.param_groups, own, strict=True):
                group.update(settings)  # as this run's recipe has them, and not the checkpoint's
            self.average.load(state["average"])  # type: ignore[arg-type]
            self.step = int(state["step"])  # type: ignore[call-overload]
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise FileError(path, "the checkpoint is of another recipe", "name another folder") from error

    def _save(self) -> None:
        checkpoint.save(
            self.folder,
            self.step,
            {
                "step": self.step,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state(),
            },
        )

    def _log(self, figures: Mapping[str, float]) -> None:
        path = self.folder / _LOG
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **figures}) + "\n")
        except OSError as error:
            raise RunError(f"{path} could not be written: {error.strerror or error}; make room and resume") from error
        self.report(self.step, self.settings.steps, figures)

    def _cut_log(self) -> None:
        """Drop lines past the checkpoint's step, which will be made again (and a last line cut short)."""
        path = self.folder / _LOG
        lines = path.read_text(encoding="utf-8").splitlines() if self.step and path.exists() else []
        with written_aside(path) as aside:
            kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= self.step)
            aside.write_text(kept, encoding="utf-8")


def _value_of(recipe: Mapping[str, object], part: str, name: str) -> object:
    values = recipe.get(part)
    return values.get(name) if isinstance(values, Mapping) else None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for the matrices of layers only: not for vectors, embeddings, and learned tables and tokens.

    A checkpoint's optimizer goes by the order in these groups.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        is_matrix = name.endswith(".weight") and parameter.ndim >= 2 and "embedding" not in name
        (decayed if is_matrix else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
