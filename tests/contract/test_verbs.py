"""What `pipelines/contract` promises, put to every pipeline: the six verbs, seeds, and pictures in company."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gesso.errors import GessoError, RequestError
from gesso.pipelines.contract import Cost, Output, Plan, without_breaths
from gesso.request import GenerationRequest
from tests.contract.subjects import Subject
from tests.oracle import run_plainly

PROMPTS = ("a star", "two blue rings", "a red ring")
OPTIONAL = {
    "init_image",
    "init_strength",
    "mask",
    "identity",
    "refiner",
    "cache",
    "safety",
}  # the engine fills the last
SOME_VALUE: dict[str, object] = {
    "steps": 3,
    "scheduler": "euler",
    "guidance": 2.0,
    "clip_skip": 1,
    "guidance_layer": -1,
    "true_guidance": 2.0,
    "guidance_normalization": 1.0,
    "guidance_truncation": 0.5,
    "temperature": 0.5,
    "top_k": 2,
    "top_p": 0.5,
    "revisions": 1,
    "frames": 5,
    "fps": 8,
}


def begin(subject: Subject, *requests: GenerationRequest) -> list[Any]:
    """One state for each request's first picture, encoded together."""
    plans = [subject.pipeline.plan(request) for request in requests]
    conditionings = subject.pipeline.encode(plans)
    return [subject.pipeline.begin(plan, made, 0) for plan, made in zip(plans, conditionings, strict=True)]


def finish(subject: Subject, states: Sequence[Any]) -> list[Output]:
    """Step them, those of equal key together, those that are behind first; then decode them."""
    while waiting := [state for state in states if state.remaining]:
        first = max(waiting, key=lambda state: state.remaining / state.total)
        subject.pipeline.step([state for state in waiting if state.batch_key == first.batch_key])
    return [output for state in states for output in decoded(subject, state)]


def decoded(subject: Subject, *states: Any) -> list[Output]:
    return list(without_breaths(subject.pipeline.decode(states)))


