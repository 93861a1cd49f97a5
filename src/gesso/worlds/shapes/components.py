"""Connected components and one-pixel thinning and thickening of masks, with numpy alone.

In here: `label_components`, `thinned`, `thickened`. Not in here: anything about shapes or colours. A small stand-in
for three functions of scipy.ndimage, which is no dependency of this project.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def label_components(mask: Mask) -> tuple[npt.NDArray[np.int32], int]:
    """Number the connected regions of a mask [H, W]; pixels that touch by a corner are connected.

    Returns labels int32 [H, W] (0 outside, then 1, 2, ... in reading order of each region's first pixel) and how many.
    """
    runs = _runs(mask)
    parents = list(range(len(runs)))
    above: list[int] = []
    current: list[int] = []
    row_before = -2
    for index, (row, start, stop) in enumerate(runs):
        if row != row_before:
            above = current if row == row_before + 1 else []
            current, row_before = [], row
        current.append(index)
        for other in above:
            if runs[other][1] <= stop and start <= runs[other][2]:
                _join(parents, index, other)
    labels = np.zeros(mask.shape, dtype=np.int32)
    numbers: dict[int, int] = {}
    for index, (row, start, stop) in enumerate(runs):
        root = _root(parents, index)
        labels[row, start:stop] = numbers.setdefault(root, len(numbers) + 1)
    return labels, len(numbers)


def thinned(mask: Mask) -> Mask:
    """Return the mask without the pixels that touch its outside by an edge; beyond the border is outside."""
    return ~thickened(~np.pad(mask, 1))[1:-1, 1:-1]


def thickened(mask: Mask) -> Mask:
    """Return the mask with the pixels that touch it by an edge."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _runs(mask: Mask) -> list[tuple[int, int, int]]:
    """Return (row, first column, column after the last) of each unbroken run of true pixels, in reading order."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    return list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index


def _join(parents: list[int], one: int, other: int) -> None:
    low, high = sorted((_root(parents, one), _root(parents, other)))
    parents[high] = low
