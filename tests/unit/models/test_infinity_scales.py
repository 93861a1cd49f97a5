"""The scale tables against the published ones, and schedules of other kinds."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from gesso.models.infinity.scales import (
    SCALES_BY_PIXELS,
    TEMPLATES,
    ScaleSchedule,
    nearest_template,
    pixel_sizes,
    schedule,
    schedule_of_grids,
)

PUBLISHED = json.loads((Path(__file__).parents[2] / "golden/data/names/infinity_scales.json").read_text("utf-8"))


def test_every_published_template_is_here() -> None:
    assert set(TEMPLATES) == set(PUBLISHED)


@pytest.mark.parametrize("template", PUBLISHED)
@pytest.mark.parametrize("pixels", SCALES_BY_PIXELS)
def test_schedule(template: str, pixels: str) -> None:
    found, stated = schedule(template, pixels), PUBLISHED[template]["resolutions"][pixels]
    assert [list(grid) for grid in found.grids] == PUBLISHED[template]["grids"][: stated["scales"]]
    assert found.tokens == stated["tokens"] == found.starts[-1]
    assert list(found.rotary_grid) == PUBLISHED[template]["grids"][-1]
    assert pixel_sizes()[tuple(stated["pixel_hw"])] == found
    assert schedule_of_grids(found.grids) == found


def test_starts_are_where_scales_begin() -> None:
    found = schedule("0.571", "0.06M")
    assert [end - start for start, end in pairwise(found.starts)] == [h * w for h, w in found.grids]
    assert len(found.starts) == len(found) + 1


def test_patchified_latents_are_twice_as_fine() -> None:
    found = schedule("1.500", "0.06M")
    assert found.latent_grids(patchify=False) == found.grids
    assert found.latent_grids(patchify=True)[-1] == (2 * found.final_grid[0], 2 * found.final_grid[1])


def test_a_schedule_of_its_own_is_measured_on_its_own_grid() -> None:
    assert schedule_of_grids([(1, 1), (2, 2), (5, 7)]).rotary_grid == (5, 7)
    truncated = TEMPLATES["1.000"][:5]  # no published resolution has five scales
    assert schedule_of_grids(truncated).rotary_grid == truncated[-1]


@pytest.mark.parametrize(("ratio", "template"), [(1.0, "1.000"), (0.66, "0.666"), (1.4, "1.333"), (9.0, "3.000")])
def test_nearest_template(ratio: float, template: str) -> None:
    assert nearest_template(ratio) == template


@pytest.mark.parametrize("grids", [(), ((1, 1), (0, 2))])
def test_impossible_grids_are_refused(grids: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="at least one cell"):
        ScaleSchedule(grids, rotary_grid=(1, 1))
