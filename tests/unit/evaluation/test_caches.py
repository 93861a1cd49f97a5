"""Calibration: distances known by hand, fronts, picking by quality, going on where it stopped, the commands."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from gesso.cli import app
from gesso.engine.loading import load_pipeline
from gesso.engine.loading.weights_digest import weights_digest
from gesso.errors import FileError, RequestError
from gesso.evaluation.caches import PROMPTS, Bench, bench_of, calibrate, fitting, usable
from gesso.evaluation.closeness import SAME_PSNR, psnr, relative_error, ssim
from gesso.fronts import (
    Point,
    caches_at,
    expected,
    keep_point,
    losing,
    painted_with,
    pareto_front,
    path_of,
    pick,
    read_points,
    unlike,
    with_point,
)
from gesso.metadata import read_record
from gesso.models.word_encoder import WordEncoder, WordEncoderConfig
from gesso.models.word_features import FluxWordFeatures
from gesso.request import GenerationRequest
from gesso.weights import catalogue
from gesso.worlds import faces, shapes
from tests.tiny_flux import tiny_pipeline, write_tiny_flux
from tests.tiny_hunyuan_video import write_tiny_hunyuan_video
from tests.tiny_qwen_image import write_tiny_qwen_image
from tests.tiny_sdxl import write_tiny_sdxl
from tests.tiny_z_image import write_published

KNOWN = {"digest": "none", "device": "cpu", "dtype": "float32", "hardware": "any"}
CACHE = "lite:interval=3,order=1,warmup=2,granularity=trunk"


def point(
    cache: str, speed: float, ssim: float, steps: int = 8, computed: float = 4, reference: int | None = None
) -> Point:
    rest = {"psnr": 30.0, "latent": 0.1, "score": None, "score_without": None, "pictures": 2}
    rest |= {"steps": steps, "reference": steps if reference is None else reference, "computed": computed}
    return Point(cache=cache, speed=speed, ssim=ssim, **rest, **KNOWN)  # pyright: ignore


def bench() -> Bench:
    requests = [GenerationRequest(prompt="a red star", seed=seed, steps=8) for seed in (1, 2)]
    return Bench(pipeline=tiny_pipeline(), requests=requests)


def test_distances_known_by_hand() -> None:
    grey, lighter = (Image.new("RGB", (16, 16), (value,) * 3) for value in (100, 110))
    assert psnr(grey, grey) == SAME_PSNR and ssim(grey, grey) == pytest.approx(1)
    assert psnr(grey, lighter) == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)
    assert ssim(grey, lighter) == pytest.approx((2 * 100 * 110 + 6.5025) / (100**2 + 110**2 + 6.5025), abs=1e-6)
    noise = Image.effect_noise((16, 16), 80).convert("RGB")
    assert ssim(noise, noise.rotate(180)) < 0.3
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_fronts_and_what_a_quality_picks() -> None:
    points = [point("lite", 3, 0.9), point("lite:interval=2", 2, 0.97), point("residual", 2.5, 0.8)]
    assert [one.cache for one in pareto_front(points)] == ["lite:interval=2", "lite"]
    plain = point("", 3.5, 0.95, steps=2, computed=2, reference=8)
    assert losing(points[0], [*points, plain]) and not losing(points[1], [*points, plain])
    assert not losing(points[0], [*points, replace(plain, reference=20)])  # relative to another picture
    assert pick(points, "0.95", model="m", steps=8) == points[1]
    assert pick(points, "0.5", model="m", steps=8) == points[0]
    assert pick([point("lite", 0.8, 0.99)], "0.5", model="m", steps=8) is None  # slower than without
    assert pick(points, "0.99", model="m", steps=8) is None and pick([], "exact", model="m", steps=8) is None
    idle = point("first_block", 1.1, 1.0, computed=8)  # forecasts nothing, whatever a busy machine says of its speed
    assert pick([*points, idle], "0.99", model="m", steps=8) is None and caches_at([*points, idle], 8) == points
    with pytest.raises(RequestError, match="first: gesso calibrate m --steps 9; or take 8 steps, which were measured"):
        pick(points, "0.5", model="m", steps=9)
    with pytest.raises(RequestError, match=r"first: gesso calibrate m --steps 4$"):  # half of 8, by a given picture
        pick(points, "0.5", model="m", steps=4, asked=8)
    with pytest.raises(RequestError, match="a number from 0 to 1, or exact"):
        pick(points, "best", model="m", steps=8)


def test_models_are_asked_what_they_have_words_for() -> None:
    """The shapes world judges those that know its words and no others; portraits of the faces world nobody judges."""
    asked: list[tuple[str, bool]] = []
    for vocabulary in (shapes.VOCABULARY, faces.VOCABULARY, ("word",)):
        text = FluxWordFeatures(
            WordEncoder(WordEncoderConfig(vocabulary=vocabulary, width=8, depth=1, heads=2, length=8))
        )
        pipeline = SimpleNamespace(text=text, plan=lambda request: SimpleNamespace(request=request))
        found = bench_of(pipeline, "m", {}, pictures=2, device="cpu")  # pyright: ignore[reportArgumentType]
        asked.append((found.requests[0].prompt, bool(found.questions)))
    portrait = faces.caption(faces.held_out_portrait(0), 0)
    assert asked == [(shapes.prompts(6, 0)[0].prompt, True), (portrait, False), (PROMPTS[0], False)]
    general = bench_of(tiny_pipeline(), "m", {}, pictures=2, device="cpu")  # whose vocabularies spell any word
    assert general.requests[1].prompt == PROMPTS[1] and not general.questions


def test_fresh_noise_is_left_out_of_every_picture() -> None:
    """Else those with a cache would be held against others of another scheduler."""
    nano = load_pipeline("z-image-nano", "cpu")
    asked = bench_of(nano, "z-image-nano", {}, pictures=2, device="cpu").requests
    told = bench_of(nano, "z-image-nano", {"scheduler": "euler-stochastic"}, pictures=2, device="cpu").requests
    assert [request.scheduler for request in (*asked, *told)] == ["euler"] * 2 + ["euler-stochastic"] * 2


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    grid = [CACHE, "taylorseer:order=3,mask=10", "lite:warmup=8"]  # the last two cannot be had at 8 steps
    whole = bench()
    assert fitting(whole, grid) == [CACHE]
    caches = fitting(whole, grid)
    for count, one in enumerate(calibrate(whole, caches, [], KNOWN), 1):
        keep_point(tmp_path, "tiny", one)
        if count == 3:
            break
    have = read_points(tmp_path, "tiny")
    assert len(have) == 3
    have += calibrate(bench(), caches, have, KNOWN)
    assert len(have) == 5
    assert list(calibrate(bench(), caches, have, KNOWN)) == []
    assert len(list(calibrate(bench(), caches, have, {**KNOWN, "digest": "other"}))) == 5
    cached = have[-1]
    assert (cached.cache, cached.steps, cached.computed, cached.pictures) == (CACHE, 8, 4, 2)
    assert cached.ssim < 1 and cached.psnr < SAME_PSNR and cached.latent > 0
    request = whole.pipeline.plan(whole.requests[0].model_copy(update={"cache": cached.settings})).request
    assert expected(have, request, 8) == cached.drift and expected(have, request, 9) is None
    assert not unlike(cached, request)
    other = request.model_copy(update={"guidance": 12.0, "init_image": "a.png"})
    assert expected(have, other, 8) is None
    assert unlike(cached, other) == (
        "measured with 64x64, scheduler euler, guidance 3.5, true_guidance 1; this request has guidance 12, init_image"
    )


def test_calibrations_at_other_steps_do_not_count() -> None:
    """Speed and likeness of fewer steps are relative to the steps of their own calibration."""
    four = bench()
    four.requests = [request.model_copy(update={"steps": 4}) for request in four.requests]
    have = list(calibrate(four, [], [], KNOWN))
    assert [(one.steps, one.reference) for one in have] == [(3, 4), (2, 4), (1, 4)]
    added = list(calibrate(bench(), [], have, KNOWN))
    assert [(one.steps, one.reference) for one in added] == [(6, 8), (4, 8), (3, 8), (2, 8)]
    kept = [*have]
    for one in added:
        kept = with_point(kept, one)
    assert kept == [*have, *added]


def test_a_cache_that_was_named_has_to_be_usable() -> None:
    assert usable(bench(), ["lite:interval=3,warmup=2,order=1"]) == [CACHE]
    with pytest.raises(RequestError, match=r"cache\.order 3 is not at most"):
        usable(bench(), [CACHE, "taylorseer:order=3,interval=4"])
    with pytest.raises(RequestError, match='"lite:warmup=8" is not of any effect at 8 steps; all 8 steps are computed'):
        usable(bench(), ["lite:warmup=8"])


def test_what_has_no_room_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    crowded = bench()
    crowded.told = told.append
    monkeypatch.setattr("gesso.engine.caches.free_bytes", lambda device: 5000)
    assert fitting(crowded, [CACHE, "taylorseer:interval=3,granularity=module"]) == [CACHE]
    (line,) = told
    assert line.startswith("left out: taylorseer:interval=3,granularity=module: ")


def _keep_ten(home: Path, first: int) -> None:
    for steps in range(first, first + 10):
        keep_point(home, "tiny", point("lite", 2, 0.9, steps=steps))


def test_two_processes_keep_all_points(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_keep_ten, args=(tmp_path, first)) for first in (1, 11)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert sorted(one.steps for one in read_points(tmp_path, "tiny")) == list(range(1, 21))
    newer = point("lite", 3, 0.8, steps=20)
    keep_point(tmp_path, "tiny", newer)
    assert newer in (kept := read_points(tmp_path, "tiny")) and len(kept) == 20


def test_every_model_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("flux-nano", "data/my/flux", "data/my-flux", "模型", "модель", "..", "a/../flux-nano")
    paths = [path_of(tmp_path, name) for name in names]
    assert len(set(paths)) == len(names) and {path.parent for path in paths} == {tmp_path / "calibration"}
    assert path_of(tmp_path, "./data/my/flux") == path_of(tmp_path, str(tmp_path / "data/my/flux")) == paths[1]


@pytest.mark.parametrize("name", ["flux-nano", "z-image-nano", "infinite-you-nano"])
def test_weights_are_known_without_loading_them(name: str) -> None:
    """As the pipeline itself has them, whose pictures and points carry that digest."""
    digest = getattr(load_pipeline(name, "cpu"), "digest", "")
    assert digest and weights_digest(catalogue.find(name)) == digest


@pytest.mark.parametrize(
    "write", [write_tiny_flux, write_published, write_tiny_sdxl, write_tiny_qwen_image, write_tiny_hunyuan_video]
)
def test_published_weights_are_known_without_loading_them(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = str(write(tmp_path / "model"))
    digest = getattr(load_pipeline(folder, "cpu", "float32"), "digest", "")
    assert digest and weights_digest(catalogue.find(folder)) == digest


def test_old_lists_without_lpips_are_read(tmp_path: Path) -> None:
    keep_point(tmp_path, "tiny", point("lite", 2, 0.9))
    path = path_of(tmp_path, "tiny")
    data = json.loads(path.read_text())
    del data["points"][0]["lpips"]
    path.write_text(json.dumps(data))
    (one,) = read_points(tmp_path, "tiny")
    assert one.lpips is None and "lpips" not in one.drift
    assert replace(one, lpips=0.1).drift["lpips"] == 0.1


def test_old_lists_without_references_are_read(tmp_path: Path) -> None:
    """A cache's reference had its own steps; that of fewer plain steps nobody knows, so they are measured again."""
    cached = point("lite", 2, 0.9)
    for one in (cached, point("", 3, 0.8, steps=2, reference=8)):
        keep_point(tmp_path, "tiny", one)
    path = path_of(tmp_path, "tiny")
    data = json.loads(path.read_text())
    for row in data["points"]:
        del row["reference"], row["painted"]
    path.write_text(json.dumps(data))
    assert read_points(tmp_path, "tiny") == [cached]
    request = tiny_pipeline().plan(GenerationRequest(prompt="a red star", steps=8, cache=cached.settings)).request
    assert expected([cached], request, 8) is None and painted_with(request)
    assert unlike(cached, request).startswith("measured with settings that were not noted; this request has 64x64")


