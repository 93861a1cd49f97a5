"""A run that was stopped, killed or damaged goes on bit for bit as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gesso.errors import FileError
from gesso.training import checkpoint, recipes
from gesso.training.recipes.recipe import Recipe
from tests.unit.training.tiny_recipes import (
    exported,
    infinity_recipe,
    log_of,
    same,
    state_of,
    stop_at,
    tokenizer_recipe,
    train,
)

KILLED = Path(__file__).with_name("killed_runs.py")


def _equal(run: Path, undisturbed: Path) -> bool:
    files = {path.name for path in run.iterdir()} == {path.name for path in undisturbed.iterdir()}
    return (
        files
        and same(state_of(run), state_of(undisturbed))
        and log_of(run) == log_of(undisturbed)
        and exported(run) == exported(undisturbed)
    )


def _recipe(kind: str, tokenizer_run: Path) -> Recipe:
    return tokenizer_recipe() if kind == "tokenizer" else infinity_recipe(tokenizer_run / "export")


@pytest.mark.parametrize("kind", ["tokenizer", "infinity"])
@pytest.mark.parametrize("stops", [(1,), (3,), (2, 5), (4, 5, 6)], ids=str)
def test_a_stopped_run_goes_on_bit_for_bit(
    tokenizer_run: Path, infinity_run: Path, tmp_path: Path, kind: str, stops: tuple[int, ...]
) -> None:
    """Parameters, optimizer, average, log and export; checkpoints lie at even steps."""
    recipe, folder = _recipe(kind, tokenizer_run), tmp_path / "run"
    for number, step in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder, resume=number > 0, report=stop_at(step))
    train(recipe, folder, resume=True)
    assert _equal(folder, tokenizer_run if kind == "tokenizer" else infinity_run)


def test_two_trainings_in_one_folder_are_one_too_many(tokenizer_run: Path, tmp_path: Path) -> None:
    """The second is refused before it writes anything, also where it would resume; the first goes on."""
    refusals: list[FileError] = []

    def train_here_too(step: int, steps: int, figures: object) -> None:
        with pytest.raises(FileError, match="another training writes here") as caught:
            train(tokenizer_recipe(), tmp_path / "run", resume=step > 2)
        refusals.append(caught.value)

    train(tokenizer_recipe(), tmp_path / "run", report=train_here_too)
    assert len(refusals) > 6
    assert exported(tmp_path / "run") == exported(tokenizer_run)


def test_other_seeds_are_other_runs(tokenizer_run: Path, tmp_path: Path) -> None:
    """Otherwise the test above says little."""
    train(tokenizer_recipe(seed=1), tmp_path / "run")
    assert log_of(tmp_path / "run")[0] != log_of(tokenizer_run)[0]


def test_a_finished_run_is_exported_again_with_its_scores(tokenizer_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_run, tmp_path / "run"))
    shutil.rmtree(folder / "export")
    steps: list[int] = []
    scores = train(tokenizer_recipe(), folder, resume=True, report=lambda step, steps_, figures: steps.append(step))
    assert set(steps) == {6}
    assert scores["psnr"] > 0
    assert exported(folder) == exported(tokenizer_run)


def test_a_longer_run_goes_on_from_a_finished_one(tokenizer_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_run, tmp_path / "run"))
    train(tokenizer_recipe(steps=8), folder, resume=True)
    assert state_of(folder)["step"] == 8
    assert json.loads((folder / "recipe.json").read_text())["loop"]["steps"] == 8


def test_resuming_what_was_never_begun_begins(tmp_path: Path, tokenizer_run: Path) -> None:
    train(tokenizer_recipe(), tmp_path / "run", resume=True)
    assert _equal(tmp_path / "run", tokenizer_run)


@pytest.mark.parametrize("step", [1, 6])
def test_a_folder_in_use_is_left_alone(tmp_path: Path, step: int) -> None:
    """Before the first checkpoint, too: another process may be at work there."""
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer_recipe(), tmp_path / "run", report=stop_at(step))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(FileError, match="a run lies here already; pass --resume to continue it, or name another"):
        train(tokenizer_recipe(), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_checkpoint_of_another_recipe_is_refused(tokenizer_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_run, tmp_path / "run"))
    with pytest.raises(FileError, match="holds a run with recipe tiny-tokenizer, not tiny-infinity; name another"):
        train(infinity_recipe(tokenizer_run / "export"), folder, resume=True)
    with pytest.raises(FileError, match="holds a run with seed 0, not 5; name another"):
        train(recipes.override(tokenizer_recipe(), {"seed": "5"}), folder, resume=True)
    (folder / "recipe.json").unlink()
    with pytest.raises(FileError, match="the checkpoint is of another recipe"):
        train(infinity_recipe(tokenizer_run / "export"), folder, resume=True)
    checkpoint.save(folder, 7, {"step": 7})
    with pytest.raises(FileError, match="the checkpoint is of another recipe"):
        train(tokenizer_recipe(), folder, resume=True)


def test_the_log_is_cut_to_the_checkpoint(tmp_path: Path, tokenizer_run: Path) -> None:
    """Lines of steps that are made again go, and so does a line that was cut short."""
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer_recipe(), folder, report=stop_at(5))
    with (folder / "log.jsonl").open("a") as file:
        file.write('[]\n{"loss": 1}\n{"step": 5, "lo')
    train(tokenizer_recipe(), folder, resume=True)
    assert log_of(folder) == log_of(tokenizer_run)


# ---- damage ---------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    """One bit of a parameter; torch alone would load it."""
    parameters = state_of(path.parent)["network"]
    assert isinstance(parameters, dict)
    content = bytearray(path.read_bytes())
    content[content.index(parameters["decoder.conv_out.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit of a tensor": _flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "foreign": lambda path: path.write_text("step 6"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tokenizer_run: Path, tmp_path: Path, damage: str
) -> None:
    folder = Path(shutil.copytree(tokenizer_run, tmp_path / "run"))
    shutil.rmtree(folder / "export")
    DAMAGES[damage](folder / "step-00000006.pt")
    assert state_of(folder)["step"] == 4
    train(tokenizer_recipe(), folder, resume=True)
    assert _equal(folder, tokenizer_run)


def test_when_every_checkpoint_is_damaged_it_says_so(tokenizer_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_run, tmp_path / "run"))
    for path in folder.glob("step-*.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(FileError, match=r"step-00000006\.pt: no checkpoint here can be read; remove the folder"):
        train(tokenizer_recipe(), folder, resume=True)


def test_the_newest_two_are_kept_and_others_files_stay(tmp_path: Path) -> None:
    (tmp_path / "step-final.pt").write_text("mine")
    for step in (1, 2, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, {"step": step})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-100000000.pt", "step-99999999.pt", "step-final.pt"]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1] == {"step": 100_000_000}


def test_what_a_killed_run_left_half_written_is_never_read_and_goes(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"step": 1})
    (tmp_path / "step-00000002.partial").write_bytes(b"half")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1] == {"step": 1}
    checkpoint.save(tmp_path, 3, {"step": 3})
    assert not list(tmp_path.glob("*.partial"))


# ---- being killed ---------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL half-way through writing a checkpoint, before it is renamed, in a log line, and at any moment."""
    folder, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(KILLED), str(folder), str(undisturbed)]
    root = Path(__file__).parents[3]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    outcomes = json.loads(ended.stdout)
    assert outcomes["killed"] == outcomes["runs"]
    assert same(state_of(folder), state_of(undisturbed))
    assert log_of(folder) == log_of(undisturbed)
    assert exported(folder)["tokenizer.safetensors"] == exported(undisturbed)["tokenizer.safetensors"]
    assert not [path for path in folder.iterdir() if "partial" in path.name]
