"""The standard streams as a process finds them: closed ones, and an output that can take no more.

Here: what `main` does to them before anything is printed. Not here: what goes there (`view`), the end of a reader such
as `head` (`app`).
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gesso.errors import RunError


class Output(io.TextIOWrapper):
    """Standard output. What the system refuses to write becomes a RunError, but for the end of its reader."""

    def write(self, text: str, /) -> int:
        if text == "":  # how typer finds out that this is no stream of bytes; on a full disk even that would fail
            return 0
        with self._telling():
            return super().write(text)

    def flush(self) -> None:
        with self._telling():
            super().flush()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # Python tries again at its exit
            raise RunError(f"standard output: {(error.strerror or str(error)).lower()}") from error


def prepare() -> None:
    """Put an `Output` in the place of standard output, and something in that of streams that are closed.

    Else the next file that is opened would get the number of one of them, and what is meant for it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    if isinstance(plain := sys.stdout, io.TextIOWrapper):
        settings = {name: getattr(plain, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        sys.stdout = sys.__stdout__ = Output(plain.detach(), **settings)
