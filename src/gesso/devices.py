"""What devices and dtypes are called: the one place where devices' names are written, which a test of the house holds.

Here: the names, and what a name says by itself. Not here: whether this machine has the device, its memory, waiting
for it (`engine/device`). PyTorch is not needed.
"""

import re

from gesso.errors import RequestError

CPU, CUDA, MPS = "cpu", "cuda", "mps"
META = "meta"  # shapes without numbers, to plan with
SPELLINGS = f"{CPU}, {CUDA}, {CUDA}:1, {MPS}"
# Of the large matmuls: as they are asked for, and as PyTorch calls them.
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def kind_of(device: object) -> str:
    """What kind of device a name, or a `torch.device`, means.

    Example:
        >>> kind_of("cuda:1")
        'cuda'
    """
    return str(device).partition(":")[0]


def numbered(kind: str, number: int) -> str:
    """The name of one of several devices of a kind."""
    return f"{kind}:{number}"


def check_name(device: str) -> str:
    """The name itself, if it is one. Raises RequestError.

    Example:
        >>> check_name("gpu")
        Traceback (most recent call last):
        ...
        gesso.errors.RequestError: device "gpu" is not a device's name; one of: cpu, cuda, cuda:1, mps
    """
    if not re.fullmatch(rf"{CPU}|{MPS}|{CUDA}(:\d{{1,3}})?", device):
        raise RequestError("device", device, "a device's name", f"one of: {SPELLINGS}")
    return device


def check_dtype(name: str) -> str:
    """PyTorch's name of a dtype, which `bf16` and the like are short for. Raises RequestError.

    Example:
        >>> check_dtype("bf16")
        'bfloat16'
    """
    if name not in _DTYPES:
        raise RequestError("dtype", name, "a dtype that is known", f"one of: {', '.join(_DTYPES)}")
    return _DTYPES[name]
