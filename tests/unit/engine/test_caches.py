"""Step caches before the first step: what is refused, warned of and foreseen; and what stays on a network when."""

from __future__ import annotations

from collections import deque

import pytest

from gesso.engine import Engine, caches
from gesso.engine.caches import Caches, computed_steps
from gesso.engine.flight import Model, Run
from gesso.engine.job import Job
from gesso.engine.places import Places
from gesso.engine.planning import planned
from gesso.errors import OutOfMemoryError, RequestError
from gesso.pipelines.flux_state import FluxDefaults
from gesso.request import GenerationRequest
from tests import tiny_z_image
from tests.tiny_flux import tiny_pipeline
from tests.unit.engine.turns import Turns

DISTILLED = FluxDefaults(width=64, height=64, steps=4, guidance=0.0, distilled=True)


def ask(cache: str, steps: int = 20) -> GenerationRequest:
    return GenerationRequest(prompt="a red star", seed=7, steps=steps, cache=cache)  # pyright: ignore


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("taylorseer:mask=110", r"cache\.mask 3 is not one value for each of 20 steps"),
        ("taylorseer:order=3,interval=40", r"cache\.order 3 is not at most 0"),
        ("residual:front_blocks=3", r"cache\.front_blocks 3 is not below the 3 blocks"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(cache: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        planned(tiny_pipeline(), ask(cache))


def test_scores_need_an_attention_that_shows_them() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(RequestError, match=r"cache\.score .* flash does not show its scores; take score=random"):
        planned(pipeline, ask("toca"), attention="flash")
    planned(pipeline, ask("toca:score=norm"), attention="flash")
    planned(pipeline, ask("toca"), attention="math")


def test_what_is_lost_is_said() -> None:
    (warning,) = planned(tiny_pipeline(DISTILLED, guidance_embeds=False), ask("lite", steps=4)).warnings
    assert "distilled" in warning and "at most 1 of 4" in warning
    (warning,) = planned(tiny_pipeline(), ask("lite:warmup=20")).warnings
    assert warning.startswith("cache has no effect: all 20 steps are computed")
    assert not planned(tiny_pipeline(), ask("lite")).warnings
    (warning,) = planned(tiny_pipeline(), ask("first_block:max_skips=3")).warnings
    assert warning.endswith("first: gesso calibrate infinity-nano --steps 20 --cache first_block:max_skips=3")


def test_blanks_are_filled_so_that_the_same_comes_out() -> None:
    plan = planned(tiny_pipeline(), ask("lite", steps=20))
    assert plan.request.cache is not None and plan.request.cache.order == 2
    short = planned(tiny_pipeline(), ask("lite", steps=10))  # which never reaches its own order
    assert short.request.cache is not None and short.request.cache.order == 1
    assert planned(tiny_pipeline(), short.request) == short
    assert computed_steps(planned(tiny_pipeline(), ask("lite:interval=4,warmup=1"))) == 5


def test_bytes_are_foreseen_where_they_will_be() -> None:
    pipeline = tiny_pipeline()
    plain, cached, away = (
        planned(pipeline, request)
        for request in (ask("lite").model_copy(update={"cache": None}), ask("taylorseer"), ask("taylorseer:offload=1"))
    )
    assert cached.cache_bytes == away.cache_bytes > 0 == plain.cache_bytes
    assert cached.activations["step"] - plain.activations["step"] == cached.cache_bytes
    assert away.peak_bytes == plain.peak_bytes <= cached.peak_bytes


def test_a_state_that_has_no_room_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "free_bytes", lambda device: 1000)
    with Engine(device="cpu", load=lambda name, device, dtype: tiny_pipeline()) as engine:
        job = engine.submit(ask("taylorseer"))
        with pytest.raises(OutOfMemoryError, match="try --cache with granularity=trunk") as caught:
            job.result(timeout=60)
        assert engine.run(ask("lite").model_copy(update={"cache": None}))
    assert caught.value.free == 1000


def test_one_that_nobody_uses_stays_until_another_is_wanted() -> None:
    pipeline = tiny_pipeline()
    found = Caches(pipeline)
    plans = [planned(pipeline, ask(cache)) for cache in ("lite", "taylorseer", "residual")]
    first = found.begin(plans[0])
    second = found.begin(plans[1])
    assert first is not None and second is not None and first.attached is not second.attached
    first.end()
    first.end()
    again = found.begin(plans[0])
    assert again is not None and again.attached is first.attached
    second.end()
    found.begin(plans[2])
    assert len(found._shared) == 2
    found.detach()
    assert not any(hasattr(module, "_diffusers_hook") for module in pipeline.transformer.modules())


def test_a_forecast_step_is_charged_the_share_of_a_full_one_that_it_took() -> None:
    pipeline = tiny_pipeline()
    cached = Caches(pipeline).begin(planned(pipeline, ask("lite:interval=4,warmup=1", steps=8)))
    assert cached is not None
    charges: list[int] = []
    assert cached.outlook(0, 8) == 1  # nothing has been seen
    for step, seconds in enumerate((2.0, 0.5, 0.5, 0.5, 2.0)):
        cached.decision(step, 8)
        with caches.calling([cached]):
            pass
        charges.append(cached.charged(1000, seconds))
    assert charges == [1000, 250, 250, 250, 1000]
    assert cached.outlook(5, 8) == pytest.approx(0.25) and cached.outlook(0, 8) == pytest.approx(1 - 0.75 * 6 / 8)
    cached.end()


def test_a_branch_that_begins_late_is_nobody_elses() -> None:
    """Z-Image has all branches of all pictures in one call, which is computed as a whole."""
    ways: tuple[tuple[float, ...], ...] = ((5.0,) * 8, (1.0,) * 8, (1.0,) * 5 + (5.0,) * 3)
    turns = Turns(tiny_z_image.tiny_pipeline())
    one = ask("lite:interval=4,warmup=1", steps=8).model_copy(update={"model": "0"})
    jobs = [turns.submit(one.model_copy(update={"guidance": way})) for way in ways]
    turns.finish(*jobs)
    records = [job.result(timeout=1)[0].metadata["cache"] for job in jobs]
    assert [record["steps"] for record in records] == ["FTTTFTTT", "FTTTFTTT", "FTTTFFTT"]  # type: ignore[index]


def test_a_deadline_counts_on_the_cache_of_what_has_not_begun() -> None:
    pipeline = tiny_pipeline()
    model = Model(pipeline=pipeline, number=0, places=Places(most=1))
    plan = planned(pipeline, ask("lite:interval=4,warmup=1", steps=8))
    job = Job(plan.request, preview_every=0, when_cancelled=lambda job: None, deadline=60.0)
    run = Run(job=job, model=model, plan=plan, waiting=deque([0, 1]))
    model.pace.saw(4.0, int(plan.cost.flops))
    assert model.claim(run, job.submitted, 0).work == pytest.approx(2 * 4.0)  # nothing has been seen of its cache
    cached = model.caches.begin(plan)
    assert cached is not None
    for step, seconds in enumerate((2.0, 0.5)):
        cached.decision(step, 8)
        with caches.calling([cached]):
            pass
        cached.charged(1000, seconds)
    assert model.claim(run, job.submitted, 0).work == pytest.approx(2 * 4.0 * (1 - 0.75 * 6 / 8), rel=1e-3)


def test_the_plan_is_worked_off_whatever_is_charged() -> None:
    turns = Turns(tiny_pipeline())
    job = turns.submit(ask("lite:interval=10,warmup=1", steps=10).model_copy(update={"model": "0"}))
    turns.turn(9)
    (row,) = turns.loop._fleet.models[0].rows
    step = int(row.state.cost.flops)
    assert row.spent == row.steps_done * step > 0
    assert step <= row.run.used <= row.spent
    turns.finish(job)
