"""The little that the engine has to know of a device: which is taken by default, what is free, when its work is over.

PyTorch is never imported at the top: before the first model is loaded there is nothing here that needs it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path

from gesso.devices import CPU, CUDA, MPS, check_name, kind_of, numbered
from gesso.errors import RequestError


def default_device() -> str:
    """``cuda`` if PyTorch sees one, else ``cpu``. MPS is taken only when asked for, being untested. Imports PyTorch."""
    import torch

    return CUDA if torch.cuda.is_available() else CPU


def present_devices() -> list[str]:
    """Names of what this machine can compute on, the CPU first. Imports PyTorch."""
    import torch

    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [CPU, *(numbered(CUDA, card) for card in cards), *([MPS] if torch.backends.mps.is_available() else [])]


def check_device(device: str) -> str:
    """The name itself, if it is a device of this machine. Raises RequestError. Imports PyTorch."""
    check_name(device)
    present = present_devices()
    if device not in present and not any(kind_of(one) == device for one in present):
        import torch

        hint = f"there {'is' if len(present) == 1 else 'are'} {', '.join(present)}"
        if kind_of(device) == CUDA and not torch.version.cuda and not torch.version.hip:
            hint += "; this PyTorch was built without CUDA"
        raise RequestError("device", device, "a device of this machine", hint)
    return device


def settle(device: str) -> None:
    """Wait until the device has done what it was given.

    So that the seconds of a step are its own, its errors reach the requests that caused them, and a cancellation does
    not wait behind steps that were queued ahead.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if kind_of(device) == CUDA:
        torch.cuda.synchronize(device)
    elif kind_of(device) == MPS:
        torch.mps.synchronize()


def release_memory() -> None:
    """Give back what nobody uses: cycles first, then the device's cache of free blocks."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_bytes(device: str) -> int | None:
    """Bytes free on the device now; None where the system does not say, or cannot, after an error that stays."""
    if kind_of(device) == CUDA:
        torch = sys.modules.get("torch")
        try:
            return None if torch is None else int(torch.cuda.mem_get_info(device)[0])
        except Exception:  # Asked while another error is told, which counts more than this one.
            return None
    return _free_host_bytes() if kind_of(device) in (CPU, MPS) else None


def _free_host_bytes() -> int | None:
    """Memory that can be had without swapping, in the machine, the container and the process (`ulimit -v`).

    What only caches files counts as free.
    """
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        files = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        found.append(max(0, most - int((group / "memory.current").read_text(encoding="ascii")) + files))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # there is none on Windows

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        if most != resource.RLIM_INFINITY:
            found.append(max(0, most - pages * resource.getpagesize()))
    if not found and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware. False where PyTorch is too old to say."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
