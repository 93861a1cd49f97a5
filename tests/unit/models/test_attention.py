"""Kernels of attention against each other, with masks and without; what needs a GPU is replaced by plain sums."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gesso.models.attention import Kernel, dispatched, flex, sdpa, sdpa_math

LENGTHS = (7, 3)


def drawn(rows: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, 3, length, 8, generator=generator) for length in (queries, keys, keys))  # type: ignore[return-value]


@pytest.fixture
def mask() -> Tensor:
    """Of keys, as prompts of unequal lengths have it, `[B,1,1,m]`."""
    return (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None])[:, None, None]


@pytest.mark.parametrize("kernel", [sdpa_math, dispatched("native", "native")], ids=["math", "diffusers"])
def test_they_compute_the_same(kernel: Kernel, mask: Tensor) -> None:
    for queries in (1, 5):
        parts = drawn(2, queries, 7)
        torch.testing.assert_close(kernel(*parts), sdpa(*parts), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            kernel(*parts, mask=mask, scale=1.0), sdpa(*parts, mask=mask, scale=1.0), atol=1e-6, rtol=0
        )


def by_lengths(**given: Any) -> Tensor:
    """What flash-attn's function for packed samples computes, sample by sample."""
    ends_q, ends_k = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"].tolist()
    parts: list[Tensor] = []
    for sample in range(len(ends_q) - 1):
        rows = {
            "q": given["q"][ends_q[sample] : ends_q[sample + 1]],
            "k": given["k"][ends_k[sample] : ends_k[sample + 1]],
            "v": given["v"][ends_k[sample] : ends_k[sample + 1]],
        }
        q, k, v = (rows[name].transpose(0, 1)[None] for name in "qkv")
        parts.append(sdpa(q, k, v, scale=given["softmax_scale"])[0].transpose(0, 1))
    return torch.cat(parts)


def test_kernels_that_know_no_masks_leave_out_what_is_masked(mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one for packed samples is called where there is a mask, and given no key that is masked."""
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(attention_dispatch, "flash_attn_varlen_func", by_lengths)
    parts = drawn(2, 5, 7)
    found = dispatched("flash", "flash_varlen")(*parts, mask=mask, scale=1.0)
    torch.testing.assert_close(found, sdpa(*parts, mask=mask, scale=1.0), atol=1e-6, rtol=0)


class Layer(nn.Module):
    """Attention right after a linear, whose output is what is looked at in views."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(24, 24), nn.Linear(24, 48)

    def forward(self, x_BnC: Tensor, source_BmC: Tensor, mask: Tensor | None, kernel: Kernel) -> Tensor:
        q = self.q(x_BnC).unflatten(-1, (3, -1)).transpose(1, 2)
        k, v = self.kv(source_BmC).unflatten(-1, (2, 3, -1)).permute(2, 0, 3, 1, 4)
        return kernel(q, k, v, mask=mask)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what PyTorch compiles with
def test_flex_computes_the_same_where_it_is_compiled(mask: Tensor) -> None:
    torch.manual_seed(0)
    layer = Layer().requires_grad_(False)
    compiled = copy.deepcopy(layer)
    compiled.compile(recompile_limit=32)
    for queries, seen in ((5, None), (5, mask), (1, mask), (9, mask)):
        parts = torch.randn(2, queries, 24), torch.randn(2, max(LENGTHS), 24), seen
        torch.testing.assert_close(compiled(*parts, flex), layer(*parts, sdpa), atol=1e-5, rtol=0)
