"""Adapters of requests in the engine: whose they are, how often they count, who waits for them, and what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gesso.adapters.apply import Adapted, Use, Uses
from gesso.adapters.formats.places import shapes_of
from gesso.adapters.formats.reading import read_adapter
from gesso.engine import Engine
from gesso.engine.planning import planned
from gesso.errors import FileError, GessoError, OutOfMemoryError, RequestError, RunError, WeightsError
from gesso.events import Cancelled, Done, Result
from gesso.pipelines.contract import without_breaths
from gesso.request import GenerationRequest
from tests.adapter_server import Page, Site, served
from tests.unit.engine.turns import Turns

ROLES = {"flux": "transformer", "z_image": "transformer", "qwen_image": "transformer", "infinity": "transformer"}
ROLES |= {"hunyuan_video": "transformer", "sdxl": "unet"}
Pipelines = dict[str, Any]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GESSO_ALLOW_PRIVATE_ADDRESSES", "1")
    monkeypatch.delenv("GESSO_OFFLINE", raising=False)
    monkeypatch.setattr("gesso.adapters.sources_sites.PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pipelines() -> Pipelines:
    return {family: import_module(f"tests.tiny_{family}").tiny_pipeline() for family in ROLES}


def network_of(pipelines: Pipelines, family: str) -> torch.nn.Module:
    return getattr(pipelines[family], ROLES[family])


def write(
    path: Path,
    network: torch.nn.Module,
    seed: int,
    *,
    rank: int = 2,
    only: str = "",
    change: Callable[..., object] = id,
) -> str:
    """A LoRA of every layer of a network, or of those with `only` in their name; its path as a request names it."""
    generator = torch.Generator().manual_seed(seed)
    role = "unet" if type(network).__name__.startswith("UNet") else "transformer"
    tensors = {}
    for name, shape in shapes_of(network).items():
        if only in name:
            tensors[f"{role}.{name}.lora_A.weight"] = torch.randn(rank, *shape.weight[1:], generator=generator) * 0.2
            up = torch.randn(shape.weight[0], rank, *(1,) * (len(shape.weight) - 2), generator=generator)
            tensors[f"{role}.{name}.lora_B.weight"] = up * 0.2
    change(tensors)
    save_file(tensors, path)
    return str(path)


def engine_of(pipeline: Any, **values: Any) -> Engine:
    return Engine(device="cpu", load=lambda name, device, dtype: pipeline, **values)


def ask(prompt: str = "a star", **fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 7, **fields})


def pixels(results: list[Result]) -> np.ndarray:
    return np.stack([np.asarray(result.image, dtype=int) for result in results])


def painted(turns: Turns, requests: list[GenerationRequest]) -> list[Result]:
    """The pictures of requests that come together, each of one picture."""
    jobs = [turns.submit(request.model_copy(update={"model": "0"})) for request in requests]
    turns.finish(*jobs)
    return [job.result()[0] for job in jobs]


def by_hand(pipeline: Any, role: str, request: GenerationRequest, path: str, scale: float) -> np.ndarray:
    """The picture by the verbs alone, with the adapter at that scale."""
    network = getattr(pipeline, role)
    adapted = Adapted({role: network})
    uses: Uses = (Use(read_adapter(Path(path), {role: network}), scale),)
    plan = pipeline.plan(request.model_copy(update={"lora": ()}))
    with adapted.using([uses]):
        state = pipeline.begin(plan, pipeline.encode([plan])[0], 0)
        while state.remaining:
            pipeline.step([state])
    return np.asarray(next(without_breaths(pipeline.decode([state]))).image, dtype=int)


@pytest.mark.parametrize("family", ROLES)
def test_the_scale_counts_once_and_nothing_of_it_stays(pipelines: Pipelines, tmp_path: Path, family: str) -> None:
    pipeline = pipelines[family]
    path = write(tmp_path / "style.safetensors", network_of(pipelines, family), 1)
    with engine_of(pipeline) as engine:
        plain = engine.run(ask())
        (styled,) = engine.run(ask(lora=f"{path}::0.5"))
        again = engine.run(ask())
        assert engine.counters()["adapters"]["pinned"] == 0
    assert (pixels(again) == pixels(plain)).all()
    assert (pixels([styled])[0] == by_hand(pipeline, ROLES[family], ask(), path, 0.5)).all()
    assert np.abs(pixels([styled]) - pixels(plain)).max() > 2
    (record,) = styled.metadata["lora"]  # type: ignore[misc]
    assert (record["source"], record["scale"]) == (path, 0.5) and "lora" in record["kind"]
    assert record["digest"].startswith("sha256:") and "lora" not in plain[0].metadata
    assert styled.metadata["request"]["lora"] == [{"source": path, "scale": 0.5}]  # type: ignore[index]


@pytest.mark.parametrize("family", ["flux", "z_image", "infinity"])
def test_pictures_with_different_adapters_share_a_batch(pipelines: Pipelines, tmp_path: Path, family: str) -> None:
    network = network_of(pipelines, family)
    first, second = (write(tmp_path / f"{seed}.safetensors", network, seed, rank=seed) for seed in (1, 2))
    asked = [
        ask("a star", lora=first),
        ask("two rings"),
        ask("a ring", lora=(f"{second}::0.4", f"{first}::-0.3")),
    ]
    turns = Turns(pipelines[family])
    alone = [painted(turns, [request])[0] for request in asked]
    together = painted(turns, asked)
    assert [result.metadata["company"] for result in together] == [3, 3, 3]
    assert np.abs(pixels(together) - pixels(alone)).max() <= 2
    assert np.abs(pixels(together)[0] - pixels(together)[1]).max() > 2


def test_those_of_other_kinds_step_with_their_like(
    pipelines: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def magnitude(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("lora_B.weight")]:
            rows = len(tensors[name])
            tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.linspace(0.5, 1.5, rows)

    network = network_of(pipelines, "flux")
    dora = write(tmp_path / "dora.safetensors", network, 3, only="attn.to_q", change=magnitude)
    plain = write(tmp_path / "plain.safetensors", network, 4)
    asked = [ask(lora=dora), ask("a ring", lora=dora), ask(lora=plain), ask()]
    widths: list[int] = []
    step = pipelines["flux"].step
    monkeypatch.setattr(pipelines["flux"], "step", lambda states: (widths.append(len(states)), step(states))[1])
    turns = Turns(pipelines["flux"])
    painted(turns, asked)  # so that all of them are in memory
    widths.clear()
    results = painted(turns, asked)
    assert widths == [2] * 8
    assert results[0].metadata["lora"][0]["kind"] == "dora, lora"  # type: ignore[index]


@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_a_step_cache_keeps_layers_as_they_are_with_their_adapters(
    pipelines: Pipelines, tmp_path: Path, family: str
) -> None:
    path = write(tmp_path / "style.safetensors", network_of(pipelines, family), 5)
    turns = Turns(pipelines[family])
    (styled,) = painted(turns, [ask(steps=6, lora=path)])
    for granularity in ("module", "block", "trunk"):
        cache = f"taylorseer:interval=2,warmup=2,granularity={granularity}"
        if granularity == "block" and family == "z_image":
            cache = cache.replace("taylorseer", "residual")
        every = cache.replace("warmup=2", "warmup=6")
        (computed,) = painted(turns, [ask(steps=6, lora=path, cache=every)])
        assert (pixels([computed]) == pixels([styled])).all()
        requests = [ask(steps=6, lora=path, cache=cache), ask("a ring", steps=6, cache=cache)]
        forecast, other = painted(turns, requests)
        assert "T" in forecast.metadata["cache"]["steps"]  # type: ignore[index]
        assert forecast.metadata["company"] == other.metadata["company"] == 2
        alone = [painted(turns, [request])[0] for request in requests]
        assert np.abs(pixels(alone) - pixels([forecast, other])).max() <= 2


@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_a_forecast_stays_one_when_others_join_later(pipelines: Pipelines, tmp_path: Path, family: str) -> None:
    path = write(tmp_path / "style.safetensors", network_of(pipelines, family), 5)
    cache = "taylorseer:interval=2,warmup=2,granularity=trunk"
    asked = [ask(model="0", steps=6, lora=path, cache=cache), ask("a ring", model="0", steps=6, cache=cache)]
    turns = Turns(pipelines[family])
    jobs = [turns.submit(asked[0])]
    while not turns.loop._fleet.rows:  # until its adapter is there
        turns.turn()
    jobs.append(turns.submit(asked[1]))
    turns.finish(*jobs)
    together = [job.result()[0] for job in jobs]
    assert together[0].metadata["company"] == 2
    with engine_of(pipelines[family]) as engine:
        alone = [engine.run(request)[0] for request in asked]
    assert np.abs(pixels(together) - pixels(alone)).max() <= 2


def test_layers_that_see_some_tokens_share_steps_with_their_like(pipelines: Pipelines, tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors", network_of(pipelines, "z_image"), 5)
    cache = "random:interval=2,warmup=1,ratio=0.5"
    with engine_of(pipelines["z_image"]) as engine:
        styled, plain = engine.run([ask(steps=6, lora=path, cache=cache), ask("a ring", steps=6, cache=cache)])
    assert styled.metadata["cache"]["steps"] == plain.metadata["cache"]["steps"]  # type: ignore[index]


def spoilt(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(iter(tensors))][0] = torch.nan


def stretched(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.zeros(2, 3)


def test_what_cannot_be_used_fails_its_request_and_no_other(pipelines: Pipelines, tmp_path: Path) -> None:
    network, other = network_of(pipelines, "flux"), network_of(pipelines, "sdxl")
    good = write(tmp_path / "good.safetensors", network, 1)
    copy = write(tmp_path / "copy.safetensors", network, 1)
    (tmp_path / "page.safetensors").write_bytes(b"<!doctype html><html>log in</html>" + b" " * 99)
    bad: dict[str, tuple[type[GessoError], object, str]] = {
        "family": (FileError, write(tmp_path / "sdxl.safetensors", other, 1), "is for sdxl, not for flux"),
        "nan": (WeightsError, write(tmp_path / "nan.safetensors", network, 1, change=spoilt), "NaN or infinity"),
        "shape": (WeightsError, write(tmp_path / "wide.safetensors", network, 1, change=stretched), "weights do not"),
        "missing": (FileError, str(tmp_path / "none.safetensors"), "no such file"),
        "page": (FileError, str(tmp_path / "page.safetensors"), "web page"),
        "twice": (RequestError, (good, copy), "named once"),
    }
    with engine_of(pipelines["flux"]) as engine:
        plain = engine.run(ask(deterministic=True))
        jobs = {name: engine.submit(ask(lora=lora)) for name, (_, lora, _) in bad.items()}
        fine = engine.submit(ask(deterministic=True))
        assert (pixels(fine.result()) == pixels(plain)).all()
        for name, (kind, _, words) in bad.items():
            with pytest.raises(kind, match=words) as caught:
                jobs[name].result()
            assert "\n" not in str(caught.value)
        assert (pixels(engine.run(ask(deterministic=True))) == pixels(plain)).all()
        counted = engine.counters()["adapters"]
    assert counted["pinned"] == 0 and counted["failures"] == 2


def test_models_that_adapters_are_not_for_say_so() -> None:
    pipeline = import_module("tests.tiny_flow").TinyFlowPipeline()
    with engine_of(pipeline) as engine, pytest.raises(RequestError, match=r"lora .* is not usable with infinity-nano"):
        engine.run(ask(lora="owner/style"))
    with engine_of(pipeline) as engine, pytest.raises(RequestError) as caught:
        engine.run(ask(lora="https://h.org/a.safetensors?token=secret"))
    assert "secret" not in str(caught.value.as_dict())


def test_what_the_model_lacks_is_told(pipelines: Pipelines, tmp_path: Path) -> None:
    def more(tensors: dict[str, torch.Tensor]) -> None:
        for half, shape in (("A", (2, 32)), ("B", (32, 2))):
            tensors[f"transformer.transformer_blocks.9.attn.to_q.lora_{half}.weight"] = torch.ones(shape)

    path = write(tmp_path / "more.safetensors", network_of(pipelines, "flux"), 1, change=more)
    with engine_of(pipelines["flux"]) as engine:
        (result,) = engine.run(ask(lora=path))
    (warning,) = result.metadata["warnings"]  # type: ignore[misc]
    assert "are not in this model" in warning and path in warning


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_bytes_are_foreseen_and_bounded(pipelines: Pipelines, tmp_path: Path) -> None:
    network = network_of(pipelines, "flux")
    paths = [write(tmp_path / f"{seed}.safetensors", network, seed) for seed in (1, 2)]
    plain, one = planned(pipelines["flux"], ask()), planned(pipelines["flux"], ask(lora=paths[0]))
    size = one.peak_bytes - plain.peak_bytes
    with engine_of(pipelines["flux"], adapter_memory=int(1.5 * size)) as engine:
        first = engine.run(ask(lora=paths[0]))
        engine.run(ask(lora=paths[1]))
        counted = engine.counters()["adapters"]
        assert (counted["entries"], counted["bytes"], counted["evictions"]) == (1, size, 1)
        assert (pixels(engine.run(ask(lora=paths[0]))) == pixels(first)).all()
        # Two that do not fit together wait for each other; one that never fits is told so.
        results = engine.run([ask(num_images=2, lora=path) for path in paths])
        assert (pixels(results[:1]) - pixels(first) <= 2).all()
        with pytest.raises(OutOfMemoryError, match="a larger adapter_memory"):
            engine.run(ask(lora=paths))


def test_a_model_that_is_let_go_takes_its_adapters_along(pipelines: Pipelines, tmp_path: Path) -> None:
    made = [pipelines["flux"], import_module("tests.tiny_flux").tiny_pipeline()]
    path = write(tmp_path / "style.safetensors", network_of(pipelines, "flux"), 1)

    def load(name: str, device: str, dtype: str | None) -> Any:
        return made[int(name)]

    with Engine(device="cpu", load=load, model_budget="1KB") as engine:
        engine.run(ask(model="0", lora=path))
        engine.run(ask(model="1"))
        assert engine.counters()["adapters"]["entries"] == 0


def test_parts_may_lie_anywhere_and_text_encoders_have_their_own(pipelines: Pipelines, tmp_path: Path) -> None:
    def texts(tensors: dict[str, torch.Tensor]) -> None:
        for half, shape in (("A", (2, 16)), ("B", (16, 2))):
            name = f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{half}.weight"
            tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    network = network_of(pipelines, "sdxl")
    folder = import_module("tests.tiny_sdxl").write_tiny_sdxl(tmp_path / "model", pipelines["sdxl"])
    bare = write(tmp_path / "bare.safetensors", network, 1, only="attn")
    path = write(tmp_path / "style.safetensors", network, 1, only="attn", change=texts)
    made: dict[str, list[np.ndarray]] = {}
    for mode in ("full", "group-offload", "offload+8bit"):
        with Engine(device="cpu", memory=mode, dtype="float32") as engine:
            results = [engine.run(ask(model=str(folder), steps=2, lora=lora)) for lora in ((), path, bare, ())]
        assert not any(result.metadata["warnings"] for (result,) in results)
        made[mode] = [pixels(result) for result in results]
        plain, styled, without_text, again = made[mode]
        assert (plain == again).all()
        assert min(np.abs(plain - styled).max(), np.abs(styled - without_text).max()) > 2
    assert (made["group-offload"][1] == made["full"][1]).all()


# ---- from elsewhere -------------------------------------------------------------------------------------------------


@pytest.fixture
def site(pipelines: Pipelines, tmp_path: Path) -> Iterator[Site]:
    content = Path(write(tmp_path / "served.safetensors", network_of(pipelines, "flux"), 1)).read_bytes()
    with served(Site({"/a.safetensors": Page(content), "/slow.safetensors": Page(content, pause=0.2)})) as serving:
        yield serving


def test_others_step_while_one_is_fetched_and_a_cancelled_one_ends(
    pipelines: Pipelines, site: Site, tmp_path: Path
) -> None:
    local = write(tmp_path / "local.safetensors", network_of(pipelines, "flux"), 2)
    site.silent = True
    with engine_of(pipelines["flux"]) as engine:
        waiting = engine.submit(ask(lora=f"{site.address}/a.safetensors"))
        assert engine.run([ask(), ask(lora=local)])
        assert not waiting.done()
        waiting.cancel()
        assert isinstance(waiting.wait(20), Cancelled)
        site.silent = False
        late = engine.submit(ask(lora=f"{site.address}/a.safetensors::0.5"))
        assert isinstance(late.wait(60), Done)
        assert late.result()[0].metadata["lora"][0]["source"].endswith("/a.safetensors")  # type: ignore[index]
        fetched = engine.counters()["adapters"]["fetched"]
        engine.run(ask(lora=f"{site.address}/a.safetensors"))
        assert engine.counters()["adapters"]["fetched"] == fetched == 1


def test_the_engine_closes_while_something_is_fetched(pipelines: Pipelines, site: Site) -> None:
    site.silent = True
    engine = engine_of(pipelines["flux"])
    waiting = engine.submit(ask(lora=f"{site.address}/a.safetensors"))
    engine.close(finish=False)
    assert isinstance(waiting.wait(20), Cancelled)
    site.silent = False


def test_nothing_is_fetched_offline(pipelines: Pipelines, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_OFFLINE", "1")
    with engine_of(pipelines["flux"]) as engine, pytest.raises(GessoError, match="offline"):
        engine.run(ask(lora=f"{site.address}/a.safetensors"))
    assert not site.asked


def test_a_host_that_has_it_not_fails_the_request(pipelines: Pipelines, site: Site) -> None:
    with engine_of(pipelines["flux"]) as engine, pytest.raises(RunError):
        engine.run(ask(lora=f"{site.address}/none.safetensors"))
