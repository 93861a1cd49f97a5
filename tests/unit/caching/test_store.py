"""What is kept: by run, branch and site; begun anew where shapes change; counted, and gone when it is freed."""

from __future__ import annotations

import logging

import pytest
import torch

from gesso.caching.parts import Part, RowDivision, SpanDivision
from gesso.caching.predictor import Rule
from gesso.caching.store import Store
from gesso.errors import RunError

RULE = Rule(order=1)


def test_a_ladder_begins_anew_with_another_shape_batch_or_dtype() -> None:
    store = Store()
    looks = [torch.ones(1, 4, 8), torch.ones(1, 5, 8), torch.ones(2, 5, 8), torch.ones(2, 5, 8, dtype=torch.bfloat16)]
    for number, feature in enumerate(looks):
        for step in (2 * number, 2 * number + 1):
            store.extend("run", "prompt", "site", feature, step, RULE)
            assert len(store.ladder("run", "prompt", "site").factors) == 1 + step % 2
    assert store.restarts == 3


def test_strict_shapes_are_an_error_and_keep_what_was() -> None:
    store = Store(strict=True)
    store.extend("run", "prompt", "site", torch.ones(1, 4), 0, RULE)
    with pytest.raises(RunError, match=r"strict_shapes: site was \(\(1, 4\)"):
        store.extend("run", "prompt", "site", torch.ones(1, 5), 1, RULE)
    assert store.predict("run", "prompt", "site", 1, RULE).shape == (1, 4)


def test_what_is_kept_is_a_copy_and_what_is_forecast_is_too() -> None:
    store, feature = Store(), torch.ones(2)
    store.extend("run", "prompt", "site", feature, 0, RULE)
    feature.zero_()
    store.predict("run", "prompt", "site", 1, RULE).zero_()
    assert store.predict("run", "prompt", "site", 1, RULE).tolist() == [1, 1]


def test_bytes_by_run_and_freeing() -> None:
    store = Store(dtype=torch.bfloat16)
    for run, branches in (("a", ("prompt",)), ("b", ("prompt", "negative"))):
        for branch in branches:
            store.extend(run, branch, "site", torch.ones(10), 0, RULE)
            store.put(run, branch, "age", torch.zeros(3, dtype=torch.int32))
    assert (store.bytes("a"), store.bytes("b"), store.bytes()) == (32, 64, 96)
    store.free("b")
    assert store.runs == ("a",) and store.bytes("b") == 0 and store.get("b", "prompt", "age") is None
    assert store.sites("b", "prompt") == () and store.runs == ("a",)
    store.clear()
    assert store.bytes() == 0
    with pytest.raises(KeyError):
        store.predict("a", "prompt", "site", 1, RULE)


def test_shapes_are_told_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gesso.caching.store"):
        Store().extend("run", "prompt", "quiet", torch.ones(3), 0, RULE)
        Store(debug=True).extend("run", "negative", "ff", torch.ones(3), 0, RULE)
    assert caplog.messages == ["step 0, negative, ff: (3,) torch.float32, order 0"]


def test_rows_and_spans_are_put_together_as_they_were() -> None:
    parts = (Part("a", "prompt", 0, 9), Part("b", "prompt", 3, 9))
    tensor = torch.randn(4, 3, 2)
    assert torch.equal(RowDivision(parts).join(RowDivision(parts).split(tensor)), tensor)
    with pytest.raises(RunError, match="3 rows, which 2 evaluations cannot share"):
        RowDivision(parts).split(tensor[:3])
    packed = torch.randn(1, 7, 2)
    division = SpanDivision(parts, spans=((4, 3), (0, 4)), rows=(1, 7))
    pieces = division.split(packed)
    assert [piece.shape[1] for piece in pieces] == [3, 4] and torch.equal(pieces[0], packed[:, 4:])
    assert torch.equal(division.join(pieces), packed)
    equal = SpanDivision(parts, spans=((0, 3), (3, 3)), rows=(2, 3))
    assert torch.equal(equal.join(equal.split(tensor[:2])), tensor[:2])
