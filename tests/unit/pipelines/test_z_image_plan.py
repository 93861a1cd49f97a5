"""What Z-Image's `plan` fills in, refuses, warns of and counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gesso.engine.loading import load_pipeline
from gesso.errors import FileError, RequestError
from gesso.pipelines.z_image import ZImagePipeline
from gesso.pipelines.z_image_state import BASE, EDIT, TURBO
from gesso.request import GenerationRequest
from gesso.sampling.flow import FlowSchedule
from tests.tiny_z_image import DEFAULTS, tiny_pipeline, tiny_text


@pytest.fixture(scope="module")
def pipeline() -> ZImagePipeline:
    return tiny_pipeline()


def ask(**fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": "a red star", **fields})


def _refusal(pipeline: ZImagePipeline, **fields: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        pipeline.plan(ask(**fields))
    return caught.value


def test_blanks_are_the_models() -> None:
    for kind, steps, guidance in ((TURBO, 8, 0.0), (BASE, 50, 5.0), (EDIT, 50, 5.0)):
        filled = tiny_pipeline(replace(kind, width=32, height=48)).plan(ask()).request
        assert (filled.steps, filled.guidance, filled.scheduler) == (steps, guidance, "euler")
        assert (filled.width, filled.height) == (32, 48)
        assert (filled.guidance_normalization, filled.guidance_truncation) == (0.0, 1.0)


def test_a_plan_is_its_own_plan(pipeline: ZImagePipeline) -> None:
    plan = pipeline.plan(ask(seed=0, guidance=0.0, negative="blue", steps=1))
    assert pipeline.plan(plan.request) == plan
    assert (plan.steps, plan.request.seed) == (1, 0)


@pytest.mark.parametrize(("width", "nearest"), [(40, "32 or 48"), (8, "16"), (255, "240 or 256")])
def test_sizes_are_whole_tokens(pipeline: ZImagePipeline, width: int, nearest: str) -> None:
    for field in ("width", "height"):
        error = _refusal(pipeline, **{field: width})
        assert (error.field, error.allowed, error.hint) == (field, "a multiple of 16 for tiny", f"nearest: {nearest}")


def test_sizes_end_where_positions_do(pipeline: ZImagePipeline) -> None:
    error = _refusal(pipeline, height=272)
    assert (error.field, error.allowed, error.hint) == ("height", "at most 256 for tiny", "nearest: 256")
    assert pipeline.plan(ask(width=256)).request.width == 256


def test_schedulers_are_named(pipeline: ZImagePipeline) -> None:
    error = _refusal(pipeline, scheduler="clairvoyance")
    assert (error.field, error.value, error.hint) == ("scheduler", "clairvoyance", "there is: euler, euler-stochastic")


def test_fresh_noise_cannot_be_forecast(pipeline: ZImagePipeline) -> None:
    error = _refusal(pipeline, scheduler="euler-stochastic", cache="lite")
    assert (error.field, error.value) == ("cache", "lite")
    assert error.hint == "each step draws noise that no cache forecasts; take scheduler=euler"
    assert _warned(pipeline, scheduler="euler-stochastic") == _warned(pipeline, cache="lite") == ""


@pytest.mark.parametrize(("asked", "painted"), [(None, "euler"), ("euler", "euler")])
def test_a_cache_has_a_models_own_noise_give_way(asked: str | None, painted: str) -> None:
    nano = load_pipeline("z-image-nano", "cpu")
    assert nano.plan(ask()).request.scheduler == "euler-stochastic"
    plan = nano.plan(ask(cache="lite", **({"scheduler": asked} if asked else {})))
    assert plan.request.scheduler == painted
    assert [warning.split(",")[0] for warning in plan.warnings if "scheduler" in warning] == (
        [] if asked else ["euler paints in place of euler-stochastic"]
    )
    assert nano.plan(plan.request).request == plan.request


def test_lists_have_one_value_a_step(pipeline: ZImagePipeline, tmp_path: Path) -> None:
    assert "4 values" in _refusal(pipeline, guidance=(1.0, 2.0)).hint
    Image.new("RGB", (8, 8)).save(tmp_path / "given.png")
    given = {"init_image": str(tmp_path / "given.png"), "init_strength": 0.5}
    assert pipeline.plan(ask(guidance=(1.0, 2.0), **given)).steps == 2


@pytest.mark.parametrize("strength", [0.0, 1e-300])
def test_nothing_to_paint_is_refused(pipeline: ZImagePipeline, tmp_path: Path, strength: float) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "given.png")
    error = _refusal(pipeline, init_image=str(tmp_path / "given.png"), init_strength=strength)
    assert (error.field, error.value) == ("init_strength", strength)
    assert pipeline.plan(ask(init_image=str(tmp_path / "given.png"), init_strength=0.01)).steps == 1


def test_what_is_no_picture_is_refused(pipeline: ZImagePipeline, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(FileError, match=name):
            pipeline.plan(ask(init_image=str(tmp_path / name)))


def _warned(pipeline: ZImagePipeline, **fields: object) -> str:
    return " | ".join(pipeline.plan(ask(**fields)).warnings)


def test_warnings(pipeline: ZImagePipeline, tmp_path: Path) -> None:
    turbo = tiny_pipeline(replace(TURBO, width=64, height=64))
    assert _warned(pipeline) == _warned(turbo) == ""
    assert "is distilled: guidance doubles its work" in _warned(turbo, guidance=3.0)
    assert _warned(turbo, guidance=1.0) == ""
    assert "no effect unless it is above 1" in _warned(turbo, guidance=0.5)
    assert "negative has no effect" in _warned(turbo, negative="blue")
    assert _warned(pipeline, negative="blue") == ""
    assert "no use for temperature" in _warned(pipeline, temperature=0.5)
    assert "no use for true_guidance" in _warned(pipeline, true_guidance=2.0)
    assert "does not know 'zebra', 'fog'" in _warned(pipeline, prompt="a zebra", negative="fog")
    trained = tiny_pipeline(replace(DEFAULTS, sizes=((64, 64),)))
    assert _warned(trained) == ""
    assert "was trained at 64x64" in _warned(trained, width=32)
    editor = tiny_pipeline(replace(EDIT, width=64, height=64), text=tiny_text())
    Image.new("RGB", (32, 32)).save(tmp_path / "given.png")
    given = {"init_image": str(tmp_path / "given.png")}
    assert _warned(editor, **given) == ""
    assert "no use for init_strength" in _warned(editor, **given, init_strength=0.5)
    assert _warned(pipeline, **given) == ""
    assert "init_image is 32x32 and is cut to the proportions of 64x32" in _warned(pipeline, **given, height=32)


def test_a_picture_with_more_places_than_the_network_has(tmp_path: Path) -> None:
    """Refused before it meets others: all pictures of the model share their steps."""
    Image.new("RGB", (1024, 64)).save(tmp_path / "long.png")
    Image.new("RGB", (2_000_000, 1)).save(tmp_path / "line.png")
    editor = tiny_pipeline(replace(EDIT, width=64, height=64), text=tiny_text())
    for name in ("long.png", "line.png"):
        with pytest.raises(RequestError, match="pixels along an edge") as caught:
            editor.plan(ask(init_image=str(tmp_path / name), width=64, height=64))
        assert caught.value.field == "init_image"


def test_what_is_cut_is_quoted(pipeline: ZImagePipeline) -> None:
    words = " ".join(["red"] * 39)
    assert _warned(pipeline, prompt=words) == ""
    assert 'cut off: "blue ring"' in _warned(pipeline, prompt=f"{words} blue ring")
    assert "negative is longer" in _warned(pipeline, negative="red " * 100)
    spelled = tiny_pipeline(text=tiny_text(length=30))
    assert _warned(spelled, prompt="ab") == ""
    assert spelled.text.cut("a" * 23 + " blue ring").endswith("blue ring")
    assert 'cut off: "' in _warned(spelled, prompt="a" * 23 + " blue ring")


def test_what_is_cut_of_a_prompt_about_a_picture_is_what_its_piece_has_no_room_for(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "given.png")
    editor = tiny_pipeline(replace(EDIT, width=64, height=64), text=tiny_text(length=30))
    marked, asked = 1 + len("user\n"), 1  # tokens before the prompt, without a picture and with one
    for before, given in ((marked, {}), (asked, {"init_image": str(tmp_path / "given.png")})):
        assert 'cut off: "ring"' in _warned(editor, prompt="a" * (30 - before) + "ring", **given)
    shape = editor.planner._shape("ab", (64, 64))
    assert shape.captions[1] == 1 + len("ab") + 1 + len("\n") + 1 + len("assistant\n") + 1


@pytest.mark.parametrize("fields", [{}, {"guidance": 0.0}, {"guidance": (3.0, 0.0, 3.0, 1.0), "negative": "blue"}])
def test_costs_add_up(pipeline: ZImagePipeline, fields: dict[str, object]) -> None:
    plan = pipeline.plan(ask(seed=1, **fields))
    (conditioning,) = pipeline.encode([plan])
    state = pipeline.begin(plan, conditioning, 0)
    spent = 0.0
    for _ in range(plan.steps):
        assert state.cost.bytes > 0
        spent += state.cost.flops
        pipeline.step([state])
    assert spent < plan.cost.flops
    assert plan.peak_bytes > sum(parameter.nbytes for parameter in pipeline.transformer.parameters())


@torch.no_grad()
def test_operations_are_those_that_torch_counts(pipeline: ZImagePipeline) -> None:
    request = ask(seed=1, guidance=2.0)
    stated = pipeline.plan(request).cost.flops
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts no fused kernels
        plan = pipeline.plan(request)
        (conditioning,) = pipeline.encode([plan])
        state = pipeline.begin(plan, conditioning, 0)
        while state.remaining:
            pipeline.step([state])
        list(pipeline.decode([state]))
    assert abs(stated - counter.get_total_flops()) < 0.1 * stated


def test_it_plans_without_weights() -> None:
    real = tiny_pipeline()
    empty = ZImagePipeline(
        transformer=tiny_pipeline().transformer.to("meta"),
        autoencoder=tiny_pipeline().autoencoder.to("meta"),  # pyright: ignore[reportArgumentType]
        text=real.text,
        shift=FlowSchedule(shift=3.0),
        defaults=DEFAULTS,
        name="tiny",
        digest="",
    )
    assert empty.plan(ask(seed=1)) == real.plan(ask(seed=1))


def test_shifts_that_make_no_schedule_are_refused() -> None:
    for values in ({"shift": 0.0}, {"shift": math.nan}, {"base_image_seq_len": 10, "max_image_seq_len": 10}):
        with pytest.raises(ValueError, match="is not above"):
            FlowSchedule(**values)  # pyright: ignore[reportArgumentType]
