"""`python -m tests.golden DIR`: checks every golden below DIR and prints a table. What is checked: `infinity_*`.

Exit status: 0 nothing failed, 1 something did, 2 no golden was recognised.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.golden.runner import Row, run

_HEADINGS = ("file", "kind", "largest error", "tolerance", "ok")


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Checks goldens against the product.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="searched for side-cars at any depth")
    parser.add_argument("-v", "--verbose", action="store_true", help="also say what was compared in each golden")
    options = parser.parse_args(arguments)
    # Numbers were recorded where MKL takes its plain kernels. Their exp() differs from others' in the last bit, which
    # time embeddings multiply by 1000. MKL reads this at its first call.
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
    folder: Path = options.folder
    if not folder.is_dir():
        print(f"{folder}: no such folder", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for row in run(folder):
        rows.append(row)
        print(f"{len(rows)} {row.file}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    if not rows:
        print(f"{folder}: no golden was recognised", file=sys.stderr)
        return 2
    _print_table(rows, options.verbose)
    failures = sum(row.outcome == "no" for row in rows)
    waiting = sum(row.outcome == "not yet" for row in rows)
    print(f"\n{len(rows)} goldens: {len(rows) - failures - waiting} ok, {failures} failed, {waiting} not yet")
    return 1 if failures else 0


def _print_table(rows: list[Row], verbose: bool) -> None:
    cells = [(row.file, row.kind, _number(row.error), _number(row.tolerance), row.outcome) for row in rows]
    widths = [max(len(line[column]) for line in [_HEADINGS, *cells]) for column in range(len(_HEADINGS))]
    notes = ["", *(row.note if verbose or row.outcome != "yes" else "" for row in rows)]
    for line, note in zip([_HEADINGS, *cells], notes, strict=True):
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), note]).rstrip())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


if __name__ == "__main__":
    sys.exit(main())
