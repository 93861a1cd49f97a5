"""Which attention kernels there are, what each needs, and what of it this machine has. Nothing falls back in silence.

Here: the table, the check before weights are read, and the report of `gesso doctor`. Not here: the kernels of our own
networks (`models/attention`), and who sets them (`engine/loading/accelerate`).
PyTorch is never imported at the top.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib import metadata as distributions
from importlib.util import find_spec
from typing import TYPE_CHECKING

from gesso.devices import CPU, CUDA, kind_of
from gesso.engine.device import check_device, default_device
from gesso.errors import MissingError, RequestError

if TYPE_CHECKING:
    import torch

DEFAULT = "sdpa"
_DIFFUSERS = "pip install 'gesso[diffusion]'"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A library that a kernel comes from: what is imported, what it is installed as, since when, and by which words."""

    module: str
    name: str
    least: tuple[int, ...]
    command: str

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(str(part) for part in self.least)} or newer"

    def is_installed(self) -> bool:
        """Whether it is here and new enough; whether it loads is known only when it is loaded."""
        if find_spec(self.module) is None:
            return False
        try:
            found = distributions.version(self.name)
        except distributions.PackageNotFoundError:
            return False
        return tuple(int(part) for part in re.findall(r"\d+", found)[: len(self.least)]) >= self.least


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to attend.

    Attributes:
        name: as the setting spells it.
        what: what it is, for a person.
        plain: what diffusers' dispatcher calls it.
        masked: what it calls the one that takes masks of keys.
        cards: compute capabilities of the NVIDIA GPUs it runs on, from the first up to before the second; None where it
            needs none.
        half: whether it computes in 16 bits only.
        compiled: whether it is of use only inside of what is compiled.
        package: where it comes from, None for PyTorch itself.
    """

    name: str
    what: str
    plain: str
    masked: str
    cards: tuple[tuple[int, int], tuple[int, int]] | None = None
    half: bool = False
    compiled: bool = False
    package: Package | None = None


_ANY = (99, 0)
_FLASH = Package(
    module="flash_attn", name="flash-attn", least=(2, 6, 3), command="pip install flash-attn --no-build-isolation"
)
_FLASH_3 = Package(
    module="flash_attn_interface",
    name="flash-attn-3",
    least=(3,),
    command="pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
)
_SAGE = Package(
    module="sageattention",
    name="sageattention",
    least=(2, 1, 1),
    command="pip install --no-build-isolation git+https://github.com/thu-ml/SageAttention",
)
BACKENDS = (
    Backend(name="sdpa", what="PyTorch's own choice", plain="native", masked="native"),
    Backend(name="math", what="PyTorch's plain sums, to compare with", plain="_native_math", masked="_native_math"),
    Backend(name="cudnn", what="cuDNN", plain="_native_cudnn", masked="_native_cudnn", cards=((8, 0), _ANY), half=True),
    Backend(name="flex", what="PyTorch's FlexAttention", plain="flex", masked="flex", compiled=True),
    Backend(
        name="flash",
        what="FlashAttention 2",
        plain="flash",
        masked="flash_varlen",
        cards=((8, 0), _ANY),
        half=True,
        package=_FLASH,
    ),
    Backend(
        name="flash3",
        what="FlashAttention 3",
        plain="_flash_3",
        masked="_flash_varlen_3",
        cards=((9, 0), (10, 0)),
        half=True,
        package=_FLASH_3,
    ),
    Backend(
        name="sage",
        what="SageAttention 2, in 8 bits inside: pictures differ",
        plain="sage",
        masked="sage_varlen",
        cards=((8, 0), _ANY),
        half=True,
        package=_SAGE,
    ),
)
NAMES = tuple(backend.name for backend in BACKENDS)


def check_name(name: str, device: str | None = None) -> str:
    """The name itself, if it is one, whether or not it runs here.

    Raises RequestError, which imports PyTorch: it lists what the device has, the default one where none is said.
    """
    if name not in NAMES:
        raise RequestError("attention", name, "an attention kernel", _listing(check_device(device or default_device())))
    return name


def check(name: str, device: str, dtype: torch.dtype | None = None, *, compiled: bool = False) -> Backend:
    """The kernel of this name, if it runs on this device, in this dtype where that is known. Loads its library.

    Raises RequestError for one that is unknown or does not run here, MissingError for one that can be installed; both
    say which do, and what the others need.
    """
    backend = BACKENDS[NAMES.index(check_name(name, device))]
    if problem := _hardware(backend, device):
        raise RequestError("attention", name, f"usable on {device}", f"it needs {problem}; {_listing(device)}")
    if backend.compiled and not compiled:
        hint = f"PyTorch fuses it only where it is compiled, so give --compile; {_listing(device)}"
        raise RequestError("attention", name, "usable without compiling", hint)
    if backend.half and dtype is not None and dtype.itemsize != 2:
        shown = str(dtype).removeprefix("torch.")
        hint = f"give --dtype bfloat16, or an attention that computes in it; {_listing(device)}"
        raise RequestError("attention", name, f"usable in {shown}", hint)
    if backend.package is not None:
        _load(backend, backend.package, device)
    return backend


def report(device: str) -> Iterator[tuple[str, str]]:
    """Name and state of every kernel, for `gesso doctor`."""
    for backend in BACKENDS:
        needs = " and ".join(_needs(backend, device))
        yield backend.name, f"{backend.what}: {f'needs {needs}' if needs else _usable(backend)}"


def _usable(backend: Backend) -> str:
    if backend.name == DEFAULT:
        return "the default"
    return "usable with --compile" if backend.compiled else "usable"


def _load(backend: Backend, package: Package, device: str) -> None:
    """Import what a kernel comes from: one that was built for another PyTorch shows only then."""
    if not package.is_installed():
        raise MissingError(f'{package}, which attention "{backend.name}" needs ({_listing(device)}),', package.command)
    if find_spec("diffusers") is None:
        raise MissingError(f'diffusers, which attention "{backend.name}" is called through,', _DIFFUSERS)
    try:
        import_module(package.module)
    except (ImportError, OSError, RuntimeError) as error:
        hint = f"{package.name} is installed and does not load ({str(error).partition(chr(10))[0]}); {_listing(device)}"
        raise RequestError("attention", backend.name, "usable on this machine", hint) from error


def _listing(device: str) -> str:
    """What runs on this device, and what each of the others needs, on one line."""
    here = [
        f"{backend.name} (with --compile)" if backend.compiled else backend.name
        for backend in BACKENDS
        if not _needs(backend, device)
    ]
    wanting: dict[str, list[str]] = {}
    for backend in BACKENDS:
        for need in _needs(backend, device)[:1]:
            wanting.setdefault(need, []).append(backend.name)
    needs = (f"{', '.join(names)} {'needs' if len(names) == 1 else 'need'} {need}" for need, names in wanting.items())
    return "; ".join([f"{device} has {', '.join(here)}", *needs])


def _needs(backend: Backend, device: str) -> list[str]:
    """What is missing for a kernel on this device."""
    package = backend.package
    wanted = [_hardware(backend, device)]
    if package is not None and not package.is_installed():
        wanted.append(f"{package} ({package.command})")
    return [need for need in wanted if need]


def _hardware(backend: Backend, device: str) -> str:
    """What of a device is missing for a kernel, "" if nothing."""
    kind = kind_of(device)
    if backend.cards is None:
        return "the CPU or an NVIDIA GPU" if backend.compiled and kind not in (CPU, CUDA) else ""
    least, end = backend.cards
    wanted = f"an NVIDIA GPU of compute capability {least[0]}.{least[1]}{'' if end == _ANY else ' (Hopper)'}"
    if end == _ANY:
        wanted += " or more"
    if kind != CUDA:
        return wanted
    import torch

    return "" if least <= torch.cuda.get_device_capability(device) < end else wanted
