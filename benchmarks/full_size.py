"""Published models at their full size on a GPU: our engine against diffusers' own call, with random weights.

    python -m benchmarks.full_size [--model z-image flux qwen-image sdxl infinity] [--compile] [--device cuda] [--save]
                                   [--steps N] [--side 1024] [--modes full offload 8bit offload+8bit]
    python -m benchmarks.full_size --short      # tiny networks of the same classes in float32 on the CPU: does it run?

Nothing is fetched. Both sides have the same weights, text features and seed, take turns within one run after a round
to warm up, and their pictures are compared; text encoders are left out, which would be the same calls. A line has the
median seconds of a picture and, on a GPU, the most that PyTorch's allocator held on each side. `--compile` compiles the
repeated blocks of both sides' networks; without it all is eager. FLUX is then painted in memory modes, with its text
encoders: the peak that was measured beside the one foreseen. Infinity-2B has no rival here: milliseconds by scale
against the floor of its operations and bytes, whose ceilings are measured in the same run.

In 16 bits Z-Image's pictures differ a little, since S3-DiT is ours; all others should be equal. One model is there at a
time. By the bytes of their weights Qwen-Image wants 45 GB of GPU memory, FLUX's memory modes 40 GB and as much of the
host; none of it has been measured.
Not here: the networks (`full_size_networks`), the engine's overhead alone (`loop_overhead`).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from benchmarks import infinity_125m
from benchmarks.full_size_networks import REQUEST, Setting, Sides, flux, flux_to_place, qwen_image, sdxl, z_image
from benchmarks.loop_overhead import Paint, by_verbs, in_turns
from benchmarks.measuring import Claims, arguments, seconds
from benchmarks.memory_modes import peak_of, start_counting
from gesso.devices import CPU, CUDA, kind_of
from gesso.engine import Engine
from gesso.engine.acceleration import Acceleration
from gesso.engine.device import settle
from gesso.engine.loading.accelerate import accelerate
from gesso.engine.loading.build import Build
from gesso.engine.memory import peaks
from gesso.memory_modes import parse_mode
from gesso.models.infinity.cost import decode_flops
from gesso.models.infinity.scales import schedule
from gesso.pipelines.infinity import InfinityPipeline
from tests import tiny_infinity

GIB = 2**30
INFINITY = "infinity"
INFINITY_REPEATS = 5
PLACED_STEPS = 4  # in memory modes: the peak does not grow with steps
SHORT_STEPS, SHORT_SIDE = 2, 64


@dataclass(frozen=True)
class Model:
    """How a model is painted: in so many steps, in this dtype, so many times on each side beside the first."""

    title: str
    make: Callable[[Setting], Sides]
    steps: int
    dtype: torch.dtype
    repeats: int


MODELS = {
    "z-image": Model("Z-Image-Turbo", z_image, 8, torch.bfloat16, 5),
    "flux": Model("FLUX.1-dev", flux, 28, torch.bfloat16, 3),
    "qwen-image": Model("Qwen-Image", qwen_image, 50, torch.bfloat16, 2),  # its pictures take longest by far
    "sdxl": Model("SDXL", sdxl, 30, torch.float16, 3),
}


class Side:
    """One side's call, the pictures it painted last, and the most GPU memory that it ever held."""

    def __init__(self, paint: Paint, device: str) -> None:
        self._paint, self._device = paint, device
        self.pictures: Sequence[Image] = ()
        self.peak = 0

    def __call__(self) -> Sequence[Image]:
        on_gpu = kind_of(self._device) == CUDA
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        self.pictures = self._paint()
        if on_gpu:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self._device))
        return self.pictures


def measure(model: Model, setting: Setting, *, compiled: bool, claims: Claims) -> None:
    """One line: seconds a picture of ours and of diffusers', the median of their ratios within a round."""
    pipeline, network, their_network, their_paint = model.make(setting)
    accelerate(pipeline, Acceleration(compile=compiled))
    if compiled and their_network is not network:
        their_network.compile_repeated_blocks()
    with Engine(device=setting.device, load=lambda name, place, dtype: pipeline, max_batch=1) as engine:
        sides = {
            "diffusers": Side(their_paint, setting.device),
            "ours": Side(lambda: [result.image for result in engine.run(REQUEST)], setting.device),
        }
        spent = in_turns(dict(sides), model.repeats)
    if compiled:
        torch.compiler.reset()  # else what was compiled may keep the networks
    ours, rival = ([one.wall for one in spent[name]] for name in ("ours", "diffusers"))
    pictures = [np.asarray(sides[name].pictures[0], dtype=np.int16) for name in ("ours", "diffusers")]
    apart = int(np.abs(pictures[0] - pictures[1]).max())
    held: dict[str, object] = {}
    if kind_of(setting.device) == CUDA:
        held = {"peak_gib": sides["ours"].peak / GIB, "rival_peak_gib": sides["diffusers"].peak / GIB}
    claims.report(
        f"{_what(model, setting)}, {'compiled' if compiled else 'eager'}, seconds a picture "
        "(rival: diffusers' own call)",
        statistics.median(ours),
        statistics.median(rival),
        statistics.median(one / other for one, other in zip(ours, rival, strict=True)),
        equal_pictures=apart == 0,
        largest_difference=apart,
        blank=bool(pictures[0].std() == 0),  # as a picture of NaN would be
        billions_of_parameters=sum(parameter.numel() for parameter in network.parameters()) / 1e9,
        **held,
    )