def keeps(filled: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether all that was given stands in what was filled, within a field as well."""
    return all(
        keeps(filled[name], value) if isinstance(value, Mapping) else filled[name] == value
        for name, value in given.items()
    )


def plan_or_refusal(subject: Subject, request: GenerationRequest) -> Plan | RequestError:
    try:
        return subject.pipeline.plan(request)
    except RequestError as error:
        return error


# ---- plan -----------------------------------------------------------------------------------------------------------


def test_a_plan_has_no_blanks_but_what_the_model_has_no_use_for(subject: Subject) -> None:
    plan = subject.pipeline.plan(GenerationRequest(prompt="a red star"))
    for blank in {name for name, value in plan.request.model_dump().items() if value is None} - OPTIONAL:
        warned = subject.pipeline.plan(GenerationRequest.model_validate({"prompt": "a", blank: SOME_VALUE[blank]}))
        assert any(blank in sentence for sentence in warned.warnings), blank
    assert plan.steps >= 1
    assert plan.peak_bytes > 0
    assert plan.cost.flops > 0
    assert plan.cost.bytes > 0


def test_a_plan_keeps_what_was_given_and_is_its_own_plan(subject: Subject) -> None:
    request = subject.ask(num_images=3, deterministic=True)
    plan = subject.pipeline.plan(request)
    assert keeps(plan.request.model_dump(), request.model_dump(exclude_unset=True))
    assert subject.pipeline.plan(plan.request) == plan


def test_a_blank_seed_is_drawn_anew(subject: Subject) -> None:
    seeds = {subject.pipeline.plan(subject.ask(seed=None)).request.seed for _ in range(4)}
    assert None not in seeds
    assert len(seeds) > 1


def test_a_size_that_is_not_made_is_refused_with_the_nearest(subject: Subject) -> None:
    with pytest.raises(RequestError) as caught:
        subject.pipeline.plan(subject.ask(width=8, height=16384))
    assert caught.value.field in ("width", "height")
    assert caught.value.hint


def test_a_picture_that_is_not_there_is_refused_before_any_work(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(GessoError) as caught:
        subject.pipeline.plan(subject.ask(init_image=str(tmp_path / "absent.png")))
    assert "absent.png" in str(caught.value.as_dict())


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n and then nothing"])
def test_a_file_that_is_no_picture_is_refused_before_any_work(subject: Subject, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "unreadable.png"
    path.write_bytes(content)
    with pytest.raises(GessoError) as caught:
        subject.pipeline.plan(subject.ask(init_image=str(path)))
    assert "unreadable.png" in str(caught.value.as_dict())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_that_cannot_be_taken_are_refused(subject: Subject, steps: int) -> None:
    with pytest.raises(RequestError, match="1 to 1000") as caught:
        subject.ask(steps=steps)
    assert caught.value.field == "steps"


def test_an_unknown_scheduler_is_refused_or_has_no_use(subject: Subject) -> None:
    met = plan_or_refusal(subject, subject.ask(scheduler="clairvoyance"))
    if isinstance(met, Plan):
        assert any("scheduler" in warning for warning in met.warnings)
    else:
        assert (met.field, met.value) == ("scheduler", "clairvoyance")


def test_a_prompt_too_long_is_refused_or_cut_with_a_warning(subject: Subject) -> None:
    request = subject.ask("a " * 990 + "ring")
    met = plan_or_refusal(subject, request)
    if isinstance(met, Plan):
        assert any("cut" in warning for warning in met.warnings)
        assert not any("cut" in warning for warning in subject.pipeline.plan(subject.ask("a ring")).warnings)
        assert len(run_plainly(subject.pipeline, request)) == 1
    else:
        assert met.field == "prompt"
        assert met.hint


def test_warnings_are_sentences_on_one_line(subject: Subject) -> None:
    for warning in subject.pipeline.plan(subject.ask("an unheard-of ring", top_k=2, scheduler=None)).warnings:
        assert warning
        assert "\n" not in warning


# ---- encode, begin, step --------------------------------------------------------------------------------------------


def test_encode_makes_one_conditioning_a_plan(subject: Subject) -> None:
    plans = [subject.pipeline.plan(subject.ask(prompt)) for prompt in ("a star", "two blue rings", "a star")]
    assert len(subject.pipeline.encode(plans)) == 3


def test_a_state_counts_down_in_place(subject: Subject) -> None:
    plan = subject.pipeline.plan(subject.ask())
    (state,) = begin(subject, subject.ask())
    assert state.remaining == state.total == plan.steps
    spent = Cost(flops=0.0, bytes=0.0)
    for done in range(plan.steps):
        assert state.remaining == plan.steps - done
        assert state.cost.flops > 0 and state.cost.bytes > 0
        hash(state.batch_key)
        spent += state.cost
        assert subject.pipeline.step([state]) is None  # type: ignore[func-returns-value]
    assert state.remaining == 0
    assert spent.flops <= plan.cost.flops


def test_equal_requests_share_a_key_at_every_step(subject: Subject) -> None:
    one, two = begin(subject, subject.ask(), subject.ask("a blue ring", seed=8))
    while one.remaining:
        assert one.batch_key == two.batch_key
        subject.pipeline.step([one, two])
    assert two.remaining == 0


def test_a_preview_changes_nothing(subject: Subject) -> None:
    (state,) = begin(subject, subject.ask())
    while state.remaining:
        seen = subject.pipeline.preview(state)
        for picture in seen if isinstance(seen, Sequence) else [seen]:
            assert (picture.mode, min(picture.size) > 0) == ("RGB", True)
        subject.pipeline.step([state])
    subject.pipeline.preview(state)
    (output,) = decoded(subject, state)
    assert output.image.tobytes() == run_plainly(subject.pipeline, subject.ask())[0].image.tobytes()


# ---- decode ---------------------------------------------------------------------------------------------------------


def test_decode_yields_pictures_in_order(subject: Subject) -> None:
    requests = [subject.ask(seed=seed) for seed in (5, 9, 1)]
    plan = subject.pipeline.plan(requests[0])
    states = begin(subject, *requests)
    while states[0].remaining:
        subject.pipeline.step(states)
    outputs = subject.pipeline.decode(states)
    assert isinstance(outputs, Iterator)
    made = list(without_breaths(outputs))
    assert [output.seed for output in made] == [5, 9, 1]
    assert all(output.image.size == (plan.request.width, plan.request.height) for output in made)
    assert all(isinstance(output.image, Image.Image) and output.image.mode == "RGB" for output in made)
    again = decoded(subject, *states)
    assert [output.image.tobytes() for output in again] == [output.image.tobytes() for output in made]


def test_nothing_decodes_to_nothing(subject: Subject) -> None:
    assert list(subject.pipeline.decode([])) == []


# ---- seeds and company ----------------------------------------------------------------------------------------------


def test_alone_it_repeats_bit_for_bit(subject: Subject) -> None:
    first, second = (run_plainly(subject.pipeline, subject.ask(num_images=2)) for _ in range(2))
    assert [output.image.tobytes() for output in first] == [output.image.tobytes() for output in second]
    assert [output.seed for output in first] == [7, 8]
    assert first[0].image.tobytes() != first[1].image.tobytes()


def test_a_picture_of_a_set_is_the_picture_made_alone(subject: Subject) -> None:
    many = run_plainly(subject.pipeline, subject.ask(num_images=3))
    (alone,) = run_plainly(subject.pipeline, subject.ask(seed=9))
    assert many[2].image.tobytes() == alone.image.tobytes()


def test_the_prompt_matters(subject: Subject) -> None:
    star, ring = (run_plainly(subject.pipeline, subject.ask(prompt))[0] for prompt in ("a star", "two blue rings"))
    assert star.image.tobytes() != ring.image.tobytes()


def test_in_company_as_alone(subject: Subject) -> None:
    requests = [subject.ask(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    together = finish(subject, begin(subject, *requests))
    for output, request in zip(together, requests, strict=True):
        assert subject.close(output.image, run_plainly(subject.pipeline, request)[0].image)


def test_joining_and_leaving_between_steps(subject: Subject) -> None:
    """One starts alone, others catch up and join, one is left behind and catches up again."""
    requests = [subject.ask(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    states = begin(subject, *requests)
    subject.pipeline.step(states[:1])
    subject.pipeline.step(states[1:])
    if states[0].batch_key == states[1].batch_key:
        subject.pipeline.step([states[2], states[0]])
    outputs = finish(subject, states)
    for output, request in zip(outputs, requests, strict=True):
        assert subject.close(output.image, run_plainly(subject.pipeline, request)[0].image)


@pytest.mark.parametrize("seed", range(3))
def test_in_any_company_at_any_step(subject: Subject, seed: int) -> None:
    """Who steps with whom is left to chance, as far as keys allow; who takes steps takes a different number of them."""
    chance = random.Random(seed)
    requests = [subject.ask(prompt, seed=number, steps=2 + number) for number, prompt in enumerate(PROMPTS)]
    states = begin(subject, *requests)
    while waiting := [state for state in states if state.remaining]:
        first = chance.choice(waiting)
        others = [state for state in waiting if state is not first and state.batch_key == first.batch_key]
        company = [first, *chance.sample(others, chance.randint(0, len(others)))]
        before = [state.remaining for state in company]
        subject.pipeline.step(company)
        assert [state.remaining for state in company] == [count - 1 for count in before]
    for state, request in zip(states, requests, strict=True):
        (output,) = decoded(subject, state)
        assert subject.close(output.image, run_plainly(subject.pipeline, request)[0].image)
