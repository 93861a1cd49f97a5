"""Wrapping a module's forward, for this instance alone, through diffusers' public hooks; and taking it off without a
trace.

Works for any `nn.Module`. Classes are never edited. Not here: what the wrapper does (`sites`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

Forward = Callable[..., Any]
Around = Callable[[Forward, tuple[Any, ...], Mapping[str, Any]], Any]
"""Called instead of a forward: with the forward, and what it was to be called with."""


class _Hook(ModelHook):
    """A hook that replaces the forward. Only this frame is kept from being compiled, not what it calls."""

    def __init__(self, around: Around) -> None:
        super().__init__()
        self._around = around

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._around(self.fn_ref.original_forward, args, kwargs)  # pyright: ignore[reportArgumentType]


def wrap(module: nn.Module, name: str, around: Around) -> None:
    """Call `around` instead of the module's forward, until `unwrap` is called with the same name."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(_Hook(around), name)


def unwrap(module: nn.Module, name: str) -> None:
    """Take off what `wrap` put on; nothing happens if it is not there.

    diffusers 0.42.1 gives a hook that was put on later the bare forward in place of its own, instead of below its own;
    that is mended here, so that hooks may be taken off in any order. The last one leaves a module as it was made.
    """
    registry: Any = getattr(module, "_diffusers_hook", None)
    if registry is None or registry.get_hook(name) is None:
        return
    later = registry._fn_refs[registry._hook_order.index(name) + 1 :][:1]
    own = [reference.forward for reference in later]
    registry.remove_hook(name, recurse=False)
    for reference, forward in zip(later, own, strict=True):
        if reference.original_forward is not None and reference.forward is not forward:
            reference.original_forward, reference.forward = reference.forward, forward
    if not registry.hooks:
        del module._diffusers_hook
        bare = module.__dict__.get("forward")
        if getattr(bare, "__func__", None) is type(module).forward:
            del module.forward
