"""A model's parts where its memory mode wants them: on the device, or resting and on call; quantized, with tiles.

On a GPU what is away rests in host memory. On the CPU, where it would not have left it, it rests in the model's own
safetensors files and is read again; what has no place there, because it was made on loading, goes to a scratch file
that nobody else sees. With the placement `full` nothing is attached to any network. Not here: the modes' names
(`memory_modes`), how tensors come and go (`residency`), bytes (`footprint`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gesso import allocator, devices, stored
from gesso.errors import RequestError, RunError
from gesso.memory_modes import TILING, MemoryMode
from gesso.settings import load_settings
from gesso.stored import File, Stored
from gesso.weights.quantize import SCHEMES, linear_layers
from gesso.weights.residency import AT_ONCE, Part, Slot, Unit, divide, fetched, sleep

TEXT = "text_encoder"
"""What roles of text encoders begin with."""
AUTOENCODER, PICTURES = "autoencoder", "picture_encoder"
REFINER = "refiner"
"""The role of a network that steps after another, and never together with it."""
_TILE = 512  # pixels along the edge of a tile, where the autoencoder has no size of its own

WHOLE = "CLIP"
"""What classes begin with whose layers are left as they are: small, and not in the original's rule."""
_BEFORE_GIVING_BACK = 1 << 24  # numbers that are quantized


class Scratch:
    """A file without a name, gone with the process, for tensors that rest in no file of the model's."""

    def __init__(self) -> None:
        self._file: File | None = None
        self._used = 0

    def write(self, tensor: Tensor) -> Stored:
        """Put a tensor of the CPU there, to be read in its own layout. Raises RunError where the disk is full."""
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        plain = tensor.detach().permute(order).contiguous()
        axes = tuple(order.index(axis) for axis in range(tensor.ndim))
        if not plain.numel():
            return Stored(self._opened(), 0, tuple(plain.shape), plain.dtype, plain.dtype, axes)
        file, offset = self._opened(), self._used + -self._used % stored.ALIGNMENT
        self._used = offset
        memory = stored.bytes_of(plain)
        try:
            while memory:
                count = os.pwrite(file.descriptor, memory[:AT_ONCE], self._used)
                memory, self._used = memory[count:], self._used + count
        except OSError as error:
            problem = (error.strerror or str(error)).lower()
            raise RunError(f"{file.path}: no room for parts of the model that are away ({problem})") from error
        return Stored(file, offset, tuple(plain.shape), plain.dtype, plain.dtype, axes)

    def _opened(self) -> File:
        if self._file is None:
            home = load_settings().home
            try:
                home.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=home) as stream:
                    self._file = File(home, os.dup(stream.fileno()))
            except OSError as error:
                raise RunError(f"{home}: cannot hold parts of a model that are away ({error.strerror})") from error
        return self._file


_PART = "_gesso_part"  # by what name a network holds what it is as a part, so that both go together


def place(
    parts: Mapping[str, nn.Module],
    mode: MemoryMode,
    device: str,
    there: Callable[[nn.Module], bool] = lambda _network: False,
    beside: Mapping[str, Part] = MappingProxyType({}),
) -> dict[str, Part]:
    """Bring parts, by role, to the device or to where they rest, quantized and with tiles if the mode says so.

    Parts that come and go make way for each other, and for the model's others, `beside` them. Networks that are `there`
    already, since another model has them too, stay as they are and come and go for both. Returns all that come and go.
    Raises RequestError for a mode that these parts cannot have, MissingError without torchao where it is asked for,
    RunError where there is no room for scratch, WeightsError.
    """
    scratch = Scratch()
    placed = list(beside.items())
    with stored.deferred(), torch.inference_mode(False), torch.no_grad():
        for role, network in parts.items():
            inside = {module for module in network.modules() if there(module)}
            _place(role, network, inside, mode, device, scratch)
            found = (getattr(each, _PART, None) for each in (network, *inside))
            placed += [(role, part) for part in found if part is not None]
    for role, part in placed:
        part.rivals.update(other for name, other in placed if are_apart(role, name, mode))
    return dict(placed)


def _place(
    role: str, network: nn.Module, there: Set[nn.Module], mode: MemoryMode, device: str, scratch: Scratch
) -> None:
    away = mode.placement != "full"
    if network in there:
        return
    if mode.tiling and role == AUTOENCODER:
        set_tiles(network, mode)
    if mode.scheme and is_quantized(role):
        _quantize(network, mode, device, scratch)
    if not away:
        _bring(network, device)
        return
    part = Part(network, by_blocks=mode.placement == "group-offload", device=device, without=there)
    for slot in part.division.fixed:
        slot.put(_real(slot.value, device))
    _bring_buffers(network, device)
    for unit in part.units:
        _put_away(unit, device, scratch)
    part.attach()
    setattr(network, _PART, part)


