"""Putting adapters onto networks for the rows of a batch: the one face of this room to the engine while it runs.

    adapted = Adapted({"transformer": network, "text_encoder": clip})
    with adapted.using([uses]):                  # reading prompts: one plan, or plans with equal uses
        pipeline.encode([plan])
    with adapted.using([state.uses for state in states]):
        pipeline.step(states)                    # states whose `mixing_key` is equal

Inside, each layer that an adapter changes adds what its rows' adapters add, by a hook that is taken off at the end:
weights are never changed, and for low-rank adapters never read, so that layers may be quantized or offloaded, and a
network without adapters is the plain one bit for bit. The scale is applied once, here. Not here: what a layer adds
(`apply_layer`), which rows are whose (`apply_rows`), files (`formats`).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from gesso.adapters.apply_layer import Layer, Part
from gesso.adapters.apply_rows import RowsOfCall, reads_prompts, rows_of
from gesso.adapters.formats.reading import Adapter
from gesso.errors import RequestError, RunError
from gesso.request_parts import LARGEST_LORA_SCALE


class Use(NamedTuple):
    """An adapter, and how strongly it is wanted: 1 is as trained, 0 not at all, below 0 its opposite."""

    adapter: Adapter
    strength: float = 1.0


Uses = tuple[Use, ...]
_Marks = tuple[tuple[tuple[int, float], ...], ...]
_KEPT = 4  # companies: several groups of states take turns


@dataclass(frozen=True)
class _Company:
    """States that share a batch, and what every layer adds for them, by role and module."""

    states: tuple[Uses, ...]
    uniform: bool
    layers: list[tuple[str, str, Layer]]


def checked(uses: Sequence[Use]) -> Uses:
    """The uses of one request, without those of strength 0. Raises RequestError for a strength or one named twice."""
    seen: set[int] = set()
    for adapter, strength in uses:
        if not (math.isfinite(strength) and abs(strength) <= LARGEST_LORA_SCALE):
            allowed = f"between -{LARGEST_LORA_SCALE:g} and {LARGEST_LORA_SCALE:g}"
            raise RequestError("lora scale", strength, allowed, f"{adapter.name} was trained for 1")
        if id(adapter) in seen:
            raise RequestError("lora", adapter.name, "named once", "add its scales up instead")
        seen.add(id(adapter))
    return tuple(use for use in uses if use.strength)


def mixing_key(uses: Sequence[Use], network: nn.Module | None = None) -> Hashable:
    """What belongs in a state's batch key: states with equal keys may step together, whatever adapters they have.

    It is () for plain LoRAs and for none. Adapters of other kinds step with their like only, and so do all on an S3-DiT
    that edits pictures (`siglip_feat_dim`): there one row of the time table is everybody's.
    """
    config = getattr(network, "config", None)
    shared = getattr(config, "siglip_feat_dim", None) is not None
    if all(use.adapter.plain for use in uses) and not (shared and uses):
        return ()
    return marks_of(uses)


def reading_key(uses: Sequence[Use], network: nn.Module | None = None) -> Hashable:
    """What belongs in the key by which prompts are read together: those with equal keys may be.

    It is () where none of the adapters changes what reads prompts: text encoders, and networks that do it themselves.
    """
    texts = any(role.startswith("text_encoder") for use in uses for role in use.adapter.parts)
    return marks_of(uses) if texts or (network is not None and reads_prompts(network)) else ()


def marks_of(uses: Sequence[Use]) -> tuple[tuple[int, float], ...]:
    """Uses as something that can be compared; adapters are the same only if they are one object."""
    return tuple((id(adapter), strength) for adapter, strength in uses)


class Adapted:
    """Networks of a model, by role, that adapters may be put onto. Used from one thread, like the networks.

    What each layer does for a company is kept for the last few companies. That refers to their adapters and copies
    nothing of them, so call `forget` before an adapter is to leave memory. That alone may be done from any thread,
    while the adapter is in no use.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._networks = {role: getattr(network, "_orig_mod", network) for role, network in networks.items()}
        self._companies: OrderedDict[_Marks, _Company] = OrderedDict()
        self._keeping = threading.Lock()
        self._running = False

    @contextmanager
    def using(self, company: Sequence[Sequence[Use]]) -> Iterator[None]:
        """While it lasts, the networks work with these adapters: one sequence of uses a state, in order of states.

        Where all of them are equal, any number of rows may pass; otherwise rows are told apart (`apply_rows`), and
        adapters must be plain. Raises RunError for others, and for a call inside another.
        """
        wanted = tuple(tuple(uses) for uses in company)
        if not any(wanted):
            yield
            return
        if self._running:
            raise RunError("adapters are in use already; networks are evaluated for one company at a time")
        prepared = self._prepared(wanted)
        self._running = True
        try:
            with ExitStack() as stack:
                self._attach(stack, prepared)
                yield
        finally:
            self._running = False

    def forget(self, adapter: Adapter | None = None) -> None:
        """Let go of an adapter, or of all."""
        with self._keeping:
            for marks, company in list(self._companies.items()):
                if adapter is None or any(use.adapter is adapter for uses in company.states for use in uses):
                    del self._companies[marks]

    def _prepared(self, states: tuple[Uses, ...]) -> _Company:
        """The company of these states, made if it is none of the last few."""
        marks = _marks(states)
        with self._keeping:
            if (known := self._companies.get(marks)) is not None:
                self._companies.move_to_end(marks)
                return known
        uniform = len(set(marks)) == 1
        if not uniform and not all(use.adapter.plain for uses in states for use in uses):
            raise RunError("adapters that are not plain LoRAs share no batch with others")
        layers = []
        for role, network in self._networks.items():
            for name, parts in _parts(role, states[:1] if uniform else states).items():
                layers.append((role, name, Layer(network.get_submodule(name), parts)))
        made = _Company(states, uniform, layers)
        with self._keeping:
            self._companies[marks] = made
            if len(self._companies) > _KEPT:
                self._companies.popitem(last=False)
        return made

    def _attach(self, stack: ExitStack, company: _Company) -> None:
        """Hooks on every layer, and on networks whose arguments say whose rows are whose; `stack` takes them off."""
        if any(_is_compiled(network) for network in self._networks.values()):
            # A graph has been traced without the hooks, or with those of another company.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        rows: dict[str, RowsOfCall] = {}
        if not company.uniform:
            for role, network in self._networks.items():
                rows[role] = rows_of(role, network, len(company.states))
                stack.callback(rows[role].attach(network))
        for role, name, layer in company.layers:
            stack.callback(layer.attach(name, rows.get(role)))


def _parts(role: str, states: Sequence[Uses]) -> dict[str, list[Part]]:
    """What each module of a part gains: every delta once, with its strength in each state (0 where it is not used)."""
    found: dict[str, dict[int, Part]] = {}
    for index, uses in enumerate(states):
        for adapter, strength in uses:
            for module, delta in adapter.parts.get(role, {}).items():
                parts = found.setdefault(module, {})
                part = parts.setdefault(id(delta), Part(delta, [0.0] * len(states)))
                part.strengths[index] += strength
    return {module: list(parts.values()) for module, parts in found.items()}


def _marks(states: Sequence[Uses]) -> _Marks:
    """A company as something that can be compared."""
    return tuple(marks_of(uses) for uses in states)


def _is_compiled(network: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in network.modules())
