"""An adapter's file as deltas for the modules of loaded networks, checked; what does not fit is refused or told of.

    adapter = read_adapter(path, {"transformer": network, "text_encoder": clip})
    adapter.parts["transformer"]["transformer_blocks.0.attn.to_q"]       # a Delta

Networks are asked for names and shapes only, so that they may be quantized, offloaded or on the meta device.
Not here: what the file is (`classification`), one module's tensors (`assembly`), applying (`apply`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gesso.adapters.formats.assembly import Group, MisfitError, assemble, unused
from gesso.adapters.formats.classification import Classification, classify, kind_of
from gesso.adapters.formats.deltas import Delta
from gesso.adapters.formats.keys import NETWORK, TEXT_PARTS, WRAPPER, read_key
from gesso.adapters.formats.peft import CONFIG, PeftConfig, PeftSettings, peft_settings, read_config
from gesso.adapters.formats.places import Source, family_of, sources
from gesso.errors import FileError, WeightsError
from gesso.weights.files import read_tensors

_NO_ALPHA = "it counts as the rank; lay that file beside it, or fetch it again by gesso lora pull"
_SHOWN = 3
_FEW_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that fits the networks it was read for: deltas by role, then by module.

    `warnings` are sentences for the person who asked for it. Two adapters are one only if they are the same object.
    """

    name: str
    classification: Classification
    parts: Mapping[str, Mapping[str, Delta]]
    warnings: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether all of it are low-rank products: rows of one batch may then have different ones."""
        return all(delta.plain for part in self.parts.values() for delta in part.values())

    @property
    def modules(self) -> int:
        """How many modules it changes."""
        return sum(len(part) for part in self.parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; those that several modules share count once."""
        tensors = {
            tensor.data_ptr(): tensor.nbytes
            for part in self.parts.values()
            for delta in part.values()
            for tensor in delta.everything()
        }
        return sum(tensors.values())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Adapter:
        """A copy elsewhere, or in another dtype; tensors that modules share stay shared."""
        moved: dict[int, Tensor] = {}

        def move(delta: Delta) -> Delta:
            for tensor in delta.tensors.values():
                moved.setdefault(id(tensor), tensor.to(device, dtype))
            return replace(
                delta.to(device, dtype) if delta.magnitude is not None or delta.bias_O is not None else delta,
                tensors={name: moved[id(tensor)] for name, tensor in delta.tensors.items()},
            )

        parts = {role: {module: move(delta) for module, delta in part.items()} for role, part in self.parts.items()}
        return replace(self, parts=parts)


@dataclass
class _Found:
    """What has been made of a file so far, by role and module; and what has not, by its name in the file."""

    parts: dict[str, dict[str, Delta]] = field(default_factory=dict)
    groups: int = 0
    matched: int = 0
    without_place: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)


def read_adapter(path: Path, networks: Mapping[str, nn.Module], *, name: str = "") -> Adapter:
    """The adapter of a safetensors file, on the CPU in the file's dtype, for the parts of a model by their roles.

    One of the networks has to be that of a family ("transformer" or "unet"); "text_encoder" and "text_encoder_2" are
    those that read text. Tensors of other parts are left out, with a warning, as is what has no module here.
    Raises FileError for what is no adapter, one of another family, an Infinity's whose chunks cannot be counted, or a
    PEFT configuration beside it that is broken or of other weights; WeightsError for one that is damaged, holds NaN or
    infinity, or has other shapes than the network.
    """
    classification = classify(path)
    family, role = _network(networks)
    check_family(path, classification, family)
    groups = _groups(read_tensors(path, pickles=False), path)
    peft = _peft(path, classification)
    found = _Found()
    named = {part: network for part, network in networks.items() if part == role or part in TEXT_PARTS}
    chunk = _chunk(path, groups, networks[role]) if family == "infinity" else None
    known = {part: sources(network, chunk) for part, network in named.items()}
    pairs = [(group, _role(group.part, role, family)) for group in groups]
    placed = [(group, where, known.get(where, {}).get(group.module)) for group, where in pairs]
    # What is under our own name goes first: a file may have the fused layer beside its parts, which is the same again.
    for group, where, source in sorted(placed, key=lambda one: one[2] is None or not one[2].own):
        if source is None and _says_nothing(group):
            continue
        found.groups += 1
        if source is None:
            found.without_place.append(group.name)
        else:
            _place(found, path, where, group, source, peft)
    _check_fit(path, found, classification, family)
    warnings = _warnings(name or path.name, found, classification, family)
    if (
        isinstance(peft, PeftSettings)
        and not peft.values
        and classification.peft
        and groups[0].name.startswith(WRAPPER)
    ):
        warnings += (f"{name or path.name} has PEFT's names, and no {CONFIG} says its alpha: {_NO_ALPHA}",)
    return Adapter(name or path.stem, classification, found.parts, warnings)


def _peft(path: Path, found: Classification) -> PeftSettings | PeftConfig:
    """What PEFT says of alpha and rank: the file's own metadata counts before what lies beside the file."""
    own = peft_settings(found.metadata)
    return own if own.values or not found.peft else read_config(path) or own


