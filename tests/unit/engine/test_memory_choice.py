"""Which memory mode is taken, what is foreseen, and what is refused before work, by what is said to be free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gesso.engine import memory
from gesso.engine.budget import weights_bytes
from gesso.engine.engine import Engine
from gesso.engine.loading import load_pipeline, load_planner, measure, memory_mode
from gesso.engine.loading.build import Build
from gesso.engine.memory import choose, needed, options, peaks
from gesso.errors import OutOfMemoryError, RequestError
from gesso.memory_modes import EXACT, SHOWN, MemoryMode, check_memory, parse_mode
from gesso.pipelines.contract import Cost, Plan
from gesso.request import GenerationRequest
from gesso.weights.footprint import Footprint
from tests import tiny_flux

MEBI = 1 << 20


class Planned:
    """A pipeline as far as memory is concerned: text encoder 40 MiB, network 100 MiB in four blocks, autoencoder 4."""

    def __init__(self) -> None:
        self.build = Build(device="meta")
        with torch.device("meta"):
            block = [nn.Sequential(nn.Linear(2560, 2560, bias=False)) for _ in range(4)]
            parts = {
                "text_encoder": nn.Sequential(nn.Linear(1024, 10240, bias=False)),
                "transformer": nn.Sequential(nn.ModuleList(block)),
                "autoencoder": nn.Sequential(nn.Conv2d(1024, 1024, 1, bias=False)),
            }
        self.build.place(parts)


PLAN = Plan(
    request=GenerationRequest(prompt="a", width=64, height=64),
    steps=1,
    cost=Cost(flops=1, bytes=1),
    peak_bytes=200 * MEBI,
    activations={"text": 10 * MEBI, "step": 20 * MEBI, "decode": 60 * MEBI},
)
FORESEEN = {"full": 204, "offload": 164, "model-offload": 120, "group-offload": 64}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is said to be free, in MiB."""
    found = [1000]
    monkeypatch.setattr(memory, "free_bytes", lambda device: found[0] * MEBI)
    return found


def planned() -> Any:
    return Planned()


def test_peaks_are_those_of_the_stage_that_needs_most() -> None:
    found = {str(mode): size / MEBI for mode, size in peaks(planned(), PLAN).items()}
    assert {name: found[name] for name in FORESEEN} == FORESEEN
    assert list(found) == [str(mode) for mode in SHOWN]
    assert found["8bit"] < found["full"] - 100 and found["offload+8bit"] < found["8bit"]


def test_without_stages_the_peak_is_taken_apart() -> None:
    plan = Plan(request=PLAN.request, steps=1, cost=PLAN.cost, peak_bytes=154 * MEBI)
    found = {str(mode): size / MEBI for mode, size in peaks(planned(), plan).items()}
    assert (found["full"], found["offload"], found["model-offload"]) == (154, 114, 110)


@pytest.mark.parametrize(
    ("room", "mode"), [(1000, "full"), (220, "offload"), (150, "model-offload"), (100, "group-offload")]
)
def test_auto_takes_the_first_that_surely_fits(free: list[int], room: int, mode: str) -> None:
    free[0] = room
    assert str(choose("auto", planned(), PLAN, "cpu")) == mode


def test_auto_tries_the_least_that_may_fit_and_refuses_what_cannot(free: list[int]) -> None:
    free[0] = 60
    assert str(choose("auto", planned(), PLAN, "cpu")) == "group-offload"
    free[0] = 50
    with pytest.raises(OutOfMemoryError) as caught:
        choose("auto", planned(), PLAN, "cpu")
    assert caught.value.modes == ("a smaller width and height",)
    assert (caught.value.needed, caught.value.free) == (64 * MEBI, 50 * MEBI)


def test_what_is_asked_for_is_taken_or_refused_with_what_fits(free: list[int]) -> None:
    free[0] = 130
    assert str(choose("offload+8bit", planned(), PLAN, "cpu")) == "offload+8bit"
    with pytest.raises(OutOfMemoryError, match="try --memory model-offload or --memory 8bit or a smaller width"):
        choose("full", planned(), PLAN, "cpu")
    free[0] = 190
    assert str(choose("full", planned(), PLAN, "cpu")) == "full"  # it may fit


def test_where_nothing_is_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert str(choose("auto", planned(), PLAN, "mps")) == "full"
    nothing: Any = object()
    assert peaks(nothing, PLAN) == {}
    assert needed(nothing, PLAN) == PLAN.peak_bytes
    assert options(nothing, PLAN, "cpu") == ("a smaller width and height",)


def test_modes_by_name() -> None:
    for mode in (*SHOWN, MemoryMode("model-offload", "torchao-fp8", True), MemoryMode(tiling=True)):
        assert parse_mode(str(mode)) == mode
    assert tuple(mode for mode in SHOWN if not mode.scheme) == EXACT
    assert check_memory("auto") == "auto"
    for name in ("", "fast", "full+offload", "8bit+torchao-int8", "tiling+tiling", "auto+8bit", "full+"):
        with pytest.raises(RequestError, match="is not a memory mode"):
            check_memory(name)


def test_a_footprint_is_that_of_the_parts() -> None:
    footprint = Footprint()
    network = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)]))
    footprint.add("transformer", network)
    plain = footprint.plain["transformer"]
    assert (plain.stem, plain.block, plain.whole) == (288, 288, 720)
    assert footprint.quantized["transformer"].whole == 160 * 1 + 4 * 20 + 4 * 20
    assert footprint.quantized["transformer"].temporary == 256


