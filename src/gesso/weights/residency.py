"""Tensors that come and go: how a network works of which not all is on the device at once, from outside of it.

One mechanism for all networks, ours, diffusers' and transformers': a tensor that is away leaves a stand-in of the same
shape, dtype and device (`stored.ghost`), and comes back before a module of its unit is called. A unit is a part without
its blocks, or one block of it; it comes whole, and goes when another unit needs the room. What comes back are the same
bits in memory laid out alike, so pictures are equal to those of `full` to the last bit.

Small tensors stay: those that belong to no innermost layer, which code may use without calling anything. Not here:
where tensors rest and which come and go (`placing`), bytes (`footprint`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gesso import allocator, stored
from gesso.stored import Stored

AT_ONCE = 1 << 28  # bytes that are read into one arena: as many may lie in host memory beside what stays there
_ENTRIES = ("read", "read_text")  # methods that use weights of their module without a call of it


Get = Callable[[Iterable[Stored]], list[Tensor]]


@dataclass(eq=False)
class Slot:
    """One parameter, wherever a network holds it, and where it rests: in a file, in host memory, or nowhere else."""

    owners: list[tuple[nn.Module, str]]
    rest: Stored | Tensor | None = None

    @property
    def value(self) -> nn.Parameter:
        module, name = self.owners[0]
        parameter = module._parameters[name]
        assert parameter is not None
        return parameter

    def put(self, tensor: Tensor) -> None:
        """Make this the parameter, everywhere."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, name in self.owners:
            module._parameters[name] = parameter


@dataclass(eq=False)
class Unit:
    """Tensors that come and go together, and the modules before whose call they have to be there."""

    modules: list[nn.Module] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    awake: bool = True


@dataclass(eq=False)
class Division:
    """A part in units: `stem` is there while the part works, `blocks` one at a time, `fixed` always."""

    stem: Unit
    blocks: list[Unit]
    fixed: list[Slot]


def divide(part: nn.Module, *, by_blocks: bool, without: Set[nn.Module] = frozenset()) -> Division:
    """A network's units: the elements of its outermost lists of modules are blocks, if asked for; the rest is stem.

    `without` are networks inside that are divided apart.
    """
    stem, blocks = Unit(), []
    unit_of: dict[nn.Module, Unit] = {}
    for module in _modules(part, without, into_lists=not by_blocks):
        stem.modules.append(module)
        unit_of[module] = stem
        if by_blocks and isinstance(module, nn.ModuleList):
            for element in module.children():  # an element may be None
                block = Unit(list(_modules(element, without, into_lists=True)))
                blocks.append(block)
                unit_of |= dict.fromkeys(block.modules, block)
    found: dict[int, tuple[Slot, list[Unit | None]]] = {}
    for module, unit in unit_of.items():
        leaf = next(module.children(), None) is None
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slot, units = found.setdefault(id(parameter), (Slot([]), []))
                slot.owners.append((module, name))
                units.append(unit if leaf else None)
    fixed = [slot for slot, units in found.values() if None in units]
    for slot, units in found.values():
        if units[0] is not None and None not in units:  # what several units share is there for all of them
            (units[0] if all(unit is units[0] for unit in units) else stem).slots.append(slot)
    return Division(stem, [block for block in blocks if block.slots], fixed)


def _modules(network: nn.Module, without: Set[nn.Module], *, into_lists: bool) -> Iterator[nn.Module]:
    """A network and the modules below it, each once; of those in lists only if asked for."""
    seen = set(without)
    waiting = [network]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        if into_lists or not isinstance(module, nn.ModuleList):
            waiting += reversed(list(module.children()))


class Part:
    """One part of a model, by its units, that knows which parts have to leave before it comes."""

    def __init__(
        self, network: nn.Module, *, by_blocks: bool, device: str, without: Set[nn.Module] = frozenset()
    ) -> None:
        self.division = divide(network, by_blocks=by_blocks, without=without)
        self.rivals: weakref.WeakSet[Part] = weakref.WeakSet()
        self._device = device
        self._block: Unit | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def units(self) -> list[Unit]:
        return [self.division.stem, *self.division.blocks]

    def attach(self) -> None:
        """Have every unit come before any of its modules is called."""
        for unit in self.units:
            for module in unit.modules:
                self._hooks.append(module.register_forward_pre_hook(partial(_before, self, unit)))
                for name in _ENTRIES:
                    if callable(getattr(type(module), name, None)):
                        setattr(module, name, _after(partial(self.need, unit), getattr(module, name)))

    def detach(self) -> None:
        """Have everything there for good, and the network as it is without this."""
        for unit in self.units:
            if not unit.awake:
                _wake(unit, self._device)
            for module in unit.modules:
                for name in _ENTRIES:
                    module.__dict__.pop(name, None)
        for hook in self._hooks:
            hook.remove()

    def need(self, unit: Unit) -> None:
        """Have the stem there, and this unit; whatever must not be there with them goes first."""
        stem = self.division.stem
        if not stem.awake:
            for rival in self.rivals:
                rival.leave()
            _wake(stem, self._device)
        if not unit.awake:
            if self._block is not None:
                sleep(self._block, self._device)
            _wake(unit, self._device)
        if unit is not stem:
            self._block = unit

    def leave(self) -> None:
        """Let everything go that comes back."""
        if any(unit.awake for unit in self.units):
            for unit in self.units:
                sleep(unit, self._device)
            allocator.give_back()
        self._block = None


def _before(part: Part, unit: Unit, _module: nn.Module, _arguments: object) -> None:
    if not (unit.awake and part.division.stem.awake):
        part.need(unit)


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        first()
        return then(*arguments, **named)

    return both


def _wake(unit: Unit, device: str) -> None:
    """All of it or, where that fails, none."""
    with torch.inference_mode(False), torch.no_grad():
        for slot, tensor in list(fetched(unit.slots, device)):
            slot.put(tensor)
    unit.awake = True


def sleep(unit: Unit, device: str) -> None:
    if unit.awake:
        with torch.inference_mode(False), torch.no_grad():
            for slot in unit.slots:
                if slot.rest is not None:
                    value = slot.value
                    slot.put(stored.ghost(value.shape, value.dtype, device))
        unit.awake = False


def fetched(slots: Sequence[Slot], device: str, get: Get = stored.mapped) -> Iterator[tuple[Slot, Tensor]]:
    """What rests somewhere, on the device; `get` is how it is had from files."""
    for slot in slots:
        if isinstance(slot.rest, Tensor):
            yield slot, slot.rest.to(device)
    waiting: list[Slot] = []
    size = 0
    for slot in slots:
        if isinstance(slot.rest, Stored):
            waiting.append(slot)
            size += slot.rest.nbytes
            if size >= AT_ONCE:
                yield from _read(waiting, device, get)
                waiting, size = [], 0
    yield from _read(waiting, device, get)


def _read(slots: Sequence[Slot], device: str, get: Get) -> list[tuple[Slot, Tensor]]:
    tensors = get(slot.rest for slot in slots if isinstance(slot.rest, Stored))
    return [(slot, tensor.to(device)) for slot, tensor in zip(slots, tensors, strict=True)]
