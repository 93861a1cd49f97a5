"""The key-value cache: what is stored, what is copied, and what is not."""

from __future__ import annotations

import torch

from gesso.models.infinity.cache import CacheRow, gather
from gesso.models.infinity.transformer import TextCondition
from tests.unit.models.small_infinity import BITS, SCHEDULE, TEXT_WIDTH, drawn, small_infinity, stepped

INPUTS = drawn(3, SCHEDULE.tokens - 1, BITS)
FEATURES = drawn(3, 5, TEXT_WIDTH, seed=1)


def _inputs(scale: int, rows: list[int]) -> torch.Tensor:
    first = SCHEDULE.starts[1]
    return INPUTS[rows, SCHEDULE.starts[scale] - first : SCHEDULE.starts[scale + 1] - first]


def test_rows_in_their_own_order_are_not_copied() -> None:
    cache = small_infinity().empty_cache(3, SCHEDULE)
    assert gather([CacheRow(cache, row) for row in range(3)], filled=7) is cache


def test_neighbours_are_seen_in_place() -> None:
    """When guidance ends, the conditional rows go on where they lie."""
    cache = small_infinity().empty_cache(4, SCHEDULE)
    part = gather([CacheRow(cache, 1), CacheRow(cache, 2)], filled=7)
    assert part.rows == 2
    part.slab.fill_(3)
    assert (cache.slab[:, :, 1:3] == 3).all()


def test_other_rows_are_copied_as_far_as_they_are_filled() -> None:
    network = small_infinity()
    one, other = network.empty_cache(2, SCHEDULE), network.empty_cache(2, SCHEDULE)
    one.slab.fill_(1)
    other.slab.fill_(2)
    for rows in ([CacheRow(one, 1), CacheRow(other, 0)], [CacheRow(one, 1), CacheRow(one, 0)]):
        joined = gather(rows, filled=4)
        assert joined is not one
        assert joined.rows == len(rows)
        for index, row in enumerate(rows):
            assert torch.equal(joined.slab[:, :, index, :, :4], row.cache.slab[:, :, row.row, :, :4])


@torch.no_grad()
def test_the_last_scale_is_not_stored() -> None:
    """There is no room for it; what the cache holds after it is what it held before."""
    network = small_infinity()
    text, cache = network.read_text(FEATURES), network.empty_cache(3, SCHEDULE)
    assert cache.slab.shape[4] == SCHEDULE.starts[-2]
    assert cache.bytes == 2 * 2 * 3 * SCHEDULE.starts[-2] * 32 * 4
    for scale in range(2):
        network.step(_inputs(scale, [0, 1, 2]) if scale else None, text, SCHEDULE, scale, cache)
    before = cache.slab.clone()
    network.step(_inputs(2, [0, 1, 2]), text, SCHEDULE, 2, cache)
    assert torch.equal(cache.slab, before)


@torch.no_grad()
def test_pictures_that_meet_half_way_come_out_as_if_alone() -> None:
    """Rows of two companies are joined between scales, one leaves, and the rest go on."""
    network = small_infinity()
    texts = [network.read_text(FEATURES[[row]]) for row in range(3)]
    expected = torch.cat([stepped(network, INPUTS[[row]], texts[row]) for row in range(3)])
    pair, single = network.empty_cache(2, SCHEDULE), network.empty_cache(1, SCHEDULE)
    network.step(None, network.read_text(FEATURES[:2]), SCHEDULE, 0, pair)
    network.step(None, texts[2], SCHEDULE, 0, single)
    order = [2, 0, 1]
    joined = gather([CacheRow(single, 0), CacheRow(pair, 0), CacheRow(pair, 1)], filled=SCHEDULE.starts[1])
    logits = network.step(_inputs(1, order), network.read_text(FEATURES[order]), SCHEDULE, 1, joined)
    middle = slice(SCHEDULE.starts[1], SCHEDULE.starts[2])
    torch.testing.assert_close(logits, expected[order, middle], atol=1e-5, rtol=0)
    left = [2, 1]
    rest = gather([CacheRow(joined, 0), CacheRow(joined, 2)], filled=SCHEDULE.starts[2])
    text: TextCondition = network.read_text(FEATURES[left])
    logits = network.step(_inputs(2, left), text, SCHEDULE, 2, rest)
    torch.testing.assert_close(logits, expected[left, SCHEDULE.starts[2] :], atol=1e-5, rtol=0)
