"""PEFT's configuration of an adapter: which alpha and rank a module has where no tensor says so.

It stands in a file's metadata, as diffusers saves it, or in `adapter_config.json` beside the file, as PEFT's own
`save_pretrained` does. Not here: tensors (`assembly`), how that second file comes from a site (`store`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gesso.adapters.formats.keys import WRAPPER, prefix_of
from gesso.errors import FileError

CONFIG = "adapter_config.json"
LARGEST_CONFIG = 1 << 20  # bytes

_METADATA = "lora_adapter_metadata"
_KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
_DEFAULT = 8  # PEFT's rank and alpha where its file has none
_MOST = 1e9
_PLAIN = re.compile(r"(?!.*\(\?)[\w.\\|()^$*+?\[\]-]{0,500}", re.ASCII)
"""What a pattern may be made of: no comments, flags, blanks or looking ahead, behind which repetitions could hide."""
_MOST_WAYS = 1 << 15  # in which all patterns together may be tried on a name: files of strangers are matched too
_MEND = f"mend it, or take {CONFIG} away"

_Patterns = tuple[tuple[re.Pattern[str], Any], ...]


@dataclass(frozen=True)
class PeftSettings:
    """The configuration from a file's metadata, which says what it says of LoRAs and no more."""

    values: Mapping[str, Any]
    _parts: dict[str, tuple[Mapping[str, Any], _Patterns]] = field(default_factory=dict, repr=False)  # as asked for

    def scale(self, group: str, rank: int, kind: str) -> float:
        """Alpha over rank, or over its root (rsLoRA, arXiv:2312.03732); 1 where nothing is said."""
        said, patterns = self._of(prefix_of(group))
        module = group.removeprefix(WRAPPER)
        # Patterns know nothing of the part of a pipeline that stands before a module.
        alpha = _matched(patterns, module.removeprefix(prefix_of(module)), said.get("lora_alpha"))
        if kind != "lora" or not _is_number(alpha):
            return 1.0
        return alpha / (math.sqrt(rank) if said.get("use_rslora") is True else rank)

    def _of(self, part: str) -> tuple[Mapping[str, Any], _Patterns]:
        """What is for a part: diffusers puts it before each name, as in "transformer.lora_alpha"; and its patterns."""
        if part not in self._parts:
            own = {key: value for key, value in self.values.items() if part and key.startswith(part)} or self.values
            said = {key.rpartition(".")[2]: value for key, value in reversed(list(own.items()))}  # the first counts
            patterns = said.get("alpha_pattern")
            self._parts[part] = said, _compiled(patterns if isinstance(patterns, dict) else {}, strict=False)
        return self._parts[part]


@dataclass(frozen=True)
class PeftConfig:
    """The configuration beside a file, with PEFT's rules: every module has a rank and an alpha by it.

    `path` is the weights' file. `root` is rsLoRA. Patterns are tried in their order, the first that fits decides.
    """

    path: Path
    kind: str
    rank: int
    alpha: float
    root: bool = False
    ranks: _Patterns = field(default=(), repr=False)
    alphas: _Patterns = field(default=(), repr=False)

    def scale(self, group: str, rank: int, kind: str) -> float:
        """Alpha over rank or its root. `rank` is that of the tensors, 0 where they have none.

        Raises FileError where the tensors are of another kind or rank: the configuration is of other weights.
        """
        module = group.removeprefix(WRAPPER)
        stated = int(_matched(self.ranks, module, self.rank))
        if kind != self.kind or rank not in (0, stated):
            said, have = f"{self.kind} of rank {stated}", f"{kind} of rank {rank}"
            problem = f"{CONFIG} beside it is of other weights: {module} is {said} by it, and {have} in the file"
            raise FileError(self.path, problem, f"put the right one there, or take {CONFIG} away")
        return float(_matched(self.alphas, module, self.alpha)) / (math.sqrt(stated) if self.root else stated)


def peft_settings(metadata: Mapping[str, str]) -> PeftSettings:
    """PEFT's configuration as diffusers keeps it in a file's metadata; nothing of what is not as it should be."""
    try:
        found = json.loads(metadata.get(_METADATA, "{}"))
    except (ValueError, RecursionError):
        found = {}
    return PeftSettings({str(name): value for name, value in found.items()} if isinstance(found, dict) else {})


