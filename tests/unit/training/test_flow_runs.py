"""Runs of the flow trainer: resumed bit for bit, stored latents, exports that load and share what they can."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from gesso.engine.loading import flow_nano as loading
from gesso.engine.loading.build import Build
from gesso.errors import FileError, WeightsError
from gesso.request import GenerationRequest
from gesso.training import latents, recipes
from gesso.training.flow import FlowTask
from gesso.training.painting import paint
from gesso.weights import catalogue, flow_nano, manifest, shared
from tests.unit.cli.running import call
from tests.unit.training.tiny_recipes import (
    FLUX,
    NETWORKS,
    exported,
    flow_recipe,
    log_of,
    same,
    state_of,
    stop_at,
    stopped_and_resumed,
    train,
)


def _equal(run: Path, undisturbed: Path) -> bool:
    return (
        {path.name for path in run.iterdir()} == {path.name for path in undisturbed.iterdir()}
        and same(state_of(run), state_of(undisturbed))
        and log_of(run) == log_of(undisturbed)
        and exported(run) == exported(undisturbed)
    )


@pytest.mark.parametrize("family", NETWORKS)
def test_a_stopped_run_goes_on_bit_for_bit(
    flow_runs: dict[str, Path], kl_autoencoder_run: Path, words: Path, tmp_path: Path, family: str
) -> None:
    """Stopped while latents are being stored, and at steps between checkpoints."""
    recipe = flow_recipe(NETWORKS[family], kl_autoencoder_run / "export", words, precompute=10)
    folder = tmp_path / "run"

    def stop_while_storing(step: int, steps: int, figures: Mapping[str, float]) -> None:
        if "prepared" in figures:
            raise KeyboardInterrupt

    for number, report in enumerate((stop_while_storing, stop_at(1), stop_at(5))):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder, resume=number > 0, report=report)
    train(recipe, folder, resume=True)
    assert _equal(folder, flow_runs[family])


def test_with_fresh_scenes_too(kl_autoencoder_run: Path, words: Path, tmp_path: Path) -> None:
    recipe = flow_recipe(FLUX, kl_autoencoder_run / "export", words, train_text=True)
    run = stopped_and_resumed(recipe, tmp_path)
    assert not (run / latents.FOLDER).exists()


def test_a_finished_run_stores_nothing_again(
    flux_run: Path, kl_autoencoder_run: Path, words: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(flux_run, tmp_path / "run"))
    shutil.rmtree(folder / latents.FOLDER)
    train(flow_recipe(FLUX, kl_autoencoder_run / "export", words, precompute=10), folder, resume=True)
    assert not (folder / latents.FOLDER).exists()
    assert exported(folder) == exported(flux_run)


# ---- exports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NETWORKS)
def test_an_export_is_the_average_and_carries_its_parts(
    flow_runs: dict[str, Path], kl_autoencoder_run: Path, words: Path, family: str
) -> None:
    """The word encoder and the autoencoder are the very bytes that they came from, so models can share them."""
    folder = flow_runs[family] / "export"
    model = flow_nano.load(folder)
    averages = state_of(flow_runs[family])["average"]
    assert isinstance(averages, dict)
    for name, value in model.network.named_parameters():
        assert torch.equal(value, averages[f"average.velocity.transformer.{name}"].bfloat16().float()), name
    assert (folder / "text.safetensors").read_bytes() == (words / "text.safetensors").read_bytes()
    source = kl_autoencoder_run / "export" / "autoencoder.safetensors"
    assert (folder / "autoencoder.safetensors").read_bytes() == source.read_bytes()
    assert (model.family, model.stride, model.shift, model.sizes) == (family, 4, 1.0, ((32, 32),))
    assert model.defaults == {"width": 32, "height": 32, "steps": 2, "guidance": 2.0}
    assert len(model.digest) == 64


@pytest.mark.parametrize("family", NETWORKS)
def test_an_export_paints_and_plans(flow_runs: dict[str, Path], family: str) -> None:
    entry = catalogue.find(str(flow_runs[family] / "export"))
    assert entry.family == family
    request = GenerationRequest(prompt="a red star on a white moon", seed=1)
    (picture,) = paint(loading.load_own(entry, Build(device="cpu", dtype=torch.float32)), [request])
    assert picture.size == (32, 32)
    planned = loading.load_own(entry, Build(device="meta")).plan(request)
    assert planned == loading.load_own(entry, Build(device="cpu", dtype=torch.float32)).plan(request)
    assert (planned.steps, planned.request.guidance) == (2, 2.0)
    assert any("moon" in warning for warning in planned.warnings)


@pytest.mark.parametrize("family", NETWORKS)
def test_without_weights_none_are_read(flow_runs: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(flow_runs[family] / "export" / "config.json", folder / "config.json")
    model = flow_nano.load(folder, weights=False)
    assert {parameter.device.type for parameter in model.network.parameters()} == {"meta"}
    assert model.digest == ""


@pytest.fixture
def model(flux_run: Path, tmp_path: Path) -> Path:
    """A copy of an export, to damage."""
    return Path(shutil.copytree(flux_run / "export", tmp_path / "model"))


def _seal(folder: Path) -> None:
    (folder / manifest.NAME).write_text(json.dumps(manifest.make(folder)))


@pytest.mark.parametrize(
    ("changes", "words_said"),
    [
        ({"family": "infinity"}, "holds a model of the family infinity"),
        ({"network": None}, "has no values for FluxConfig"),
        ({"network": {"depth": 2}}, "unknown fields: depth"),
        ({"scheduler": {"shift": 0}}, "shift must be above 0"),
        ({"sizes": []}, "lacks sizes"),
        ({"sizes": [[32, 36]]}, "[32, 36] is no size in multiples of 8 pixels"),
        ({"sizes": [[32]]}, "[32] is no size"),
        ({"sizes": [[40, 40]]}, "its default size is none of its sizes"),
        ({"generation": {"width": 32, "height": 32, "steps": 0}}, "its generation defaults are unusable: steps 0"),
        ({"generation": 3}, "lacks generation"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(model: Path, changes: dict[str, object], words_said: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    _seal(model)
    with pytest.raises(FileError) as caught:
        flow_nano.load(model)
    assert words_said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_of_other_models_are_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["autoencoder"]["latent_channels"] = 3
    (model / "config.json").write_text(json.dumps(config))
    _seal(model)
    with pytest.raises(FileError, match="the autoencoder has 3 channels where the network has 2"):
        flow_nano.load(model)


def test_damaged_weights_are_refused(model: Path) -> None:
    path = model / "transformer.safetensors"
    tensors = load(path.read_bytes())  # a file that is mapped must not be cut short
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(WeightsError, match=r"transformer\.safetensors has 100 bytes"):
        flow_nano.load(model)
    missing = tensors.pop("proj_out.bias")
    save_file(tensors | {"proj_out.more": missing}, path)
    _seal(model)
    with pytest.raises(WeightsError) as caught:
        flow_nano.load(model)
    assert (caught.value.missing, caught.value.unexpected) == (("proj_out.bias",), ("proj_out.more",))
    path.unlink()
    with pytest.raises(WeightsError, match="is missing"):
        flow_nano.load(model)


# ---- the command ----------------------------------------------------------------------------------------------------

TINY_AUTOENCODER = ("latent_channels=2", "widths=[4,4,8]", "groups=2", "batch=2", "held_out=2", "measured=8")
TINY_NANO = (
    "in_channels=8",
    "num_single_layers=1",
    "num_attention_heads=1",
    "compile=false",
    "batch=2",
    "held_out=2",
    "precompute=4",
    "warmup=1",
    'generation=[["steps",2]]',
)


def test_from_nothing_to_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gesso train` twice, by the real recipes made tiny; text features are those of the nano model that ships."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    missing = call(capsys, "train", "flux-nano")
    assert (missing.status, missing.error.rpartition(": ")[2]) == (3, "gesso train shapes-autoencoder")
    for recipe, values in (("shapes-autoencoder", TINY_AUTOENCODER), ("flux-nano", TINY_NANO)):
        changes = [part for value in (*values, "steps=1") for part in ("--set", value)]
        outcome = call(capsys, "train", recipe, *changes)
        assert outcome.status == 0, outcome.err
    model = flow_nano.load(Path("runs/flux-nano/export"))
    assert model.sizes == ((64, 64),)
    assert model.text.config.width == 128


@pytest.mark.parametrize("name", ["flux-nano", "z-image-nano"])
def test_the_real_recipes_fit_the_zoo(name: str) -> None:
    """At most 8 MB with all parts, in bfloat16."""
    recipe = recipes.load(name)
    assert recipe.make is FlowTask
    settings = recipe.settings
    autoencoder = recipes.load("shapes-autoencoder").task().network
    network = flow_nano.FAMILIES[name.removesuffix("-nano")].build(settings.network)  # type: ignore[attr-defined]
    numbers = sum(parameter.numel() for part in (autoencoder, network) for parameter in part.parameters())
    assert 2_500_000 <= sum(parameter.numel() for parameter in network.parameters()) <= 4_000_000
    text = shared.part(catalogue.ZOO / "infinity-nano", "text.safetensors")
    assert 2 * numbers + text.stat().st_size <= 7_950_000
