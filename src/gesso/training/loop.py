"""The training loop: any task, one process. Resuming continues bit for bit.

All that is random in a step follows from the seed and the step's number, so a checkpoint holds parameters, optimizer,
average and the step, and no generator. Not here: what is learned (`autoencoder`, `infinity`), configurations (`recipes/`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gesso.errors import FileError, RequestError, RunError
from gesso.training import checkpoint
from gesso.training.ema import ExponentialAverage
from gesso.training.schedules import warmup_cosine

Report = Callable[[int, int, Mapping[str, float]], None]


class Task(Protocol):
    """What is learned from what."""

    network: nn.Module

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


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of the loop itself. `precision` "bf16" computes the loss under autocast; parameters stay float32.

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
    precision: str = "bf16"
    compile: bool = False
    attention: tuple[str, ...] = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    seed: int = 0
    threads: int | None = None
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise RequestError(name, getattr(self, name), "at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise RequestError("learning_rate", self.learning_rate, "a number above 0")
        if self.precision not in ("bf16", "fp32"):
            raise RequestError("precision", self.precision, "bf16 or fp32")


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
        self.task, self.settings, self.folder, self.recipe = task, settings, folder, dict(recipe)
        self.report = report or (lambda step, steps, figures: None)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.network = task.network
        self.optimizer = torch.optim.AdamW(parameter_groups(self.network, settings.weight_decay), betas=settings.betas)
        self.average = ExponentialAverage(self.network, settings.average_decay)
        # Without this the "MATH" kernel does its matmuls in float32 even under bf16 autocast.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        if settings.compile:
            for module in task.heavy_modules():
                module.compile()
        self.step = 0

    def run(self, *, resume: bool = False) -> dict[str, float]:
        """Train to the last step, export the average, and return the last evaluation."""
        self._open(resume)
        figures: dict[str, float] = {}
        settings, began, window = self.settings, time.perf_counter(), time.perf_counter()
        while self.step < settings.steps:
            logged = self._train_step()
            self.step += 1
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                now = time.perf_counter()
                values = {name: round(float(value), 6) for name, value in logged.items()}
                if not math.isfinite(values["loss"]):
                    raise RunError(f"loss is {values['loss']} at step {self.step}; lower learning_rate and resume")
                values |= {"seconds_per_step": round((now - window) / settings.log_every, 4)}
                self._log(values | {"seconds": round(now - began, 1)})
                window = now
            if self.step % settings.checkpoint_every == 0 or self.step == settings.steps:
                self._save()
            if self.step % settings.evaluate_every == 0 or self.step == settings.steps:
                figures = self._evaluate()
                window = time.perf_counter()
        with self.average.swapped_in():
            self.task.export(self.folder / "export", {"recipe": self.recipe, "evaluation": figures})
        return figures

    def _train_step(self) -> dict[str, Tensor]:
        settings = self.settings
        factor = warmup_cosine(self.step, steps=settings.steps, warmup=settings.warmup, final=settings.final_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self.network.train()
        torch.manual_seed(settings.seed * 1_000_003 + self.step)  # for layers that draw by themselves
        context = torch.autocast("cpu", torch.bfloat16) if settings.precision == "bf16" else nullcontext()
        with context, sdpa_kernel([getattr(SDPBackend, name) for name in settings.attention]):
            loss, figures = self.task.loss(self.step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        return {"loss": loss.detach(), "gradient_norm": norm.detach(), **figures}

    def _evaluate(self) -> dict[str, float]:
        self.network.eval()
        # Held-out batches have other shapes: compiling for them would cost more than it saves.
        with torch.no_grad(), self.average.swapped_in(), torch.compiler.set_stance("force_eager"):
            figures = self.task.evaluate()
            self.task.samples().save(self.folder / f"samples-{self.step:08d}.png")
        self._log({f"evaluation/{name}": round(value, 6) for name, value in figures.items()})
        return figures

    def _open(self, resume: bool) -> None:
        """Prepare the folder and, on resuming, take up the newest checkpoint."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(self.folder, "the folder cannot be made", str(error.strerror or error)) from error
        found = checkpoint.newest(self.folder)
        if found is None:
            (self.folder / "recipe.json").write_text(json.dumps(self.recipe, indent=1) + "\n")
            (self.folder / "log.jsonl").write_text("")
            return
        if not resume:
            raise FileError(self.folder, "a run lies here already", "pass --resume to continue it, or name another")
        self._load(*found)
        self._cut_log()

    def _load(self, path: Path, state: dict[str, object]) -> None:
        try:
            self.network.load_state_dict(state["network"])  # type: ignore[arg-type]
            self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
            self.average.load(state["average"])  # type: ignore[arg-type]
            self.step = int(state["step"])  # type: ignore[call-overload]
        except (RuntimeError, KeyError, ValueError) as error:
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
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, **figures}) + "\n")
        self.report(self.step, self.settings.steps, figures)

    def _cut_log(self) -> None:
        """Drop lines past the checkpoint's step, which will be made again (and a last line cut short)."""
        path = self.folder / "log.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= self.step] if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices only: not for vectors, biases, embeddings, modulation tables and learned tokens."""
    free = ("bias", "norm", "embedding", "modulation", "null_text", "start", "log_scale", "query")
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        spared = parameter.ndim < 2 or any(word in name and f"{word}.weight" not in name for word in free)
        (others if spared or "embedding" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
