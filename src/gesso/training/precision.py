"""What training computes in. Not here: what a model paints in (`engine/loading`).

A processor that has no bfloat16 multiplies such matrices hundreds of times slower than float32 ones.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch

from gesso.devices import CPU
from gesso.engine.device import has_fast_bfloat16

PRECISIONS: Final = ("auto", "bf16", "fp32")
"""As settings name them; "auto" is bf16 where the processor multiplies it in hardware, else fp32."""


def autocast(precision: str = "auto") -> AbstractContextManager[object]:
    """Large matmuls inside are in bfloat16, if `precision` (of `PRECISIONS`) says so; parameters stay float32."""
    half = precision == "bf16" or (precision == "auto" and has_fast_bfloat16())
    return torch.autocast(CPU, torch.bfloat16) if half else nullcontext()
