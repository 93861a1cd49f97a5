"""What an engine does about safety: whose word counts, and that a checker that cannot answer lets nothing through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gesso.engine import Engine
from gesso.engine.safety import Guard
from gesso.errors import FileError, GessoError, MissingError, RejectedError, RequestError, RunError
from gesso.pipelines.contract import Output
from gesso.request import GenerationRequest
from gesso.settings import load_settings
from tests.tiny_hunyuan_video import tiny_pipeline as video_pipeline
from tests.tiny_infinity import tiny_pipeline
from tests.tiny_safety import write_checker

FLAG_ALL = {"concept_embeds_weights": torch.full((17,), -2.0)}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    return tmp_path


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    weights = write_checker(folder) / "model.safetensors"
    save_file({**load_file(weights), **tensors}, weights, {"format": "pt"})
    return folder


def engine() -> Engine:
    pipeline = tiny_pipeline()
    return Engine(device="cpu", load=lambda name, device, dtype: pipeline)


def ask(**fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": "a red star", "seed": 7, **fields})


@pytest.mark.parametrize(
    ("asked", "setting", "required", "mode"),
    [
        (None, "off", False, "off"),
        (None, "blur", False, "blur"),
        ("off", "reject", False, "off"),
        ("off", "blur", True, "blur"),
        ("blur", "reject", True, "reject"),
        ("reject", "blur", True, "reject"),
    ],
)
def test_whose_word_counts(asked: str | None, setting: str, required: bool, mode: str) -> None:
    guard = Guard(load_settings({"safety": setting, "safety_required": required}))
    plan = guard.settled(tiny_pipeline().plan(ask(safety=asked)))
    assert plan.request.safety == mode
    assert any("safety_required" in warning for warning in plan.warnings) == (asked not in (None, mode))


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(RequestError, match="safety_required True is not usable with safety off; set safety to blur"):
        Guard(load_settings({"safety_required": True}))
    with pytest.raises(RequestError, match="safety_labels"):
        Guard(load_settings({"safety_labels": "porn,,hentai"}))


@pytest.mark.parametrize(
    ("named", "kind", "words"),
    [
        ("", MissingError, "get it with: gesso models pull stable-diffusion-safety-checker"),
        ("flux-dev", RequestError, 'safety_model "flux-dev" is not a safety checker; it is a model of flux'),
        ("./nowhere", FileError, "setting safety_model.; name its folder, or: gesso models pull stable-diffusion"),
    ],
)
def test_without_a_checker_nothing_is_painted(
    monkeypatch: pytest.MonkeyPatch, named: str, kind: type[GessoError], words: str
) -> None:
    if named:
        monkeypatch.setenv("GESSO_SAFETY_MODEL", named)
    with engine() as own, pytest.raises(kind, match=words) as caught:
        own.run(ask(safety="blur"))
    assert "\n" not in str(caught.value)


def test_it_is_no_model_to_paint_with(own_home: Path) -> None:
    with Engine(device="cpu") as own, pytest.raises(RequestError, match="is not a model that paints"):
        own.run(ask(model="stable-diffusion-safety-checker"))


def test_all_rejected(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_SAFETY_MODEL", str(write(own_home / "checker", FLAG_ALL)))
    with engine() as own:
        with pytest.raises(RejectedError, match=r"rejected 2 of 2 pictures \(seeds 7, 8\); another seed"):
            own.run(ask(num_images=2, safety="reject"))
        with pytest.raises(RejectedError, match=r"rejected the picture \(seed 7\)"):
            own.run(ask(safety="reject"))
        assert own.run(ask())[0].metadata["safety"] == {"decision": "off"}


def test_an_answer_that_is_no_number_fails_the_request_and_no_other(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are decoded in one call."""
    folder = write(own_home / "checker", {"visual_projection.weight": torch.full((24, 32), torch.nan)})
    monkeypatch.setenv("GESSO_SAFETY_MODEL", str(folder))
    with engine() as own:
        broken, fine = own.submit(ask(num_images=2, safety="blur")), own.submit(ask(safety="off"))
        with pytest.raises(RunError, match="no number"):
            broken.result(60)
        assert len(fine.result(60)) == 1


@pytest.mark.parametrize(("flagged", "seen"), [(0, True), (1, False), (2, True), (3, False), (4, True)])
def test_every_so_many_frames_of_a_video_and_the_last(own_home: Path, flagged: int, seen: bool) -> None:
    from PIL import Image

    pipeline = video_pipeline()
    colours = ("red", "green", "blue", "yellow", "purple")
    frames = tuple(Image.new("RGB", (32, 32), colour) for colour in colours)
    folder = write_checker(own_home / "checker", [frames[flagged]], [*frames[:flagged], *frames[flagged + 1 :]])
    guard = Guard(load_settings({"safety": "reject", "safety_frames": 2, "safety_model": str(folder)}))
    guard.ready(ask(), "cpu")
    plan = guard.settled(pipeline.plan(ask()))
    output, said = guard.judged(plan, Output(image=frames[0], seed=7, frames=frames, fps=8), pipeline)
    assert (output is None) == seen == (said["decision"] == "rejected")
