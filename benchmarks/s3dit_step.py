"""One evaluation of S3-DiT against diffusers' `ZImageTransformer2DModel`: same weights, same inputs, same run.

    python -m benchmarks.s3dit_step [--dim 512] [--layers 6] [--side 512] [--dtype float32] [--repeats 15]

Random weights; captions of 60 tokens. Alone, in a batch of equals, and in a batch of unequal sizes and captions, which
diffusers pads to the longest. What is made once a picture is not counted for ours: diffusers makes it anew every step.
Wanted: 1.15 times as fast alone, 1.5 times on the unequal batch. The two take turns, so that a busy machine is as
unkind to one as to the other. `--dim 3840 --layers 30 --side 1024 --dtype bfloat16 --device cuda` is the full size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor

from benchmarks.measuring import Claims, arguments
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.cost import evaluation_flops
from gesso.models.s3dit.packing import ContextShape
from gesso.models.s3dit.transformer import Prompt, S3DiT, size_of

WANTED = {"one picture": 1.15, "two equal pictures": 1.15, "four unequal pictures": 1.5}
HEAD, TEXT_WIDTH, CELLS_A_PIXEL = 64, 256, 1 / 8


@dataclass(frozen=True)
class Batch:
    """Latents, captions and a time for each."""

    latents: list[Tensor]
    captions: list[Tensor]
    times: Tensor


def networks(dim: int, layers: int, dtype: torch.dtype, device: str) -> tuple[S3DiT, ZImageTransformer2DModel]:
    """Ours and diffusers', which share their weights."""
    head = 128 if dim % 128 == 0 and dim >= 1280 else HEAD
    heads = dim // head
    axes = (head // 4, 3 * head // 8, 3 * head // 8)
    config = S3DiTConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads, axes_dims=axes, cap_feat_dim=TEXT_WIDTH
    )
    with torch.device("meta"):
        ours, theirs = S3DiT(config), ZImageTransformer2DModel(**asdict(config))
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, value in ours.state_dict().items():
        drawn = torch.randn(value.shape, device=device)
        scale = value[0].numel() ** -0.5 if value.ndim >= 2 else 0.1
        state[name] = (drawn * scale + (value.ndim == 1 and name.endswith("weight"))).to(dtype)
    ours.load_state_dict(state, assign=True)
    theirs.load_state_dict(state, assign=True)
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)


def batch_of(edges: list[tuple[int, int]], captions: list[int], dtype: torch.dtype, device: str) -> Batch:
    """Pictures of these sizes in pixels, with captions of so many tokens."""
    latents = [
        torch.randn(16, 1, int(height * CELLS_A_PIXEL), int(width * CELLS_A_PIXEL), device=device).to(dtype)
        for width, height in edges
    ]
    features = [torch.randn(count, TEXT_WIDTH, device=device).to(dtype) for count in captions]
    return Batch(latents, features, torch.linspace(0.3, 0.7, len(edges), device=device))


def by_turns(actions: list[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Median seconds of each action; they take turns after one turn to warm up."""
    times: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats + 1):
        for action, spent in zip(actions, times, strict=True):
            started = time.perf_counter()
            action()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:
                spent.append(time.perf_counter() - started)
    return [statistics.median(spent) for spent in times]


@torch.inference_mode()
def measure(
    name: str, batch: Batch, both: tuple[S3DiT, ZImageTransformer2DModel], repeats: int, claims: Claims
) -> None:
    """One line: seconds of ours, of theirs, their ratio, and how far the outputs are apart."""
    ours, theirs = both
    contexts = ours.read([Prompt([caption]) for caption in batch.captions])
    sizes = [size_of(latent) for latent in batch.latents]
    company = ours.join(sizes, contexts)

    def our_step() -> list[Tensor]:
        return ours(batch.latents, batch.times, company)

    def their_step() -> list[Tensor]:
        return theirs(batch.latents, batch.times, batch.captions, return_dict=False)[0]

    pairs = zip(our_step(), their_step(), strict=True)
    apart = max(float((one.float() - other.float()).abs().max()) for one, other in pairs)
    mine, rival = by_turns([our_step, their_step], repeats, batch.times.device.type)
    shapes = [ContextShape(captions=(len(caption),)) for caption in batch.captions]
    flops = sum(evaluation_flops(ours.config, size, [shape]) for size, shape in zip(sizes, shapes, strict=True))
    claims.report(
        f"S3-DiT step, {name}, seconds (rival: diffusers; wanted: {WANTED[name]}x)",
        mine,
        rival,
        rival / mine,
        gigaflops=flops / mine / 1e9,
        largest_difference=apart,
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--side", type=int, default=512, help="pixels of the largest picture's edge")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    claims = Claims("s3dit-step", given.save)
    dtype, device, side = getattr(torch, given.dtype), given.device, given.side
    both = networks(given.dim, given.layers, dtype, device)
    half = side // 2
    unequal = [(side, side), (half, side), (half, half), (half, half)]
    for name, edges, captions in (
        ("one picture", [(side, side)], [60]),
        ("two equal pictures", [(side, side)] * 2, [60, 60]),
        ("four unequal pictures", unequal, [60, 100, 20, 31]),
    ):
        measure(name, batch_of(edges, captions, dtype, device), both, given.repeats, claims)
    claims.keep()


if __name__ == "__main__":
    main()
