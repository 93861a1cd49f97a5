"""`gesso doctor`: what this machine can do. It only looks: nothing is installed, downloaded or changed."""

import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata as distributions
from pathlib import Path
from typing import Annotated

import typer

from gesso.errors import MissingError, RequestError
from gesso.settings import load_settings


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    topic: str
    what: str
    answer: str


# Processor features that decide which kernels run, by their names in /proc/cpuinfo.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Say what this machine can do.

    Versions, devices, memory, attention, optional parts and the command that installs them, and where files are kept.
    """
    topic = ""
    for finding in findings():
        if as_json:
            typer.echo(json.dumps(asdict(finding), ensure_ascii=False))
            continue
        if finding.topic != topic:
            topic = finding.topic
            typer.echo(f"\n{topic}" if topic != "versions" else topic)
        typer.echo(f"  {finding.what:<22}{finding.answer}")


def findings() -> Iterator[Finding]:
    """Everything the report says, in order."""
    for topic, lines in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("memory", _memory()),
        ("attention", _attention()),
        ("compiling", _compiling()),
        ("extras", _extras()),
        ("files", _files()),
    ):
        for what, answer in lines:
            yield Finding(topic=topic, what=what, answer=answer)


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("gesso", "torch", "numpy", "pillow", "safetensors", "pydantic"):
        yield name, distributions.version(name)
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform == "win32":
        yield "windows", "untested: runs as far as its dependencies allow; Linux and macOS are supported"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    from gesso.devices import CPU, CUDA, MPS, numbered

    features = cpu_features()
    fast = (
        "bf16 in hardware"
        if {"avx512_bf16", "amx_bf16", "bf16"} & set(features)
        else "bf16 emulated, float32 is faster"
    )
    yield CPU, f"{_cpu_name()}; {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield f"{CPU} features", f"{' '.join(features) or 'unknown'}; {fast}"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            ability = f"compute {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB"
            yield numbered(CUDA, number), f"{card.name}; {ability}; CUDA {torch.version.cuda}"
    else:
        yield CUDA, "none" if torch.version.cuda else "none: this PyTorch was built without CUDA"
    yield MPS, "present, untested by this project" if torch.backends.mps.is_available() else "none"


def cpu_features() -> list[str]:
    """The features in `_CPU_FEATURES` that this processor has; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return []
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    present = set(match[1].split()) if match else set[str]()
    return [feature for feature in _CPU_FEATURES if feature in present]


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    match = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _memory() -> Iterator[tuple[str, str]]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS not both names
        yield "main", "unknown on this system"
    else:
        yield "main", f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
    import torch

    from gesso.devices import CUDA, numbered

    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        yield numbered(CUDA, number), f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"


def _attention() -> Iterator[tuple[str, str]]:
    from gesso.engine.attention import report
    from gesso.engine.device import default_device

    yield from report(default_device())


def _compiling() -> Iterator[tuple[str, str]]:
    from gesso.engine.acceleration import check_compiler
    from gesso.engine.device import default_device

    try:
        check_compiler(default_device())
    except (MissingError, RequestError) as error:
        yield "blocks", str(error)
    else:
        yield "blocks", "compiled with --compile"


def _extras() -> Iterator[tuple[str, str]]:
    """Optional parts by what their distributions say is needed."""
    needed: dict[str, list[str]] = {
        name: [] for name in distributions.metadata("gesso").get_all("Provides-Extra") or []
    }
    for requirement in distributions.requires("gesso") or []:
        match = re.match(r"([A-Za-z0-9._-]+).*extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if match and match[2] in needed and match[1].lower() != "gesso":
            needed[match[2]].append(match[1])
    for extra, names in sorted(needed.items()):
        if extra in ("all", "dev"):
            continue
        missing = [name for name in names if not _is_installed(name)]
        if not names:
            yield extra, "needs nothing yet"
        elif missing:
            yield extra, f"missing {', '.join(missing)}; get it with: pip install 'gesso[{extra}]'"
        else:
            yield extra, "installed"


def _is_installed(name: str) -> bool:
    try:
        distributions.version(name)
    except distributions.PackageNotFoundError:
        return False
    return True


def _files() -> Iterator[tuple[str, str]]:
    settings = load_settings()
    count, size = folder_size(settings.home)
    yield "home", f"{settings.home}: {count} files, {size / 2**20:.1f} MiB" if count else f"{settings.home}: empty"
    yield "output", str(settings.output.absolute())


def folder_size(folder: Path) -> tuple[int, int]:
    """Number and bytes of the files below a folder; links are not followed, and what cannot be read is left out."""
    count = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if not path.is_symlink():
                try:
                    size += path.stat().st_size
                except OSError:  # gone, or not ours to see
                    continue
                count += 1
    return count, size
