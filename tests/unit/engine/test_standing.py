"""Who outranks whom: priorities, deadlines that run out, and that no priority goes without a turn."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.engine.standing import AGEING, HIGHEST, HOPELESS, LOWEST, MARGIN, URGENT, Claim, Standing, standings, urgent


def order(*claims: Claim) -> list[int]:
    """Indices of the claims, those that go first in front."""
    found = standings(claims)
    return sorted(range(len(claims)), key=lambda index: found[index], reverse=True)


def hurried(left: float, work: float | None, priority: int = 0) -> Claim:
    return Claim(priority=priority, left=left, work=work)


def test_the_higher_priority_goes_first() -> None:
    assert order(Claim(priority=-3), Claim(priority=4), Claim(priority=0)) == [1, 2, 0]
    assert standings([Claim(priority=2), Claim(priority=2)]) == [Standing(2), Standing(2)]
    assert standings([]) == []


def test_a_deadline_counts_only_once_the_time_runs_out() -> None:
    assert urgent([hurried(10, 5)]) == []
    assert urgent([hurried(10, 10 / (1 + MARGIN))]) == [0]
    assert order(Claim(priority=HIGHEST), hurried(5, 5, priority=LOWEST)) == [1, 0]
    assert order(Claim(priority=1), hurried(50, 5)) == [0, 1]


def test_of_those_in_a_hurry_the_earliest_deadline_goes_first() -> None:
    assert urgent([hurried(6, 5), hurried(4, 3.5)]) == [1, 0]


def test_time_runs_out_for_those_in_front_too() -> None:
    """Each alone has plenty of time; one after the other they have not."""
    three = [hurried(12, 3), hurried(10, 3), hurried(11, 3)]
    assert urgent(three[:2]) == []
    assert urgent([hurried(8, 2), *three]) == [0, 2, 3, 1]


def test_one_that_can_hardly_be_met_holds_back_none_that_can() -> None:
    assert urgent([hurried(1, HOPELESS), hurried(10, 9)]) == [1, 0]
    assert urgent([hurried(1, HOPELESS), hurried(10, 5)]) == [0]


def test_one_that_cannot_be_met_by_far_counts_for_nothing() -> None:
    assert urgent([hurried(1, HOPELESS + 0.1)]) == []
    assert order(hurried(3, 10_000, priority=LOWEST), Claim(priority=HIGHEST)) == [1, 0]


def test_one_that_is_missed_counts_no_more() -> None:
    assert urgent([hurried(0, 1), hurried(-3, 1)]) == []
    assert standings([hurried(-3, 1, priority=2)]) == [Standing(2)]


def test_where_nothing_was_measured_the_deadline_alone_counts() -> None:
    assert urgent([hurried(100, None), hurried(50, None), hurried(60, 1)]) == [1, 0]


def test_those_below_get_a_turn_all_that_are_under_way_or_one_that_begins() -> None:
    above = Claim(priority=2, flying=True)
    early, late = Claim(priority=0, waited=2 * AGEING - 1), Claim(priority=0, waited=2 * AGEING)
    flying = Claim(priority=0, waited=2 * AGEING, flying=True)
    assert order(above, early, early) == [0, 1, 2]
    assert standings([above, late, late]) == [Standing(2), Standing(2, 2 * AGEING), Standing(0)]
    assert standings([above, late, flying]) == [Standing(2), Standing(0), Standing(2, 2 * AGEING)]


def test_one_begins_whose_own_model_has_none_under_way_and_stays_due_until_it_has() -> None:
    due = 2 * AGEING
    above = Claim(priority=2, flying=True)
    flying = Claim(priority=0, model=1, waited=due, flying=True)
    claims = [above, flying, *(Claim(priority=0, model=model, waited=due) for model in (1, 2, 2, 3))]
    lifted, ordinary = Standing(2, due), Standing(0)
    assert standings(claims) == [Standing(2), lifted, ordinary, lifted, ordinary, ordinary]
    after = [Claim(priority=0, model=model, waited=1, overdue=model == 3) for model in (2, 3)]
    assert standings([above, *after]) == [Standing(2), ordinary, lifted]
    assert standings([above, Claim(priority=0, model=3, waited=1, flying=True), after[1]])[2] == ordinary


def test_those_in_a_hurry_give_a_turn_too() -> None:
    waited = AGEING * (URGENT - 3)
    assert order(hurried(1, 1), Claim(priority=3, waited=waited)) == [1, 0]
    assert order(hurried(1, 1), Claim(priority=3, waited=waited - 1)) == [0, 1]


@settings(max_examples=15)
@given(
    priorities=st.lists(st.integers(LOWEST, HIGHEST), min_size=1, max_size=6),
    hurry=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_every_priority_steps_within_its_bound(priorities: list[int], hurry: list[bool]) -> None:
    """Requests that never end; each turn the highest of them steps."""
    last_turns = dict.fromkeys(priorities, 0)
    top = max(URGENT if urgently else priority for priority, urgently in zip(priorities, hurry, strict=False))
    patient = {priority for priority, urgently in zip(priorities, hurry, strict=False) if not urgently}
    for turn in range(1, AGEING * (URGENT - LOWEST) + 100):
        claims = [
            Claim(priority=priority, waited=turn - last_turns[priority], left=1 if urgently else None, work=0.9)
            for priority, urgently in zip(priorities, hurry, strict=False)
        ]
        found = standings(claims)
        first = max(range(len(found)), key=lambda index: found[index])
        if not found[first].hurry:
            last_turns[priorities[first]] = turn
        for priority in patient:
            bound = AGEING * (top - priority) + len(set(priorities))
            assert turn - last_turns[priority] <= bound
    shares = {priority: last_turns[priority] for priority in patient}
    assert all(shares.values())