def measure_mode(mode: str, setting: Setting, claims: Claims) -> None:
    """One line: the peak of FLUX in a memory mode, from before its parts are placed, against the one foreseen."""
    made, parts = flux_to_place(setting)
    pipeline: Any = made
    free()
    before = start_counting(setting.device)
    build = Build(device=setting.device, dtype=setting.dtype, memory=parse_mode(mode), shared=False)
    build.place(parts)
    pipeline.build = build  # by which the engine knows what a model weighs, as after loading
    started = time.perf_counter()
    by_verbs(pipeline, REQUEST)
    spent = time.perf_counter() - started
    held = peak_of(setting.device) - before
    foreseen = peaks(pipeline, pipeline.plan(REQUEST), mode)[parse_mode(mode)]
    claims.report(
        f"{_what(MODELS['flux'], setting)}, {mode}: peak GiB measured, against foreseen",
        held / GIB,
        foreseen / GIB,
        held / foreseen,
        seconds=spent,
    )


def measure_infinity(setting: Setting, claims: Claims) -> None:
    """One line a scale, one for all scales and one for the decoder."""
    if setting.short:
        pipeline, title = tiny_infinity.tiny_pipeline(), "tiny Infinity"
    else:
        scales = schedule("1.000", "1M")
        pipeline = infinity_125m.pipeline_of("2B", setting.dtype, scales, setting.device)
        title = "Infinity-2B, 1M pixels"
    title = f"{title}, {_name(setting.dtype)}, eager"
    operations, moved = ceilings(setting)
    found = by_scale(pipeline, setting.device, operations, moved)
    for name, spent, floor in (*found, ("all scales", sum(one for _, one, _ in found), sum(one for *_, one in found))):
        claim = f"{title}, {name}, milliseconds (floor: operations or bytes)"
        claims.report(claim, spent * 1e3, floor * 1e3, spent / floor)
    # What is decoded does not change how long it takes.
    plan = pipeline.plan(REQUEST)
    state = pipeline.begin(plan, pipeline.encode([plan])[0], 0)
    spent = seconds(lambda: list(pipeline.decode([state])), INFINITY_REPEATS)
    grid = state.schedule.latent_grids(patchify=False)[-1]
    floor = decode_flops(pipeline.autoencoder.config, grid) / operations
    claims.report(f"{title}, decoding, milliseconds (floor: operations)", spent * 1e3, floor * 1e3, spent / floor)


def by_scale(
    pipeline: InfinityPipeline, device: str, operations: float, moved: float
) -> list[tuple[str, float, float]]:
    """Of each scale its name, its median seconds, and the least by the operations and bytes a second there are."""
    plan = pipeline.plan(REQUEST)
    (conditioning,) = pipeline.encode([plan])
    state = pipeline.begin(plan, conditioning, 0)
    costs, grids = state.costs, state.schedule.grids
    times: list[list[float]] = [[] for _ in grids]
    for _ in range(INFINITY_REPEATS + 1):
        state = pipeline.begin(plan, conditioning, 0)
        for spent in times:
            settle(device)
            started = time.perf_counter()
            pipeline.step([state])
            settle(device)
            spent.append(time.perf_counter() - started)
    return [
        (
            f"scale {scale} ({height}x{width})",
            statistics.median(times[scale][1:]),  # the first is to warm up
            max(costs[scale].flops / operations, costs[scale].bytes / moved),
        )
        for scale, (height, width) in enumerate(grids)
    ]


def ceilings(setting: Setting) -> tuple[float, float]:
    """Operations and bytes a second at best: of a large square matmul, and of reading a large block."""
    size, count = (512, 2**24) if setting.short else (8192, 2**30)

    def settled(action: Callable[[], object]) -> float:
        return seconds(lambda: (action(), settle(setting.device)), repeats=5, warm=2)

    with torch.device(setting.device):
        matrix, block = torch.randn(size, size).to(setting.dtype), torch.ones(count)
    return 2 * size**3 / settled(lambda: matrix @ matrix), block.nbytes / settled(block.sum)


def free() -> None:
    """Give the memory of the last model back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _what(model: Model, setting: Setting) -> str:
    title = f"tiny {model.title}" if setting.short else model.title
    return f"{title}, {setting.steps} steps, {setting.side}x{setting.side}, {_name(setting.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = arguments(__doc__)
    names = [*MODELS, INFINITY]
    parser.add_argument("--model", nargs="+", choices=names, default=names)
    parser.add_argument("--modes", nargs="*", default=["full", "offload", "8bit", "offload+8bit"], help="of FLUX")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks, on both sides")
    parser.add_argument("--steps", type=int, help="else as published")
    parser.add_argument("--side", type=int, help="pixels, a multiple of 16; else 1024. Not of Infinity")
    parser.add_argument("--device", help=f"else {CUDA}, or with --short {CPU}")
    parser.add_argument("--short", action="store_true", help="tiny networks, a few steps, float32")
    given = parser.parse_args()
    device = given.device or (CPU if given.short else CUDA)
    if kind_of(device) == CUDA and not torch.cuda.is_available():
        parser.exit(2, f"full_size: there is no GPU here for --device {device}; --short needs none\n")
    claims = Claims("full-size-short" if given.short else "full-size", given.save)
    side = given.side or (SHORT_SIDE if given.short else 1024)
    for name in given.model:
        free()
        chosen = MODELS.get(name)
        steps = given.steps or (SHORT_STEPS if given.short else chosen.steps if chosen else 1)
        dtype = torch.float32 if given.short else chosen.dtype if chosen else torch.bfloat16
        setting = Setting(device=device, dtype=dtype, side=side, steps=steps, short=given.short)
        if chosen is None:
            measure_infinity(setting, claims)
            continue
        measure(chosen, setting, compiled=given.compile, claims=claims)
        for mode in given.modes if name == "flux" else ():
            free()
            measure_mode(mode, replace(setting, steps=min(steps, PLACED_STEPS)), claims)
    claims.keep()


if __name__ == "__main__":
    main()
