"""Changing adapters, and pictures with different ones in one batch, against diffusers' loading in the same run.

    python -m benchmarks.adapters [--model flux-nano] [--rank 16] [--steps 8] [--repeats 7] [--short] [--save]

Adapters are LoRAs of every attention and feed-forward layer, random and weak, in files of their own. A *switch* is all
that a one-step picture takes longer in the engine when its adapter, in memory already, is another than that of the
picture before: looking after its file, attaching, and what its layers add. Wanted: at most 50 ms, and at most one step.
The *mixed batch* is eight pictures with eight adapters against the same eight without. Wanted: 0.6 of its speed.
diffusers loads and unloads the same files on the same network, and sets one of two that are loaded. Everything is
interleaved.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measuring import Claims, arguments
from gesso.adapters.formats.places import shapes_of
from gesso.engine import Engine
from gesso.engine.loading import load_pipeline
from gesso.request import GenerationRequest

TOGETHER = 8
LONGEST_SWITCH = 0.05  # seconds
LEAST_SPEED = 0.6
_ADAPTED = ("attn", "attention", "ff", "feed_forward", "mlp")


def write_adapters(folder: Path, network: torch.nn.Module, rank: int) -> list[str]:
    """Files of as many adapters as step together, in diffusers' names."""
    paths = []
    for number in range(TOGETHER):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, shape in shapes_of(network).items():
            if len(shape.weight) == 2 and any(word in name for word in _ADAPTED):
                for half, size in (("A", (rank, shape.weight[1])), ("B", (shape.weight[0], rank))):
                    made = torch.randn(size, generator=generator) * 0.02
                    tensors[f"transformer.{name}.lora_{half}.weight"] = made
        paths.append(str(folder / f"{number}.safetensors"))
        save_file(tensors, paths[-1])
    return paths


def measure(engine: Engine, pipeline: Any, paths: Sequence[str], options: Any, claims: Claims) -> None:
    """Every row."""
    name = f"{options.model}, rank {options.rank}"
    rival = _Rival(pipeline.transformer, paths)
    plain, same, other, loading, setting = _interleaved(
        options.repeats,
        lambda: _paint(engine, options, 1, [()]),
        lambda: _paint(engine, options, 1, [(paths[0],)]),
        lambda: _paint(engine, options, 1, [(paths[1],)]),
        rival.load_and_unload,
        rival.set_other,
    )
    switch = max(other - plain, same - plain, 1e-6)
    step = _step_seconds(engine, options)
    claims.report(
        f"{name}, seconds of a warm switch (wanted: at most)", switch, LONGEST_SWITCH, LONGEST_SWITCH / switch
    )
    claims.report(f"{name}, seconds of a warm switch against one step (wanted: at most)", switch, step, step / switch)
    claims.report(f"{name}, warm switch against diffusers' load and unload", switch, loading, loading / switch)
    claims.report(
        f"{name}, warm switch against diffusers' set_adapters of two loaded", switch, setting, setting / switch
    )
    alone, mixed = _interleaved(
        options.repeats,
        lambda: _paint(engine, options, options.steps, [()] * TOGETHER),
        lambda: _paint(engine, options, options.steps, [(path,) for path in paths]),
    )
    claims.report(
        f"{name}, {TOGETHER} pictures with {TOGETHER} adapters, speed against without (wanted: at least)",
        alone / mixed,
        LEAST_SPEED,
        alone / mixed / LEAST_SPEED,
        seconds_without=alone,
        seconds_with=mixed,
        **{key: value for key, value in engine.counters()["adapters"].items() if key in ("bytes", "hits", "misses")},
    )


def _paint(engine: Engine, options: Any, steps: int, loras: Sequence[tuple[str, ...]]) -> None:
    engine.run(
        [
            GenerationRequest(prompt="a red star", model=options.model, seed=index, steps=steps, lora=lora)  # pyright: ignore[reportArgumentType]
            for index, lora in enumerate(loras)
        ]
    )


def _step_seconds(engine: Engine, options: Any) -> float:
    """What a plain step of one picture takes."""
    (result,) = engine.run(GenerationRequest(prompt="a red star", model=options.model, seed=0, steps=options.steps))
    seconds: Any = result.metadata["seconds"]
    return float(seconds["step"]) / options.steps


def _interleaved(repeats: int, *actions: Callable[[], object]) -> list[float]:
    """Median seconds of each, taken in turns, after one turn to warm up."""
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(repeats + 1):
        for taken, action in zip(times, actions, strict=True):
            started = time.perf_counter()
            action()
            if turn:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


class _Rival:
    """diffusers' adapters on a copy of the network, in a pipeline that has nothing else."""

    def __init__(self, network: Any, paths: Sequence[str]) -> None:
        import copy

        from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

        parts: Any = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        self._changing = FluxPipeline(**parts, transformer=copy.deepcopy(network))
        self._setting = FluxPipeline(**parts, transformer=copy.deepcopy(network))
        self._paths, self._turn = paths, 0
        for number in range(2):
            self._setting.load_lora_weights(paths[number], adapter_name=f"a{number}")

    def load_and_unload(self) -> None:
        """Another file for the one before."""
        self._turn += 1
        self._changing.load_lora_weights(self._paths[self._turn % 2])
        self._changing.unload_lora_weights()

    def set_other(self) -> None:
        """The other of two that are loaded."""
        self._turn += 1
        self._setting.set_adapters(f"a{self._turn % 2}")


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="flux-nano")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="two repeats of two steps: to try it, not to measure")
    options = parser.parse_args()
    if options.short:
        options.repeats, options.steps = 2, 2
    claims = Claims("adapters", options.save)
    pipeline: Any = load_pipeline(options.model, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(Path(folder), pipeline.transformer, options.rank)
        with Engine(device="cpu", load=lambda name, device, dtype: pipeline, max_batch=TOGETHER) as engine:
            measure(engine, pipeline, paths, options, claims)
    claims.keep()


if __name__ == "__main__":
    main()
