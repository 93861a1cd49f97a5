"""What training writes is what the engine reads: exported models, whole or not at all, and `gesso train` end to end."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gesso.engine.loading import load_pipeline
from gesso.errors import RunError, WeightsError
from gesso.metadata import read_record
from gesso.models.infinity.scales import ScaleSchedule
from gesso.pipelines.infinity import InfinityPipeline
from gesso.request import GenerationRequest
from gesso.training.autoencoder import psnr
from gesso.training.export import save_model
from gesso.training.infinity import InfinityTask
from gesso.training.pictures import held_out_scenes, scenes_of_step, to_tensor
from gesso.weights import manifest
from gesso.weights.infinity import load_tokenizer
from tests.oracle import run_plainly
from tests.tiny_infinity import SQUARE, TOKENIZER
from tests.unit.cli.running import call
from tests.unit.training.tiny_recipes import infinity_recipe, state_of


def _averages(run: Path, part: str = "") -> dict[str, torch.Tensor]:
    average = state_of(run)["average"]
    assert isinstance(average, dict)
    prefix = f"average.{part}"
    return {name.removeprefix(prefix): value for name, value in average.items() if name.startswith(prefix)}


def test_a_tokenizer_round_trip(tokenizer_run: Path) -> None:
    """The average in bfloat16, read back; the file beside it says how it was made."""
    loaded = load_tokenizer(tokenizer_run / "export")
    assert loaded.config == TOKENIZER
    for name, value in _averages(tokenizer_run).items():
        assert torch.equal(loaded.get_parameter(name), value.bfloat16().float()), name
    facts = json.loads((tokenizer_run / "export/training.json").read_text())
    assert facts["recipe"]["recipe"] == "tiny-tokenizer"
    assert facts["evaluation"]["psnr"] > 0


def test_a_model_round_trip(infinity_run: Path) -> None:
    pipeline = load_pipeline(str(infinity_run / "export"), "cpu")
    assert isinstance(pipeline, InfinityPipeline)
    for name, value in _averages(infinity_run, "transformer.").items():
        assert torch.equal(pipeline.transformer.get_parameter(name), value.bfloat16().float()), name
    assert pipeline.defaults.temperature == (1.0, 0.9, 0.8, 0.7, 0.6)
    assert (pipeline.defaults.width, pipeline.defaults.guidance) == (32, 2.0)
    (output,) = run_plainly(pipeline, GenerationRequest(prompt="a red star", seed=1))
    assert output.image.size == (32, 32)


def test_a_model_carries_its_tokenizer(tokenizer_run: Path, infinity_run: Path) -> None:
    own, carried = (load_file(run / "export/tokenizer.safetensors") for run in (tokenizer_run, infinity_run))
    assert own.keys() == carried.keys()
    assert all(torch.equal(own[name], carried[name]) for name in own)
    image, _ = held_out_scenes(2, 32)
    latents = [load_tokenizer(run / "export").encode(image) for run in (tokenizer_run, infinity_run)]
    assert torch.equal(*latents)


def _save(folder: Path, value: float = 1.0) -> None:
    save_model(folder, {"part": {"weight": torch.full((2, 3), value).t()}}, {"family": "test"}, {"made": Path("here")})


def test_a_folder_is_written_as_a_whole(tmp_path: Path) -> None:
    _save(tmp_path / "deep/model")
    folder = tmp_path / "deep/model"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "manifest.json", "part.safetensors", "training.json"]
    listed = tuple(name for name in names if name != manifest.NAME)
    assert len(manifest.verify(folder, listed)) == 64
    assert load_file(folder / "part.safetensors")["weight"].dtype == torch.bfloat16
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1  # weights may be read by whoever may read the rest


def test_an_older_export_is_replaced_at_once(tmp_path: Path) -> None:
    _save(tmp_path / "model", 1.0)
    (tmp_path / "model/extra.txt").write_text("of the older one")
    _save(tmp_path / "model", 2.0)
    assert not (tmp_path / "model/extra.txt").exists()
    assert float(load_file(tmp_path / "model/part.safetensors")["weight"][0, 0]) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_older_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def fail(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(RunError, match=r"model .* could not be written: .*No space left on device"):
        _save(tmp_path / "model", 2.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_steps_batch_is_a_function_of_step_and_seed() -> None:
    one, captions = scenes_of_step(3, 4, 32, 0)
    again, _ = scenes_of_step(3, 4, 32, 0)
    after, _ = scenes_of_step(4, 4, 32, 0)
    other, _ = scenes_of_step(3, 4, 32, 1)
    assert torch.equal(one, again)
    assert not torch.equal(one, after)
    assert not torch.equal(one, other)
    assert (one.shape, len(captions)) == ((4, 3, 32, 32), 4)
    assert -1 <= float(one.min()) < float(one.max()) <= 1


def test_bytes_to_tensors() -> None:
    pixels = np.array([[[[0, 127, 255]]]], dtype=np.uint8)
    assert to_tensor(pixels).flatten().tolist() == pytest.approx([-1, -1 / 255, 1], abs=1e-6)


def test_psnr_of_a_known_error() -> None:
    image = torch.zeros(2, 3, 4, 4)
    assert psnr(image + 0.2, image) == pytest.approx(20.0, abs=1e-3)


# ---- the command ----------------------------------------------------------------------------------------------------

TINY_TOKENIZER = ("settings.network.width=4", "groups=2", "batch=2", "held_out=2", "partial_share=0.5")
TINY_NANO = (
    "settings.network.depth=1",
    "settings.network.width=32",
    "settings.text.width=16",
    "settings.text.depth=1",
    "text_width=16",
    "batch=2",
    "held_out=2",
    "compile=false",
    "warmup=1",
)


def _train(capsys: pytest.CaptureFixture[str], recipe: str, values: tuple[str, ...], *more: str) -> dict[str, object]:
    changes = [part for value in (*values, "steps=2", "log_every=1") for part in ("--set", value)]
    outcome = call(capsys, "train", recipe, *changes, *more)
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out.splitlines()[-1])


def test_from_nothing_to_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gesso train` twice, by the real recipes made tiny, then `gesso generate` with what came out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    scores = _train(capsys, "shapes-tokenizer", TINY_TOKENIZER)
    assert Path(str(scores["folder"])) == Path("runs/shapes-tokenizer")
    assert isinstance(scores["psnr"], float)
    scores = _train(capsys, "infinity-nano", TINY_NANO, "-o", "mine")
    assert isinstance(scores["bit_accuracy"], float)
    made = call(capsys, "generate", "a red star", "--model", "mine/export", "--seed", "1")
    assert made.status == 0, made.err
    record = read_record(Path(made.out.strip()))
    assert record is not None
    assert call(capsys, "rerun", made.out.strip()).out == "equal\n"
    again = call(capsys, "train", "infinity-nano", "-o", "mine")
    assert (again.status, again.out) == (2, "")
    assert again.error == "mine: a run lies here already; pass --resume to continue it, or name another"
    assert _train(capsys, "infinity-nano", TINY_NANO, "-o", "mine", "--resume") == scores


def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    missing = call(capsys, "train", "infinity-nano")
    assert (missing.status, missing.error.rpartition(": ")[2]) == (3, "gesso train shapes-tokenizer")
    wrong = call(capsys, "train", "infinity-nano", "--set", "steps=many")
    assert (wrong.status, wrong.error) == (2, 'steps "many" is not a whole number')


def test_ctrl_c_names_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gesso.training.run", interrupted)
    outcome = call(capsys, "train", "shapes-tokenizer", "-o", tmp_path / "run")
    assert outcome.status == 130
    assert outcome.error.startswith("interrupted; the same command with --resume goes on in")


def test_going_on_from_an_exported_model(tokenizer_run: Path, infinity_run: Path, tmp_path: Path) -> None:
    """Training begins with the exported weights; a model of other sizes is refused, naming tensors."""
    recipe = infinity_recipe(tokenizer_run / "export")
    settings = replace(recipe.settings, start_from=str(infinity_run / "export"))  # type: ignore[type-var]
    network = InfinityTask(settings, batch=2, seed=0).network  # type: ignore[arg-type]
    exported = load_file(infinity_run / "export" / "transformer.safetensors")
    assert all(torch.equal(network.transformer.get_parameter(name), value.float()) for name, value in exported.items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    other = replace(settings, network=replace(settings.network, depth=1))  # type: ignore[attr-defined]
    with pytest.raises(WeightsError, match=r"blocks\.1"):
        InfinityTask(other, batch=2, seed=0)


def test_scales_that_the_earlier_model_lacked(tokenizer_run: Path, infinity_run: Path) -> None:
    recipe = infinity_recipe(tokenizer_run / "export")
    grids = (*SQUARE.grids, (4, 4), (4, 4))
    longer = {"start_from": str(infinity_run / "export"), "schedule": ScaleSchedule(grids, SQUARE.rotary_grid)}
    settings = replace(recipe.settings, **longer)  # type: ignore[type-var]
    rows_NC = InfinityTask(settings, batch=2, seed=0).network.transformer.scale_embedding.weight  # type: ignore[arg-type]
    exported = load_file(infinity_run / "export" / "transformer.safetensors")["scale_embedding.weight"].float()
    last = len(SQUARE) - 1
    assert torch.equal(rows_NC[: last + 1], exported[: last + 1])
    assert torch.equal(rows_NC[last + 1 : last + 3], exported[last].expand(2, -1))
    assert torch.equal(rows_NC[last + 3 :], exported[last + 3 :])
