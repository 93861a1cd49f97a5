"""What a broken call means to the people whose pictures were in it: any exception becomes one ``GessoError``.

Here: telling apart our own errors, memory that ran out, and everything else; and letting go of the memory that a
traceback holds. Who is told, and what happens to the other requests, is the loop's business.
"""

from __future__ import annotations

import errno
import sys
import traceback

from gesso.engine.device import free_bytes
from gesso.errors import GessoError, OutOfMemoryError, RunError

# PyTorch has a class for a full CUDA device only; for main memory, MPS and cuBLAS it raises RuntimeError with these
# words, in whatever case.
_OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",  # the system's, of a file that safetensors cannot map
    "not enough memory",
    "out of memory",
    "status_alloc_failed",
)


def as_gesso_error(
    problem: BaseException, *, needed: int | None, device: str, modes: tuple[str, ...] = ()
) -> GessoError:
    """The error that the owners of a failed batch receive, the original as its cause.

    A traceback keeps every local variable of every frame alive, and with them the states and activations of the batch.
    So the tracebacks are cut off; that of an unexpected exception stays as text (a note, which Python prints).

    Args:
        problem: what was raised.
        needed: bytes the plan said it would take, where known.
        device: where it ran, for the bytes that are free.
        modes: settings that would need less, named in the message where memory ran out.
    """
    if isinstance(problem, GessoError):
        _cut_tracebacks(problem)
        return problem
    problem.add_note("".join(traceback.format_exception(problem)).rstrip())
    _cut_tracebacks(problem)
    if is_out_of_memory(problem):
        error: GessoError = OutOfMemoryError(needed, free_bytes(device), modes)
    else:
        error = RunError(f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__)
    error.__cause__ = problem
    return error


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether memory ran out: Python's, the device's, or PyTorch's own for tensors in main memory."""
    if isinstance(problem, MemoryError | OutOfMemoryError):
        return True
    if isinstance(problem, OSError):  # of a file that cannot be mapped
        return problem.errno == errno.ENOMEM
    torch = sys.modules.get("torch")  # If nobody loaded it, nobody raised its error.
    if torch is not None and isinstance(problem, torch.OutOfMemoryError):
        return True
    said = str(problem).lower() if isinstance(problem, RuntimeError) else ""
    return any(words in said for words in _OUT_OF_MEMORY_WORDS)


def _cut_tracebacks(problem: BaseException) -> None:
    """Of the exception, and of every exception that led to it."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [problem]
    while chain:
        link = chain.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        link.__traceback__ = None
        chain += [link.__cause__, link.__context__]
