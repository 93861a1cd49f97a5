"""What a person sees while the work runs: lines and a bar on standard error. Results go to standard output.

On a terminal a bar moves; without one there is only a line a stage; quiet and JSON modes show results only.
"""

import sys
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

import typer

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class View:
    """A context that shows progress. `silent` shows results only, not even warnings."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_bar()

    def line(self, text: str) -> None:
        """One line for a stage that begins or ends."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            with suppress(OSError):  # what is only told stops no work
                typer.echo(text, err=True)

    def warn(self, text: str) -> None:
        """Something a person should know, though the work goes on."""
        self.line(f"warning: {text}")

    def result(self, text: str) -> None:
        """One line for standard output; a bar on the same terminal makes way for it."""
        if self._bar is None or not _is_terminal(sys.stdout):
            typer.echo(text)
            return
        self._bar.stop()
        typer.echo(text)
        self._bar.start()

    def begin_bar(self, text: str, total: int, unit: str = "pictures") -> None:
        """A stage of so many units begins."""
        if self._silent:
            return
        if not _is_terminal(sys.stderr):
            self.line(f"{text}: {total} {unit if total != 1 else unit.removesuffix('s')}")
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        counts = TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit)
        columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        # By default rich sends whatever is printed to the bar's own stream; results belong to standard output.
        self._bar = Bar(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task(text, total=total)
        self._bar.start()

    def move_bar(self, done: float) -> None:
        """So many units are done; the one under way may count as a part."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def end_bar(self) -> None:
        """The stage is over; the bar goes."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task = None, None


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at it; a stream that was closed before the program began is None."""
    return stream is not None and stream.isatty()
