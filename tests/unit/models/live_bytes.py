"""The most bytes that tensors hold at once while something runs, counted storage by storage; on the meta device too.

Attention counts as fused kernels have it, which hold nothing but their result.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """What is made inside of it, but not the weights of `networks`, whatever looks at them."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        weights = (tensor for network in networks for tensor in [*network.parameters(), *network.buffers()])
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._live: dict[int, int] = {}
        self._now = 0
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name in self._live or name in self._weights:
            return
        self._live[name] = size
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, name)

    def _forget(self, name: int) -> None:
        self._now -= self._live.pop(name)


@contextmanager
def _fused_attention() -> Iterator[None]:
    def attend(query: Tensor, key: Tensor, value: Tensor, **values: object) -> Tensor:
        del key, value, values
        return torch.empty_like(query)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        yield


def most_live_bytes(action: Callable[[], object], *networks: nn.Module) -> int:
    """The most bytes at once that the action holds beside these networks' weights."""
    with _fused_attention(), torch.no_grad(), LiveBytes(*networks) as counting:
        action()
    return counting.most
