"""How networks are made to run fast on this machine: the attention kernel, and whether their blocks are compiled.

Here: what an engine is told, checked before weights are read. Not here: the kernels (`engine/attention`), and who
puts it onto a network (`engine/loading/accelerate`). PyTorch is never imported at the top.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from gesso.devices import CUDA, kind_of
from gesso.engine import attention
from gesso.errors import MissingError, RequestError

if TYPE_CHECKING:
    import torch

_LEAST_CARD = (7, 0)  # of Triton


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """What is attached to the networks that are run at every step; text encoders and autoencoders stay as they are.

    Part of the identity of a network in memory: two engines that differ in it share none.

    Attributes:
        attention: one of `engine.attention.NAMES`.
        compile: whether each kind of block is compiled.

    Raises:
        RequestError: an attention of another name.
    """

    attention: str = attention.DEFAULT
    compile: bool = False

    def __post_init__(self) -> None:
        attention.check_name(self.attention)

    @property
    def record(self) -> dict[str, object]:
        """What pictures say of it."""
        return {"attention": self.attention, "compiled": self.compile}

    def check(self, device: str, dtype: torch.dtype | None = None) -> None:
        """Raise RequestError or MissingError for what does not run on this device, in this dtype where it is known."""
        attention.check(self.attention, device, dtype, compiled=self.compile)
        if self.compile:
            check_compiler(device)


PLAIN = Acceleration()


def check_compiler(device: str) -> None:
    """Raise MissingError without what PyTorch compiles with, RequestError for a device that it cannot compile for."""
    if kind_of(device) == CUDA:
        import torch

        found = torch.cuda.get_device_capability(device)
        if found < _LEAST_CARD:
            raise RequestError(
                "compile", True, f"usable on {device}", "it needs a GPU of compute capability 7.0 or more"
            )
        if find_spec("triton") is None:
            raise MissingError("triton, which --compile needs on a GPU,", "pip install triton")
        _check_program("CC", "gcc", "clang", "a C compiler, which --compile needs on a GPU,", "gcc")
    else:
        own = "clang++" if sys.platform == "darwin" else "g++"
        _check_program("CXX", own, own, "a C++ compiler, which --compile needs,", "g++")


def _check_program(variable: str, first: str, second: str, what: str, package: str) -> None:
    named = os.environ.get(variable)
    if any(shutil.which(name) for name in ([named] if named else [first, second])):
        return
    command = "xcode-select --install" if sys.platform == "darwin" else f"apt install {package}"
    if named:
        what, command = f"{variable}={named}, {what}", f"unset {variable}, or {command}"
    raise MissingError(what, command)
