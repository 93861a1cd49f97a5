"""Attaches what makes a loaded network faster: an attention kernel, and compiled blocks. No pipeline knows of it.

Here: the walk over networks. Kernels are set on each network alone and never for the process, so text encoders,
autoencoders and the networks of other engines keep theirs. Not here: what this machine can do (`engine/acceleration`,
`engine/attention`), and the kernels (`models/attention`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gesso.engine import attention
from gesso.engine.acceleration import PLAIN, Acceleration
from gesso.engine.attention import Backend
from gesso.errors import RequestError
from gesso.models.attention import Attending, Kernel, dispatched, flex, sdpa, sdpa_cudnn, sdpa_math

# By what name a pipeline holds the network that it calls at every step, and which parts are called once or so.
_ROLES = ("transformer", "unet")
_LEFT_ALONE = ("text_encoder", "text_encoder_2", "picture_encoder", "autoencoder")
# Networks of diffusers that give their attention a mask: kernels without one would refuse it in the middle of a step.
_MASKING = ("QwenImageTransformer2DModel", "HunyuanVideoTransformer3DModel")
# Those that repeat blocks and do not say which.
_BLOCKS = {"FluxControlNetModel": ("FluxTransformerBlock", "FluxSingleTransformerBlock")}
_OWN: dict[str, Kernel] = {"sdpa": sdpa, "math": sdpa_math, "cudnn": sdpa_cudnn, "flex": flex}
# Graphs of one kind of block before PyTorch stops compiling more: sizes, companies of one and of several, a cache that
# is empty, filled and left alone. From the second size on a size is a variable, so that few are ever needed.
_MOST_GRAPHS = 32


def accelerate(pipeline: object, acceleration: Acceleration) -> None:
    """Put the acceleration onto the networks of a pipeline that no loader of ours has put together; see below."""
    found = {role: getattr(pipeline, role, None) for role in _ROLES}
    networks = {role: network for role, network in found.items() if isinstance(network, nn.Module)}
    if not networks and acceleration != PLAIN:
        value = "compile" if acceleration.attention == attention.DEFAULT else acceleration.attention
        raise RequestError("attention", value, f"usable with a {type(pipeline).__name__}", "it shows no network")
    accelerate_parts(networks, acceleration)


def accelerate_parts(parts: Mapping[str, nn.Module], acceleration: Acceleration) -> None:
    """Put the acceleration onto the networks among the parts of a model, in place; names and state dicts stay.

    Doing it again changes nothing. Raises RequestError for a network that it cannot be put onto.
    """
    backend = next(one for one in attention.BACKENDS if one.name == acceleration.attention)
    for role, network in parts.items():
        if role in _LEFT_ALONE:
            continue
        _set_attention(network, backend)
        if acceleration.compile:
            _compile_blocks(network)


def _set_attention(network: Any, backend: Backend) -> None:
    if hasattr(network, "set_attention_backend"):
        _set_dispatcher(network, backend)
        return
    layers = [layer for layer in network.modules() if isinstance(layer, Attending)]
    if not layers and backend.name != attention.DEFAULT:
        raise _not_choosable(network, backend)
    if not layers or layers[0].kernel is _OWN.get(backend.name):
        return
    kernel = _OWN.get(backend.name) or dispatched(backend.plain, backend.masked)
    for layer in layers:
        layer.kernel = kernel


def _set_dispatcher(network: Any, backend: Backend) -> None:
    """A network of diffusers. Its own setter also sets what all others of the process take, which is taken back."""
    from diffusers.models.attention_dispatch import attention_backend

    if backend.name != attention.DEFAULT:
        _make_choosable(network)
    name = backend.masked if type(network).__name__ in _MASKING else backend.plain
    with _quiet(), attention_backend("native"):
        network.set_attention_backend(name)
    if backend.name != attention.DEFAULT and not any(_chosen(layer) == name for layer in network.modules()):
        raise _not_choosable(network, backend)


def _make_choosable(network: nn.Module) -> None:
    """Let the attention of a U-Net's blocks be chosen, which diffusers computes by PyTorch's function alone."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from gesso.models.unet_attention import DispatchingProcessor

    if isinstance(network, UNet2DConditionModel):
        for layer in network.modules():
            if isinstance(layer, Attention) and type(layer.processor) is AttnProcessor2_0:
                layer.set_processor(DispatchingProcessor())  # pyright: ignore[reportArgumentType]


def _chosen(layer: nn.Module) -> object:
    found = getattr(getattr(layer, "processor", None), "_attention_backend", None)
    return getattr(found, "value", found)


def _compile_blocks(network: Any) -> None:
    """Compile every block where it stands; blocks of a kind share what is compiled."""
    if hasattr(network, "compile_repeated_blocks"):
        kinds = set(network._repeated_blocks or _BLOCKS.get(type(network).__name__, ()))
        blocks = [block for block in network.modules() if type(block).__name__ in kinds]
    else:
        blocks = [block for block in network.modules() if isinstance(block, getattr(network, "repeated_blocks", ()))]
    if not blocks:
        raise RequestError("compile", True, f"usable with {type(network).__name__}", "it names no blocks to compile")
    # Older releases know only a limit of the whole process, which is not ours to set: there PyTorch's own counts.
    takes_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit = {"recompile_limit": _MOST_GRAPHS} if takes_limit else {}
    for block in blocks:
        if block._compiled_call_impl is None:
            block.compile(**limit)


def _not_choosable(network: nn.Module, backend: Backend) -> RequestError:
    return RequestError(
        "attention", backend.name, f"usable with {type(network).__name__}", f"leave it at {attention.DEFAULT}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' remark, at every call, that choosing is experimental."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
