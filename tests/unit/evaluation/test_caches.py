"""Calibration: distances known by hand, fronts, picking by quality, going on where it stopped, the commands."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from gesso.cli import app
from gesso.engine.loading import load_pipeline
from gesso.errors import FileError, RequestError
from gesso.evaluation.caches import PROMPTS, Bench, bench_of, calibrate, fitting
from gesso.evaluation.closeness import SAME_PSNR, psnr, relative_error, ssim
from gesso.fronts import Point, caches_at, expected, losing, pareto_front, path_of, pick, read_points, write_points
from gesso.metadata import read_record
from gesso.models.word_encoder import WordEncoder, WordEncoderConfig
from gesso.models.word_features import FluxWordFeatures
from gesso.request import GenerationRequest
from gesso.worlds import faces, shapes
from tests.tiny_flux import tiny_pipeline

KNOWN = {"digest": "none", "device": "cpu", "dtype": "float32", "hardware": "any"}
CACHE = "lite:interval=3,order=1,warmup=2,granularity=trunk"


def point(cache: str, speed: float, ssim: float, steps: int = 8, computed: float = 4) -> Point:
    rest = {"psnr": 30.0, "latent": 0.1, "score": None, "score_without": None, "pictures": 2}
    return Point(cache=cache, steps=steps, computed=computed, speed=speed, ssim=ssim, **rest, **KNOWN)  # pyright: ignore


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
    plain = point("", 3.5, 0.95, steps=2, computed=2)
    assert losing(points[0], [*points, plain]) and not losing(points[1], [*points, plain])
    assert pick(points, "0.95", model="m", steps=8) == points[1]
    assert pick(points, "0.5", model="m", steps=8) == points[0]
    assert pick(points, "0.99", model="m", steps=8) is None and pick([], "exact", model="m", steps=8) is None
    idle = point("first_block", 1.1, 1.0, computed=8)  # forecasts nothing, whatever a busy machine says of its speed
    assert pick([*points, idle], "0.99", model="m", steps=8) is None and caches_at([*points, idle], 8) == points
    with pytest.raises(RequestError, match="first: gesso calibrate m --steps 9; or take 8 steps, which were measured"):
        pick(points, "0.5", model="m", steps=9)
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
    counts: list[int] = []
    for points in calibrate(whole, grid, [], KNOWN):
        write_points(tmp_path, "tiny/flux", points)
        counts.append(len(points))
        if len(points) == 3:
            break
    have = read_points(tmp_path, "tiny/flux")
    for points in calibrate(bench(), grid, have, KNOWN):
        counts.append(len(points))
        have = points
    assert counts == [1, 2, 3, 4, 5]
    assert list(calibrate(bench(), grid, have, KNOWN)) == []
    cached = have[-1]
    assert (cached.cache, cached.steps, cached.computed, cached.pictures) == (CACHE, 8, 4, 2)
    assert cached.ssim < 1 and cached.psnr < SAME_PSNR and cached.latent > 0
    settings = cached.settings
    assert settings is not None and expected(have, settings, 8) == cached.drift and expected(have, settings, 9) is None


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
    command = [
        "calibrate",
        "flux-nano",
        "--steps",
        "6",
        "--pictures",
        "1",
        "--cache",
        "lite:interval=2,warmup=2,order=0",
    ]
    assert app.run(command) == 0
    assert "lite:interval=2,order=0" in capsys.readouterr().out
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
    assert app.run([*paint, "--quality", "0"]) == 0
    record = read_record(Path(capsys.readouterr().out.strip()))
    assert record.request.cache is not None and record.request.cache.order == 0
    cached = record.data["cache"]
    assert (
        isinstance(cached, dict)
        and cached["steps"] == "FFTFTF"
        and set(cached["expected"]) == {"psnr", "ssim", "latent"}
    )
    assert app.run([*paint, "--quality", "1"]) == 0
    told = capsys.readouterr()
    assert "no cache: none that was measured is closer than 0." in told.err
    assert read_record(Path(told.out.strip())).request.cache is None
    assert app.run([*paint, "--quality", "exact", "--json"]) == 0
    assert "cache" not in json.loads(capsys.readouterr().out)["metadata"]
    assert app.run([*paint, "--quality", "0.5", "--cache", "lite"]) == 2
    assert "usable with --cache" in capsys.readouterr().err