def config_beside(path: Path) -> bytes:
    """What lies beside a file of weights as PEFT's configuration, nothing where none does. Raises FileError."""
    beside = path.with_name(CONFIG)
    if not beside.is_file():
        return b""
    try:
        with beside.open("rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
    except OSError as error:
        raise FileError(
            path, f"{CONFIG} beside it cannot be read ({(error.strerror or str(error)).lower()})"
        ) from error
    if not content or len(content) > LARGEST_CONFIG:
        raise FileError(path, f"{CONFIG} beside it is empty, or larger than {LARGEST_CONFIG} bytes", _MEND)
    return content


def read_config(path: Path) -> PeftConfig | None:
    """The configuration beside a file of weights, None where none is. Raises FileError for one that is broken."""
    content = config_beside(path)
    return parse_config(path, content) if content else None


def parse_config(path: Path, content: bytes) -> PeftConfig:
    """The configuration of a file of weights. Raises FileError for one that is broken."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"{CONFIG} beside it is no JSON", _MEND) from error
    if not isinstance(found, dict):
        raise FileError(path, f"{CONFIG} beside it is no object of JSON", _MEND)
    name = found.get("peft_type", "LORA")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise _broken(path, "peft_type", name, f"one of {', '.join(_KINDS)}")
    alpha = "lora_alpha" if kind == "lora" else "alpha"
    root = found.get("use_rslora")
    if not isinstance(root, bool | None):
        raise _broken(path, "use_rslora", root, "true or false")
    return PeftConfig(
        path=path,
        kind=kind,
        rank=_rank(path, "r", found.get("r", _DEFAULT)),
        alpha=_alpha(path, alpha, found.get(alpha, _DEFAULT)),
        root=root is True and kind == "lora",
        ranks=_patterns(path, found, "rank_pattern", _rank),
        alphas=_patterns(path, found, "alpha_pattern", _alpha),
    )


def _rank(path: Path, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        raise _broken(path, name, value, "a whole number from 1 on")
    return value


def _alpha(path: Path, name: str, value: Any) -> float:
    if not _is_number(value):
        raise _broken(path, name, value, "a finite number")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST <= value <= _MOST


def _patterns(path: Path, found: Mapping[str, Any], name: str, read: Callable[[Path, str, Any], float]) -> _Patterns:
    values = found.get(name)
    if not isinstance(values, dict | None):
        raise _broken(path, name, values, "an object of names and numbers")
    numbers = {key: read(path, f"{name} of {json.dumps(key)[:80]}", value) for key, value in (values or {}).items()}
    try:
        return _compiled(numbers, strict=True)
    except _PatternError as error:
        raise _broken(path, name, str(error), "a name of modules, or a plain regular expression of one") from error


def _broken(path: Path, name: str, value: Any, allowed: str) -> FileError:
    return FileError(path, f"{CONFIG} beside it says {name} {json.dumps(value)[:80]}, which is not {allowed}", _MEND)


# ---- patterns -------------------------------------------------------------------------------------------------------


class _PatternError(Exception):
    """No pattern, or one that could be tried for ever."""


def _compiled(patterns: Mapping[str, Any], *, strict: bool) -> _Patterns:
    """Patterns as PEFT matches them: a regular expression that the name of a module is, or ends with after a dot.

    Those that cannot be used raise _PatternError, or are left out where it is not `strict`.
    """
    found: list[tuple[re.Pattern[str], Any]] = []
    left = _MOST_WAYS
    for key, value in patterns.items():
        try:
            if not _PLAIN.fullmatch(key) or _ways(key) > left:
                raise _PatternError(key)
            found.append((re.compile(rf"(.*\.)?({key})$"), value))
            left -= _ways(key)
        except (re.error, RecursionError, OverflowError, _PatternError) as error:
            if strict:
                raise _PatternError(key) from error
    return tuple(found)


def _ways(key: str) -> int:
    """About in how many ways it can be tried on a name: repetitions have any length, choices double."""
    plain = re.sub(r"\\.|\[[^]]*\]", "x", key)
    if re.search(r"\)[*+{]", plain):  # a repetition of a group, which may hold another
        return _MOST_WAYS + 1
    bits = 7 * len(re.findall(r"[*+{]", plain)) + len(re.findall(r"[?|]", plain))
    return 1 << min(bits, 32)


def _matched(patterns: _Patterns, module: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), otherwise)