def test_a_broken_list_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    path = path_of(tmp_path, "flux-nano")
    path.parent.mkdir()
    for text in ("{", "[]", json.dumps({"schema": 1, "points": [{"cache": "lite"}]})):
        path.write_text(text)
        with pytest.raises(FileError, match="remove it, then: gesso calibrate flux-nano"):
            read_points(tmp_path, "flux-nano")


def test_calibrated_on_the_command_line_and_picked_by_quality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path))
    cache = "lite:interval=2,warmup=2,order=0"
    command = ["calibrate", "flux-nano", "--steps", "6", "--pictures", "1", "--cache", cache]
    assert app.run(command) == 0
    assert "6 steps, 64x64, scheduler euler, guidance" in (said := capsys.readouterr().out)
    assert "lite:interval=2,order=0" in said
    assert app.run([*command[:-1], "taylorseer:mask=110"]) == 2
    assert "cache.mask 3 is not one value for each of 6 steps" in capsys.readouterr().err
    paint = [
        "generate",
        "a red star",
        "--model",
        "flux-nano",
        "--steps",
        "6",
        "--seed",
        "3",
        "-o",
        str(tmp_path / "out"),
    ]
    (measured,) = [one for one in read_points(tmp_path, "flux-nano") if one.cache]
    keep_point(tmp_path, "flux-nano", replace(measured, speed=1.5))  # whatever a busy machine measured
    assert app.run([*paint, "--quality", "0"]) == 0
    told = capsys.readouterr()
    assert "warning: euler paints in place of euler-stochastic, the model's own" in told.err
    assert "the cache was measured" not in told.err
    record = read_record(Path(told.out.strip()))
    assert record.request.cache is not None and record.request.cache.order == 0
    cached = record.data["cache"]
    assert (
        isinstance(cached, dict)
        and cached["steps"] == "FFTFTF"
        and set(cached["expected"]) == {"psnr", "ssim", "latent"}
    )
    assert app.run([*paint, "--quality", "0", "--guidance", "12"]) == 0
    told = capsys.readouterr()
    assert "warning: the cache was measured with 64x64, scheduler euler" in told.err and "has guidance 12" in told.err
    elsewise = read_record(Path(told.out.strip())).data["cache"]
    assert isinstance(elsewise, dict) and "expected" not in elsewise
    assert app.run([*paint, "--quality", "1"]) == 0
    told = capsys.readouterr()
    assert "no cache: none is faster and that close at 6 steps; the closest is 0." in told.err
    assert read_record(Path(told.out.strip())).request.cache is None
    assert app.run([*paint, "--quality", "exact", "--json"]) == 0
    assert "cache" not in json.loads(capsys.readouterr().out)["metadata"]
    assert app.run([*paint, "--quality", "0.5", "--cache", "lite"]) == 2
    assert "usable with --cache" in capsys.readouterr().err
    elsewhere = replace(measured, digest="of other weights", speed=3.0)
    path_of(tmp_path, "flux-nano").unlink()
    for other in (elsewhere, replace(measured, hardware="another machine"), replace(measured, dtype="bfloat16")):
        keep_point(tmp_path, "flux-nano", other)
    assert app.run([*paint, "--quality", "0"]) == 2
    assert "is of other weights or another machine; first: gesso calibrate flux-nano" in capsys.readouterr().err