def _quantize(network: nn.Module, mode: MemoryMode, device: str, scratch: Scratch) -> None:
    """Layer by layer, so that no more than one is here unquantized."""
    away = mode.placement != "full"
    if away and mode.scheme != "8bit" and not _rests_in_host(device):
        raise RequestError("memory", str(mode), f"usable on {device}", f"use {mode.placement}+8bit")
    done = 0
    for parent, name in linear_layers(network, without=WHOLE):
        if done > _BEFORE_GIVING_BACK:
            allocator.give_back()
            done = 0
        layer = getattr(parent, name)
        _bring(layer, devices.CPU if away else device)
        if layer.bias is not None:  # it was read into the memory of the weight, which is to go
            layer.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
        made, done = SCHEMES[mode.scheme](layer), done + layer.in_features * layer.out_features
        setattr(parent, name, made)
        slots = [] if mode.scheme != "8bit" or _rests_in_host(device) else divide(made, by_blocks=False).stem.slots
        for slot in slots:
            slot.put(stored.stand_in(scratch.write(slot.value)) if away else stored.apart(slot.value))
    allocator.give_back()


def is_quantized(role: str) -> bool:
    """Whether 8 bits are for a part of this role: for networks and text encoders."""
    return role not in (AUTOENCODER, PICTURES)


def set_tiles(autoencoder: nn.Module, mode: MemoryMode) -> None:
    """Have an autoencoder work tile by tile. Raises RequestError for one that cannot."""
    network: Any = autoencoder
    if not hasattr(network, "enable_tiling"):
        hint = f"leave {TILING} out"
        raise RequestError("memory", str(mode), "usable with this model, whose autoencoder has no tiles", hint)
    network.enable_tiling()
    if hasattr(network, "tile_latent_min_size"):
        network.tile_sample_min_size = _TILE
        network.tile_latent_min_size = _TILE // 2 ** (len(network.config["block_out_channels"]) - 1)


def tile_edge(autoencoder: nn.Module) -> int:
    """Pixels along the edge of a tile in modes with tiling; 0 where they change nothing.

    An autoencoder for videos, whose tiles divide time as well, decodes no other way in any mode.
    """
    if not hasattr(autoencoder, "enable_tiling") or hasattr(autoencoder, "tile_sample_min_num_frames"):
        return 0
    return getattr(autoencoder, "tile_sample_min_height", _TILE)


def are_apart(one: str, other: str, mode: MemoryMode) -> bool:
    """Whether parts of these roles are never there at once: in a mode, those that do not work together."""
    if mode.placement == "offload":
        return is_reader(one) != is_reader(other)
    return mode.placement != "full" and _stage(one) != _stage(other)


def _stage(role: str) -> str:
    """Networks that step work together, as FLUX and InfuseNet do; all else works by itself."""
    return role if is_reader(role) or role in (AUTOENCODER, REFINER) else "step"


def is_reader(role: str) -> bool:
    """Whether a part of this role reads what is asked for, before the network works."""
    return role.startswith(TEXT) or role == PICTURES


def _rests_in_host(device: str) -> bool:
    """Whether what is away from the device is in host memory; where that is the device's own, in files."""
    return devices.kind_of(device) == devices.CUDA


def _put_away(unit: Unit, device: str, scratch: Scratch) -> None:
    """Find the place where each tensor of a unit rests, and leave it there."""
    if _rests_in_host(device):
        unread = [slot for slot in unit.slots if stored.stored_of(slot.value) is not None]
        for slot in unread:
            slot.rest = stored.stored_of(slot.value)
        for slot, tensor in fetched(unread, devices.CPU, stored.read):
            slot.rest = tensor
    for slot in unit.slots:
        if slot.rest is None:
            value = slot.value.detach()
            known = stored.stored_of(value)
            slot.rest = value if _rests_in_host(device) else (known or scratch.write(value))
    sleep(unit, device)


def _bring(network: nn.Module, device: str) -> None:
    """All tensors to the device, read from their files in the order in which they lie there."""
    division = divide(network, by_blocks=False)
    slots = [*division.stem.slots, *division.fixed]
    for slot in slots:
        slot.rest = stored.stored_of(slot.value)
    waiting = sorted((slot for slot in slots if slot.rest is not None), key=_place_in_files)
    for slot, tensor in fetched(waiting, device):
        slot.put(tensor)
    nn.Module.to(network, device)  # what was here already; diffusers' own `to` has remarks to make
    _bring_buffers(network, device)


def _bring_buffers(network: nn.Module, device: str) -> None:
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _real(buffer, device)


def _real(tensor: Tensor, device: str) -> Tensor:
    """A tensor on the device, read if it was only a stand-in."""
    known = stored.stored_of(tensor)
    return (tensor.detach() if known is None else stored.read_apart(known)).to(device)


def _place_in_files(slot: Slot) -> tuple[str, int]:
    assert isinstance(slot.rest, Stored)
    return str(slot.rest.file.path), slot.rest.offset
