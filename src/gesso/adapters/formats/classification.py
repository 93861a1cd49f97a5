"""What an adapter's file is, told from its header alone: the family it is for, who wrote it, its kinds and ranks.

No tensor is read. Not here: names that families have (`families`), tensors (`reading`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gesso.adapters.formats import families
from gesso.adapters.formats.keys import NETWORK, WRAPPER, Key, prefix_of, read_key
from gesso.errors import FileError
from gesso.weights import headers

LORA_FIELDS = frozenset(("down", "up", "mid"))
_SHOWN_TAGS, _LONGEST_FACT = 5, 500
_MOST_METADATA = 1 << 24  # bytes of a header that are looked through for metadata


@dataclass(frozen=True, kw_only=True)
class Classification:
    """An adapter by its names and shapes.

    `families` are those that its names fit; several where they do not decide, none where no network's names are in it.
    `foreign` is a family that has no network here. `naming` is whose spelling it is. `kinds` are "lora", "loha",
    "lokr" and "full", with "dora" and "convolution" where it has such. `ranks` are the least and the largest of its
    LoRAs. `modules` says how many of each part it changes. `unknown` are names that mean nothing here. `peft` says that
    names are as PEFT leaves them, without alpha, so that a configuration beside the file is of this file.
    """

    families: tuple[str, ...]
    naming: str
    kinds: frozenset[str]
    modules: Mapping[str, int]
    ranks: tuple[int, int] = (0, 0)
    foreign: str = ""
    unknown: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    peft: bool = False

    @property
    def count(self) -> int:
        """Modules in all."""
        return sum(self.modules.values())

    def facts(self) -> dict[str, str]:
        """What the file says of itself, as trainers write it: the words that call for it, and what it was made for."""
        said = self.metadata
        found = {
            "base model": said.get("ss_sd_model_name") or said.get("ss_base_model_version") or "",
            "trained words": said.get("modelspec.trigger_phrase") or _frequent(said.get("ss_tag_frequency", "")),
        }
        return {name: _line(fact) for name, fact in found.items() if fact}

    def summary(self) -> str:
        """One line for a person: kinds, ranks, families, naming, how many modules."""
        order = ("dora", "lora", "loha", "lokr", "full", "convolution")
        names = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
        what = ", ".join(names.get(kind, kind) for kind in order if kind in self.kinds)
        low, high = self.ranks
        rank = f" of rank {low}" if high and low == high else f" of ranks {low} to {high}" if high else ""
        whose = " or ".join(self.families) or self.foreign or "an unknown family"
        text = sum(count for part, count in self.modules.items() if part != NETWORK)
        return f"{what}{rank} for {whose}, {self.naming} naming, {self.count} modules" + (
            f" ({text} of text encoders)" if text else ""
        )


def classify(path: Path) -> Classification:
    """Tell what a file is. Raises FileError for what is no adapter, WeightsError for a damaged file."""
    header = headers.read_header(path)
    found = classify_names({name: tensor.shape for name, tensor in header.items()}, read_metadata(path))
    if not found.count:
        few = ", ".join(sorted(header)[:3])
        raise FileError(
            path, f"holds no adapter that is known ({few or 'no tensors'})", "a LoRA, LoHa, LoKr or DoRA is wanted"
        )
    return found


def classify_names(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> Classification:
    """The same from the names and shapes of any tensors; whatever they are, nothing is raised."""
    metadata = metadata or {}
    keys = {name: read_key(name) for name in shapes}
    known = {name: key for name, key in keys.items() if key is not None}
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    first: dict[str, Key] = {}
    for name, key in known.items():
        groups.setdefault(key.group, {})[key.field] = shapes[name]
        first.setdefault(key.group, key)
    changing = {group: fields for group, fields in groups.items() if kind_of(fields) is not None}
    parts = Counter(first[group].part for group in changing)
    widths = {first[group].module: _width(fields) for group, fields in changing.items() if first[group].part == NETWORK}
    judged = families.verdict(widths, families.hinted(metadata))
    ranks = [fields["down"][0] for fields in changing.values() if fields.get("down")]
    return Classification(
        families=judged.families,
        foreign=judged.foreign,
        naming=_naming(list(known), list(changing), judged.families),
        kinds=_kinds(changing),
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        modules=dict(parts),
        unknown=tuple(name for name, key in keys.items() if key is None),
        metadata=metadata,
        peft=_is_pefts(list(known), list(changing)),
    )


def kind_of(fields: Mapping[str, object]) -> str | None:
    """The kind of delta that a module's tensors make, by their endings; None for an alpha that stands alone."""
    if not LORA_FIELDS.isdisjoint(fields):
        return "lora"
    if any(name.startswith("hada_") for name in fields):
        return "loha"
    if any(name.startswith("lokr_") for name in fields):
        return "lokr"
    return "full" if "diff" in fields or "diff_b" in fields else None


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; empty if nothing. The file has been checked before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= _MOST_METADATA else b"{}"
    found = json.loads(text).get("__metadata__")
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _frequent(tags: str) -> str:
    """The words that most captions had, of kohya's counts by folder and word; "" for what is no such record."""
    try:
        folders = json.loads(tags)
        counts: Counter[str] = Counter()
        for folder in folders.values():
            counts.update({str(word).strip(): int(count) for word, count in folder.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return ""
    return ", ".join(word for word, _ in counts.most_common(_SHOWN_TAGS))


def _line(text: str) -> str:
    return "".join(mark for mark in text if mark.isprintable())[:_LONGEST_FACT]


def _width(fields: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many numbers a module reads, where a tensor has one column for each."""
    shape = fields.get("down") or fields.get("hada_w1_b") or fields.get("diff") or ()
    return shape[1] if len(shape) > 1 else None


def _kinds(groups: Mapping[str, Mapping[str, tuple[int, ...]]]) -> frozenset[str]:
    found = {kind for fields in groups.values() if (kind := kind_of(fields)) is not None}
    for fields in groups.values():
        if "dora_scale" in fields or "magnitude" in fields:
            found.add("dora")
        if "mid" in fields or any(len(shape) > 2 and max(shape[2:]) > 1 for shape in fields.values()):
            found.add("convolution")
    return frozenset(found)


def _is_pefts(names: list[str], groups: list[str]) -> bool:
    """Whether PEFT wrote the names. Behind the name of a pipeline's part an alpha that is not said is the rank."""
    own = all(group.startswith(WRAPPER) for group in groups)
    bare = not any(prefix_of(group) for group in groups) and any(".lora_A" in name for name in names)
    return bool(groups) and (own or bare) and not any(name.endswith(".alpha") for name in names)


def _naming(names: list[str], groups: list[str], found: tuple[str, ...]) -> str:
    """Whose spelling most of a file is; for people, nothing depends on it."""
    prefix = Counter(prefix_of(group) for group in groups).most_common(1)[0][0] if groups else ""
    original = any("double_blocks" in group or "input_blocks" in group or "attention.qkv" in group for group in groups)
    if any(".processor." in name for name in names):
        return "XLabs" if original else "old diffusers"
    if any(".lora_A.default." in name for name in names):
        return "DiffSynth"
    if any(name.startswith(WRAPPER) for name in names):
        return "PEFT"
    if prefix.startswith("lora_"):
        return "kohya" if not set(found) & {"z-image", "qwen-image", "hunyuan-video"} else "musubi or kohya"
    if prefix == "lycoris_":
        return "LyCORIS"
    if prefix == "diffusion_model.":
        return "ComfyUI or ai-toolkit"
    return "original" if original else "diffusers" if prefix else "bare"
