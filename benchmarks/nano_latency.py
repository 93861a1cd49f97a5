"""Milliseconds for a warm nano picture through the engine, alone and sixteen at a time.

    python -m benchmarks.nano_latency [--model infinity-nano] [--dtype bfloat16] [--revisions 0] [--repeats 9]

Held against what was promised: 60 ms alone, 15 ms each at batch 16; and against the operations' floor. Infinity revises
a picture as often as the model's own default says, unless told otherwise.
"""

from __future__ import annotations

import torch

from benchmarks.measuring import Claims, arguments, matmul_ceiling, seconds
from gesso.engine import Engine
from gesso.engine.loading import load_pipeline
from gesso.request import GenerationRequest

PROMPT = "a red star above a blue ring on a white background"
WANTED = {1: 60.0, 16: 15.0}


def measure(model: str, dtype: str, revisions: int | None, repeats: int, claims: Claims) -> None:
    """One line for each batch size."""
    asked = GenerationRequest(prompt=PROMPT, model=model, seed=0, revisions=revisions)
    each: dict[int, float] = {}
    with Engine(device="cpu", dtype=dtype) as engine:
        for count in WANTED:
            request = asked.model_copy(update={"num_images": count})
            each[count] = seconds(lambda request=request: engine.run(request), repeats, warm=2) / count
    # Only now: a second thread that multiplies has a pool of its own, and the two would share the cores.
    flops = load_pipeline(model, "cpu").plan(asked).cost.flops
    floor = 1000 * flops / matmul_ceiling(getattr(torch, dtype))
    for count, wanted in WANTED.items():
        how = dtype if revisions is None else f"{dtype}, revised {revisions} times"
        claim = f"warm {model} picture in {how}, batch {count}, ms each (wanted: at most)"
        claims.report(claim, 1000 * each[count], wanted, wanted / (1000 * each[count]), floor_ms=floor)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="infinity-nano")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--revisions", type=int)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    revised = "" if given.revisions is None else f"-{given.revisions}-revisions"
    claims = Claims(f"nano-latency-{given.model}-{given.dtype}{revised}", given.save)
    measure(given.model, given.dtype, given.revisions, given.repeats, claims)
    claims.keep()


if __name__ == "__main__":
    main()
