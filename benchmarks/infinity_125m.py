"""A 125M Infinity with random weights at 0.06 megapixels, by scale, against the floor of its operations and bytes.

    python -m benchmarks.infinity_125m [--dtype float32 bfloat16] [--repeats 5]

Guidance 3, 24 text tokens, one picture, 32 bits; then its decoder. The ceilings (a large matmul, a large read) are
measured in the same run. Rival: the published code took 1.7 s for the scales and 2.2 s to decode in float32 on two
such cores.
"""

from __future__ import annotations

import time

import torch

from benchmarks.measuring import Claims, arguments, matmul_ceiling, memory_ceiling, seconds
from gesso.devices import CPU
from gesso.models.infinity.autoencoder import Autoencoder
from gesso.models.infinity.cost import decode_flops
from gesso.models.infinity.initialization import initialize
from gesso.models.infinity.scales import PIXELS_PER_CELL, ScaleSchedule, schedule
from gesso.models.infinity.sizes import tokenizer_size, transformer_size
from gesso.models.infinity.transformer import InfinityTransformer
from gesso.pipelines.infinity import InfinityPipeline
from gesso.pipelines.infinity_state import GenerationDefaults
from gesso.request import GenerationRequest

RIVAL_SCALES, RIVAL_DECODE = 1.7, 2.2
TEXT_TOKENS = 24


class RandomText:
    """Random features in place of Flan-T5's: the same for every prompt."""

    max_tokens = 512

    def count(self, prompt: str) -> int:
        return TEXT_TOKENS

    def unknown(self, prompt: str) -> list[str]:
        return []

    def features(self, prompts: object) -> list[torch.Tensor]:
        return [torch.randn(TEXT_TOKENS, 2048, generator=torch.Generator().manual_seed(0))]


def pipeline_of(size: str, dtype: torch.dtype, scales: ScaleSchedule, device: str = CPU) -> InfinityPipeline:
    """A pipeline with random weights, which are made on the device."""
    height, width = (PIXELS_PER_CELL * edge for edge in scales.final_grid)
    torch.manual_seed(0)
    with torch.device(device):
        transformer = InfinityTransformer(transformer_size(size)).eval().requires_grad_(False)
        initialize(transformer)
        autoencoder = Autoencoder(tokenizer_size(32)).eval().requires_grad_(False)
    return InfinityPipeline(
        transformer=transformer.cast_blocks(dtype),
        autoencoder=autoencoder.cast(dtype),
        text=RandomText(),
        schedules={(height, width): scales},
        defaults=GenerationDefaults(width=width, height=height),
        name=f"infinity-{size}",
        digest="",
        device=device,
        dtype=dtype,
    )


def measure(dtype: torch.dtype, repeats: int, claims: Claims) -> None:
    """Print one line a scale, one for all scales, one for the decoder."""
    scales = schedule("1.000", "0.06M")
    pipeline = pipeline_of("125M", dtype, scales)
    plan = pipeline.plan(GenerationRequest(prompt="a picture", seed=0, guidance=3.0))
    conditioning = pipeline.encode([plan])[0]
    flops_ceiling, bytes_ceiling = matmul_ceiling(dtype), memory_ceiling()
    times: list[list[float]] = [[] for _ in range(len(scales))]
    state = pipeline.begin(plan, conditioning, 0)
    costs = state.costs
    for _ in range(repeats + 1):
        state = pipeline.begin(plan, conditioning, 0)
        for scale in range(len(scales)):
            started = time.perf_counter()
            pipeline.step([state])
            times[scale].append(time.perf_counter() - started)
    medians = [sorted(measured[1:])[repeats // 2] for measured in times]
    name = str(dtype).removeprefix("torch.")
    for scale, (spent, cost) in enumerate(zip(medians, costs, strict=True)):
        floor = max(cost.flops / flops_ceiling, cost.bytes / bytes_ceiling)
        grid = "x".join(str(edge) for edge in scales.grids[scale])
        claims.report(
            f"125M {name}, scale {scale} ({grid}), seconds (floor: operations or bytes)", spent, floor, spent / floor
        )
    total, flops = sum(medians), sum(cost.flops for cost in costs)
    floor = sum(max(cost.flops / flops_ceiling, cost.bytes / bytes_ceiling) for cost in costs)
    claims.report(
        f"125M {name}, all scales, seconds (floor: operations or bytes)",
        total,
        floor,
        total / floor,
        gigaflop=flops / 1e9,
        matmul_ceiling_gigaflops=flops_ceiling / 1e9,
    )
    claims.report(
        f"125M {name}, all scales, seconds (rival: published code, float32)", total, RIVAL_SCALES, RIVAL_SCALES / total
    )
    decode = seconds(lambda: list(pipeline.decode([state])), repeats)
    latent = scales.latent_grids(patchify=False)[-1]
    floor = decode_flops(pipeline.autoencoder.config, latent) / flops_ceiling
    claims.report(f"125M {name}, decode, seconds (floor: operations)", decode, floor, decode / floor)
    claims.report(
        f"125M {name}, decode, seconds (rival: published code, float32)", decode, RIVAL_DECODE, RIVAL_DECODE / decode
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    claims = Claims("infinity-125m", given.save)
    for dtype in given.dtype:
        measure(getattr(torch, dtype), given.repeats, claims)
    claims.keep()


if __name__ == "__main__":
    main()
