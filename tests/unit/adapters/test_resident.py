"""Adapters in memory: never more bytes than allowed, what is in use stays, one read serves all who wait."""

from __future__ import annotations

import random
import threading
import time

import pytest

from gesso.adapters.resident import Resident
from gesso.errors import CancelledError, OutOfMemoryError


def hold(resident: Resident[bytes], name: str, size: int) -> None:
    with resident.held(name, size, lambda: bytes(size)) as value:
        assert len(value) == size


def test_the_one_unused_for_longest_goes_first() -> None:
    resident = Resident[bytes](limit=100, size_of=len)
    for name in "abab":
        hold(resident, name, 40)
    hold(resident, "a", 40)
    hold(resident, "c", 50)
    assert resident.names() == ["a", "c"]
    counted = resident.counters()
    assert (counted.hits, counted.misses, counted.evictions, counted.bytes, counted.pinned) == (3, 3, 1, 90, 0)
    assert resident.forget("a")
    assert resident.counters().bytes == 50


def test_what_is_in_use_stays_and_what_does_not_fit_beside_it_is_refused() -> None:
    resident = Resident[bytes](limit=100, size_of=len)
    hold(resident, "idle", 30)
    with resident.held("used", 60, lambda: bytes(60)):
        with pytest.raises(OutOfMemoryError):
            hold(resident, "large", 50)
        assert resident.names() == ["idle", "used"]  # nothing goes where that would not be enough
        hold(resident, "small", 40)
        assert resident.names() == ["used", "small"]
        assert not resident.forget("used")
        # One that turns out larger than expected is let in only if it fits, too.
        with pytest.raises(OutOfMemoryError), resident.held("liar", 1, lambda: bytes(80)):
            pass
        assert resident.counters().bytes <= 100
    hold(resident, "large", 100)
    with pytest.raises(OutOfMemoryError):
        hold(resident, "larger", 101)


def test_who_is_let_go_is_told_of_before_there_is_room() -> None:
    gone: list[bytes] = []
    resident = Resident[bytes](limit=100, size_of=len, leaving=gone.append)
    hold(resident, "a", 60)

    def read() -> bytes:
        assert [len(each) for each in gone] == [60]
        return bytes(50)

    with resident.held("b", 50, read):
        pass
    assert resident.forget("b") and len(gone) == 2


def test_a_failed_read_leaves_nothing() -> None:
    resident = Resident[bytes](limit=100, size_of=len)

    def fail() -> bytes:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), resident.held("a", 10, fail):
        pass
    assert (resident.names(), resident.counters().bytes, resident.counters().failures) == ([], 0, 1)
    hold(resident, "a", 10)


def test_one_read_serves_all_and_waiting_can_be_cancelled() -> None:
    resident = Resident[bytes](limit=100, size_of=len)
    reads: list[str] = []
    go, cancelled = threading.Event(), threading.Event()

    def read() -> bytes:
        reads.append("")
        go.wait(10)
        return bytes(10)

    def work() -> None:
        with resident.held("a", 10, read):
            pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not reads:
        time.sleep(0.01)
    cancelled.set()
    with pytest.raises(CancelledError), resident.held("a", 10, read, cancelled=cancelled):
        pass
    go.set()
    for thread in threads:
        thread.join()
    assert (len(reads), resident.counters().hits, resident.counters().pinned) == (1, 3, 0)


def test_the_bound_holds_whatever_happens() -> None:
    resident = Resident[bytes](limit=200, size_of=len)
    most: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            size = chance.randrange(1, 60)
            with resident.held(f"{size}", size, lambda size=size: bytes(size)):
                most.append(resident.counters().bytes)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 600
    assert max(most) <= 200
    assert resident.counters().pinned == 0
