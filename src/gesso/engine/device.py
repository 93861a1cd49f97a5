"""The little that the engine has to know of a device: which is taken by default, what is free, when its work is over.

PyTorch is never imported at the top: before the first model is loaded there is nothing here that needs it.
"""

from __future__ import annotations

import gc
import os
import sys


def default_device() -> str:
    """``cuda`` if PyTorch sees one, else ``cpu``. MPS is taken only when asked for, being untested. Imports PyTorch."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def settle(device: str) -> None:
    """Wait until the device has done what it was given.

    So that the seconds of a step are its own, its errors reach the requests that caused them, and a cancellation does
    not wait behind steps that were queued ahead.
    """
    torch = sys.modules.get("torch")
    if torch is None or device == "cpu":
        return
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def release_memory() -> None:
    """Give back what nobody uses: cycles first, then the device's cache of free blocks."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_bytes(device: str) -> int | None:
    """Bytes free on the device now; None where the system does not say, or cannot, after an error that stays."""
    if device.startswith("cuda"):
        torch = sys.modules.get("torch")
        try:
            return None if torch is None else int(torch.cuda.mem_get_info(device)[0])
        except Exception:  # Asked while another error is told, which counts more than this one.
            return None
    if device != "cpu" or "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware. False where PyTorch is too old to say."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