def test_a_guest_counts_for_plans_that_name_it_and_once_it_is_there_for_all() -> None:
    footprint, full, offload = Footprint(), parse_mode("full"), parse_mode("offload")
    footprint.add("transformer", nn.Linear(8, 8))
    footprint.add("text_encoder", nn.Linear(8, 16))
    footprint.expect("infusenet", nn.Linear(8, 4))
    footprint.expect("resampler", 1000)
    guests = ("infusenet", "resampler")
    assert footprint.peak(full, {}, (1, 1)) == 288 + 576
    assert footprint.peak(full, {"step": 7}, (1, 1), guests) == 288 + 576 + 144 + 1000 + 7
    assert footprint.peak(offload, {}, (1, 1), guests) == max(288 + 144, 576) + 1000  # which is there all the time
    assert footprint.host(full, guests) == 0 and footprint.host(offload, guests) == 288 + 576 + 144 + 1000
    footprint.add("infusenet", nn.Linear(8, 4))
    assert footprint.peak(full, {}, (1, 1)) == 288 + 576 + 144


def test_decoding_by_tiles_holds_a_tile_and_those_before_it() -> None:
    """Tiles of 512 pixels begin every 384; a pixel is 12 bytes, and in the end there are tiles, rows and a picture."""
    footprint, tiling = Footprint(), parse_mode("tiling")
    footprint.add("autoencoder", nn.Identity())
    footprint.tile = 512

    def peak(a_pixel: int, width: int, height: int) -> int:
        return footprint.peak(tiling, {"decode": a_pixel * width * height}, (width, height))

    assert peak(480, 768, 768) == 480 * 512 * 512  # the first tile is the largest, and alone
    assert peak(480, 512, 256) == 480 * 512 * 256
    before = 12 * (512 * 512 * 2 + 512 * 256 + 512 * 512)  # a row of tiles, and the first of the next
    assert peak(480, 1024, 1024) == 480 * 512 * 512 + before
    assert peak(60, 768, 768) == 12 * (512 * 512 + 2 * 512 * 384 + 384 * 384) + 24 * 768 * 768
    assert peak(1, 768, 768) == 768 * 768  # no more than without


def test_pictures_and_plans_say_the_mode(tmp_path: Path) -> None:
    folder = str(tiny_flux.write_tiny_flux(tmp_path / "flux"))
    assert str(memory_mode(folder, "cpu", memory="8bit+offload")) == "offload+8bit"
    request = GenerationRequest(prompt="a red star", model=folder, steps=1, width=64, height=64)
    with Engine(device="cpu", memory="model-offload") as engine:
        assert engine.run(request)[0].metadata["memory"] == "model-offload"
    with Engine(device="cpu") as engine:
        assert engine.run(request)[0].metadata["memory"] == "full"
    planner, loaded = load_planner(folder, "cpu"), load_pipeline(folder, "cpu", memory="group-offload")
    assert planner is not None
    plan = planner.plan(request.model_copy(update={"seed": 1}))
    assert plan == loaded.plan(request.model_copy(update={"seed": 1}))
    assert peaks(planner, plan) == peaks(loaded, plan)


@pytest.mark.parametrize("mode", ["auto", "full", "8bit"])
def test_a_budget_is_asked_for_what_the_mode_will_hold(tmp_path: Path, mode: str) -> None:
    folder = str(tiny_flux.write_tiny_flux(tmp_path / "flux"))
    held = weights_bytes([load_pipeline(folder, "cpu", memory=mode)])
    assert measure(folder, "cpu", memory=mode) == pytest.approx(held, rel=0.02)


def test_a_budget_is_asked_for_what_is_there_at_once(tmp_path: Path) -> None:
    folder = str(tiny_flux.write_tiny_flux(tmp_path / "flux"))
    needs = [measure(folder, "cpu", memory=mode) or 0 for mode in ("full", *map(str, EXACT[1:]), "offload+8bit")]
    full, offload, model_offload, group_offload, quantized = needs
    assert full > offload >= model_offload > group_offload > 0 and offload > quantized > 0


def test_what_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, free: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny_flux.write_tiny_flux(tmp_path / "flux"))
    monkeypatch.setattr("gesso.engine.loading.is_small", lambda size: False)
    request = GenerationRequest(prompt="a red star", model=folder, steps=1, width=64, height=64)
    free[0] = 0
    with Engine(device="cpu") as engine:
        with pytest.raises(OutOfMemoryError, match=r"out of memory: needs .* 0\.0 GiB free; try a smaller width"):
            engine.run(request)
        free[0] = 1000
        assert engine.run(request)[0].metadata["memory"] == "full"


def test_memory_that_runs_out_at_work_names_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tiny_flux.write_tiny_flux(tmp_path / "flux"))
    request = GenerationRequest(prompt="a red star", model=folder, steps=1, width=64, height=64)

    def full(*_: object) -> None:
        raise MemoryError

    with Engine(device="cpu") as engine:
        engine.run(request)
        monkeypatch.setattr("gesso.pipelines.flux.FluxPipeline.step", full)
        with pytest.raises(
            OutOfMemoryError, match="try --memory offload or --memory 8bit or a smaller width"
        ) as caught:
            engine.run(request)
        assert caught.value.needed is not None and caught.value.free is not None
