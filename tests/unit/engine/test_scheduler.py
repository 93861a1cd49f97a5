"""The scheduler's pure functions: what each policy prefers, and that under none anybody starves.

Shares and priorities over many turns are in `test_sharing`, in the real loop.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.engine.scheduler import (
    PATIENCE,
    POLICIES,
    Group,
    Policy,
    Rank,
    choose_group,
    choose_rows,
    lets_others_begin,
    may_join,
)
from gesso.engine.standing import Standing


def group(arrival: int, behind: float, waited: int = 0, solo: bool = False) -> Group:
    return Group(arrival=arrival, waited=waited, behind=behind, solo=solo)


def test_laggards_prefers_those_behind_then_those_begun_first() -> None:
    assert choose_group([group(0, 0.5), group(1, 1.0), group(2, 1.0)], "laggards") == 1


def test_oldest_prefers_those_begun_first() -> None:
    assert choose_group([group(3, 1.0), group(1, 0.1), group(2, 0.5)], "oldest") == 1


def fair(arrival: int, model: int, account: int, work: int, due: int = 0) -> Group:
    return Group(arrival=arrival, waited=0, behind=1.0, model=model, account=account, work=work, due=due)


def test_fair_prefers_what_would_be_done_first_counted_from_what_its_model_used() -> None:
    assert choose_group([fair(0, 0, 10, 50), fair(1, 1, 10, 4)], "fair") == 1
    assert choose_group([fair(0, 0, 10, 50), fair(1, 1, 60, 4)], "fair") == 0
    assert choose_group([fair(0, 0, 10, 50), fair(1, 1, 20, 40)], "fair") == 0


def test_fair_chooses_within_a_model_by_request() -> None:
    groups = [fair(0, 0, 10, 50, due=30), fair(1, 0, 10, 5, due=20), fair(2, 1, 10, 20, due=90)]
    assert choose_group(groups, "fair") == 1
    assert choose_group([groups[0], fair(1, 0, 10, 99, due=20), groups[2]], "fair") == 2


@given(policy=st.sampled_from(POLICIES), levels=st.lists(st.integers(-10, 10), min_size=1, max_size=9))
def test_standing_comes_before_every_policy(policy: Policy, levels: list[int]) -> None:
    groups = [
        Group(arrival=place, waited=99 * place, behind=1 / (1 + place), standing=Standing(level))
        for place, level in enumerate(levels)
    ]
    assert levels[choose_group(groups, policy)] == max(levels)


def rank(level: int = 0, share: int = 0) -> Rank:
    return Rank(Standing(level), share)


def test_a_picture_begins_in_a_free_place_or_in_that_of_one_it_outranks() -> None:
    assert may_join(rank(-5), [rank()], 2)
    assert not may_join(rank(), [rank(), rank()], 2)
    assert may_join(rank(1), [rank(), rank()], 2)
    assert not may_join(rank(1), [rank(1), rank(1), rank()], 2)
    assert not may_join(rank(9), [rank(), rank(), rank(1), rank(1)], 2)
    assert may_join(rank(), [rank(), rank(share=-1)], 2)


def test_those_who_rank_highest_step_and_of_equals_those_begun_first() -> None:
    assert choose_rows([rank(), rank(2), rank(share=-1), rank(), rank(1)], 3) == [0, 1, 4]
    assert choose_rows([rank()] * 3, 5) == [0, 1, 2]


def test_patience_ends() -> None:
    groups = [group(0, 1.0), group(1, 0.1, waited=PATIENCE), group(2, 0.2, waited=PATIENCE + 1)]
    assert choose_group(groups, "laggards") == 2


def test_of_pictures_that_never_merge_only_the_first_competes() -> None:
    assert choose_group([group(0, 0.2, solo=True), group(1, 1.0, solo=True)], "laggards") == 0
    assert choose_group([group(0, 0.2, solo=True), group(1, 1.0, solo=True), group(2, 0.5)], "laggards") == 2


def test_a_usual_request_begins_whole_and_a_large_one_takes_turns() -> None:
    assert [begun for begun in range(1, 13) if lets_others_begin(begun)] == [4, 8, 12]


@settings(max_examples=60)
@given(
    policy=st.sampled_from(POLICIES),
    steps=st.integers(1, 12),
    room=st.integers(1, 12),
    kinds=st.integers(1, 4),
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=300),
)
def test_nobody_starves_under_a_stream_of_newcomers(
    policy: Policy, steps: int, room: int, kinds: int, arrivals: list[tuple[int, bool]]
) -> None:
    """A simulated loop that is always full: each place that falls free goes to a newcomer of some kind."""
    # A picture: [place in order of arrival, kind, solo, steps left, turn of its last step]
    flying: list[list[int]] = []
    newcomers = iter(enumerate(arrivals))
    turn = 0
    while True:
        turn += 1
        while len(flying) < room and (newcomer := next(newcomers, None)):
            arrival, (kind, solo) = newcomer
            flying.append([arrival, kind % kinds, int(solo), steps, turn])
        if not flying:
            return
        together: dict[tuple[int, int, int], list[list[int]]] = {}
        for picture in flying:
            key = (picture[1], picture[3], picture[0] if picture[2] else -1)
            together.setdefault(key, []).append(picture)
        groups = list(together.values())
        described = [
            Group(
                arrival=min(picture[0] for picture in rows),
                waited=max(turn - picture[4] for picture in rows),
                behind=rows[0][3] / steps,
                solo=bool(rows[0][2]),
            )
            for rows in groups
        ]
        for picture in groups[choose_group(described, policy, patience=5)]:
            picture[3] -= 1
            picture[4] = turn
        longest_wait = 5 + room if policy == "laggards" else steps * room
        assert all(turn - picture[4] <= longest_wait for picture in flying)
        flying = [picture for picture in flying if picture[3]]
