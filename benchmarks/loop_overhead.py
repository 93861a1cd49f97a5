"""What our loop costs: FLUX by the six verbs, and through the engine, against diffusers' own `FluxPipeline` call.

    python -m benchmarks.loop_overhead [--batches 1 4] [--steps 8] [--side 192] [--repeats 21] [--device cpu]

The same random weights, text features, seeds and batches on all sides, which take turns within one run, each time in
another order. Text encoders are left out: they would be the same calls. The pictures are compared as well. Wanted: at
most 1 % more than diffusers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline as TheirPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL.Image import Image
from torch import Tensor

from benchmarks.measuring import Claims, arguments
from gesso.engine import Engine
from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.flux_state import FluxDefaults
from gesso.request import GenerationRequest

WANTED = 1.01
TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH = 32, 64, 32
HEADS, HEAD_WIDTH, DOUBLE_BLOCKS, SINGLE_BLOCKS = 6, 64, 2, 4
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}

Paint = Callable[[], Sequence[Image]]


class FixedText:
    """The same random features for every prompt, in place of T5 and CLIP."""

    max_tokens = TEXT_TOKENS

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.features_1TE = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
        self.pooled_1P = torch.randn(1, POOLED_WIDTH, generator=generator)

    def count(self, prompt: str) -> int:
        return TEXT_TOKENS

    def unknown(self, prompt: str) -> list[str]:
        return []

    def cut(self, prompt: str) -> str:
        return ""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.features_1TE.expand(len(prompts), -1, -1), self.pooled_1P.expand(len(prompts), -1)


class Spent(NamedTuple):
    """Seconds of a call: by the clock, and of processors in this process."""

    wall: float
    processor: float


def pipeline_of(device: str, steps: int, side: int) -> FluxPipeline:
    """Ours, with random weights."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=(8, 28, 28),
        guidance_embeds=True,
    )
    values: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 16, 16),
        "latent_channels": 16,
        "norm_num_groups": 4,
        "shift_factor": 0.1159,
        "scaling_factor": 0.3611,
    }
    autoencoder = AutoencoderKL(**values)
    for network in (transformer, autoencoder):
        torch.nn.Module.to(network, device).eval().requires_grad_(False)
    return FluxPipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=FixedText(),
        scheduler=SCHEDULER,
        defaults=FluxDefaults(width=side, height=side, steps=steps),
        name="flux-random",
        digest="",
        device=device,
    )


def by_verbs(pipeline: FluxPipeline, request: GenerationRequest) -> list[Image]:
    """The plain loop: all pictures in one batch at every step."""
    plan = pipeline.plan(request)
    (conditioning,) = pipeline.encode([plan])
    states = [pipeline.begin(plan, conditioning, image) for image in range(request.num_images)]
    while states[0].remaining:
        pipeline.step(states)
    return [output.image for output in pipeline.decode(states)]


def by_diffusers(pipeline: FluxPipeline, device: str, request: GenerationRequest) -> Paint:
    """diffusers' own call over the same parts."""
    text = pipeline.text
    assert isinstance(text, FixedText) and request.seed is not None
    seed, nothing = request.seed, None
    theirs: Any = TheirPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=pipeline.autoencoder,
        text_encoder=nothing,  # pyright: ignore[reportArgumentType]
        tokenizer=nothing,  # pyright: ignore[reportArgumentType]
        text_encoder_2=nothing,  # pyright: ignore[reportArgumentType]
        tokenizer_2=nothing,  # pyright: ignore[reportArgumentType]
        transformer=pipeline.transformer,
    )
    theirs.set_progress_bar_config(disable=True)
    plan = pipeline.plan(request).request

    def paint() -> Sequence[Image]:
        return theirs(
            prompt_embeds=text.features_1TE.to(device).repeat(request.num_images, 1, 1),
            pooled_prompt_embeds=text.pooled_1P.to(device).repeat(request.num_images, 1),
            width=plan.width,
            height=plan.height,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
            generator=[torch.Generator().manual_seed(seed + index) for index in range(request.num_images)],
        ).images

    return paint


def in_turns(sides: dict[str, Paint], repeats: int) -> dict[str, list[Spent]]:
    """Seconds of every side in every round, after a round to warm up; the order rotates."""
    spent: dict[str, list[Spent]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, processor = time.perf_counter(), time.process_time()
            sides[name]()
            if turn:
                spent[name].append(Spent(time.perf_counter() - wall, time.process_time() - processor))
    return spent


def compare(pipeline: FluxPipeline, device: str, batch: int, repeats: int, claims: Claims) -> None:
    """Print one line for the verbs and one for the engine. A ratio is the median of those within a round."""
    request = GenerationRequest(prompt="a picture", seed=0, num_images=batch)
    with Engine(device=device, load=lambda name, place, dtype: pipeline, max_batch=batch) as engine:
        sides: dict[str, Paint] = {
            "diffusers": by_diffusers(pipeline, device, request),
            "the six verbs": lambda: by_verbs(pipeline, request),
            "the engine": lambda: [result.image for result in engine.run(request)],
        }
        pictures = {name: [picture.tobytes() for picture in paint()] for name, paint in sides.items()}
        spent = in_turns(sides, repeats)
    rival = spent["diffusers"]
    for name in ("the six verbs", "the engine"):
        ours = spent[name]
        walls = [one.wall / other.wall for one, other in zip(ours, rival, strict=True)]
        processors = [one.processor / other.processor for one, other in zip(ours, rival, strict=True)]
        claims.report(
            f"FLUX by {name}, batch {batch}, seconds (rival: diffusers' own call; wanted: ratio <= {WANTED})",
            statistics.median(one.wall for one in ours),
            statistics.median(other.wall for other in rival),
            statistics.median(walls),
            processor_ratio=statistics.median(processors),
            equal_pictures=pictures[name] == pictures["diffusers"],
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--side", type=int, default=192, help="pixels, a multiple of 16")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    claims = Claims("loop-overhead", given.save)
    pipeline = pipeline_of(given.device, given.steps, given.side)
    for batch in given.batches:
        compare(pipeline, given.device, batch, given.repeats, claims)
    claims.keep()


if __name__ == "__main__":
    main()
