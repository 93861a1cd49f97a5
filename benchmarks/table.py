"""The table of all kept results, as Markdown.

python -m benchmarks.table
"""

from __future__ import annotations

import json

from benchmarks.measuring import RESULTS


def rows() -> list[str]:
    """One row a claim, newest file of each benchmark and machine last."""
    made = ["| claim | measured | floor, rival or wanted | ratio | hardware | date |", "|---|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            values = [line[name] for name in ("claim", "measured", "floor_or_rival", "ratio", "hardware", "date")]
            made.append("| " + " | ".join(str(value) for value in values) + " |")
    return made


if __name__ == "__main__":
    print("\n".join(rows()))