def _network(networks: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The family of the model, and the role of the network that it is told by."""
    for role, network in networks.items():
        if family := family_of(network):
            return family, role
    kinds = ", ".join(type(network).__name__ for network in networks.values())
    raise ValueError(f"no network of a family that adapters are for among: {kinds}")


def check_family(path: Path, found: Classification, family: str) -> None:
    """Raises FileError for a file that is surely for another family."""
    whose = " or ".join(found.families) or found.foreign
    if whose and family not in found.families:
        raise FileError(path, f"is for {whose}, not for {family}", f"choose one made for {family}")


def _groups(tensors: Mapping[str, Tensor], path: Path) -> list[Group]:
    """Tensors by the module that they are for. Raises WeightsError for NaN and infinity."""
    groups: dict[str, Group] = {}
    broken = []
    for name, tensor in tensors.items():
        if (key := read_key(name)) is None:
            continue
        value = tensor.to(torch.bfloat16) if tensor.dtype in _FEW_BITS else tensor
        value = value.float() if value.dtype == torch.float64 else value
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            broken.append(name)
        group = groups.setdefault(key.group, Group(key.group, key.part, key.module))
        group.tensors[key.field] = value
    if broken:
        raise WeightsError(path, detail=f"NaN or infinity in {_some(broken)}")
    return [group for group in groups.values() if kind_of(group.tensors) is not None]


def _place(found: _Found, path: Path, role: str, group: Group, source: Source, peft: PeftSettings | PeftConfig) -> None:
    """Put a module's deltas where they belong, unless one is there already."""
    try:
        deltas = assemble(group, source, peft)
    except MisfitError as misfit:
        if misfit.shape:
            found.misfits.append(str(misfit))
            return
        raise WeightsError(path, detail=str(misfit)) from misfit
    part = found.parts.setdefault(role, {})
    new = {module: delta for module, delta in deltas.items() if module not in part}
    if len(new) < len(deltas):
        found.twice.append(group.name)
    part.update(new)
    found.unused += [f"{group.name} ({ending})" for ending in unused(group)]
    found.matched += 1


def _check_fit(path: Path, found: _Found, classification: Classification, family: str) -> None:
    """Raises WeightsError where shapes are others, FileError where nothing is left."""
    if found.misfits:
        if family == "flux" and any("x_embedder" in misfit or "img_in" in misfit for misfit in found.misfits):
            problem = "is a control LoRA, made for a FLUX that reads a control picture, which is another network"
            raise FileError(path, problem, "choose a plain LoRA for flux")
        raise WeightsError(path, mismatched=found.misfits)
    if not found.matched:
        whose = " or ".join(classification.families) or "no family that is known"
        problem = f"none of its {found.groups} modules is in this {family} ({_some(found.without_place)})"
        raise FileError(path, problem, f"by its names it is for {whose}")


def _warnings(name: str, found: _Found, classification: Classification, family: str) -> tuple[str, ...]:
    warnings = []
    if len(classification.families) > 1:
        whose = " or ".join(classification.families)
        warnings.append(f"{name} is for {whose}, which its names leave open; it is used as one for {family}")
    if found.without_place:
        missing = f"{len(found.without_place)} of {found.groups} modules of {name} are not in this model"
        warnings.append(f"{missing} and have no effect: {_some(found.without_place)}")
    if found.twice:
        warnings.append(f"{name} says {len(found.twice)} modules twice; once is used: {_some(found.twice)}")
    if found.unused:
        count, several = len(found.unused), _some(found.unused)
        warnings.append(f"{count} tensors of {name} are of a second kind on one module and have no effect: {several}")
    if classification.unknown:
        count = len(classification.unknown)
        warnings.append(f"{count} tensors of {name} are of no known kind: {_some(classification.unknown)}")
    return tuple(warnings)


def _role(part: str, network_role: str, family: str) -> str:
    if part == NETWORK:
        return network_role
    return "text_encoder_2" if part == "text_encoder_3" and family == "flux" else part


def _says_nothing(group: Group) -> bool:
    """Whether all that a module gains is zero, as trainers write for norms that they did not train."""
    return kind_of(group.tensors) == "full" and all(not bool(value.any()) for value in group.tensors.values())


def _chunk(path: Path, groups: Iterable[Group], network: nn.Module) -> int | None:
    """How many blocks lie in a chunk of a published Infinity; None where names tell of no chunks.

    Raises FileError where the chunks that are named are not all of the network: their size, and with it which blocks
    are meant, is then unknown.
    """
    found = [re.match(r"block_chunks_([0-9]{1,6})_module_([0-9]{1,6})_", group.module) for group in groups]
    places = [(int(each[1]), int(each[2])) for each in found if each is not None]
    if not places:
        return None
    chunks, size = (max(numbers) + 1 for numbers in zip(*places, strict=True))
    infinity: Any = getattr(network, "_orig_mod", network)
    depth = len(infinity.blocks)
    if chunks * size != depth:
        problem = f"names {chunks} chunks of {size} blocks, which leaves open what it means of {depth} blocks here"
        raise FileError(path, problem, f"give its blocks their own numbers, blocks.0 to blocks.{depth - 1}")
    return size


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f", and {more} more" if more > 0 else "")
