"""`gesso compare`: one sheet for several models, and everything checked before any of them paints."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from gesso.weights.catalogue import ZOO
from tests.unit.cli.running import call

NANO = "infinity-nano"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("GESSO_OUTPUT", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_two_models_on_one_sheet(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    shutil.copytree(ZOO / NANO, own_folder / "mine")
    models = ("--model", NANO, "--model", "./mine")
    made = call(capsys, "compare", "a red star", *models, "--num-images", "2", "--seed", "7", "--json")
    assert made.status == 0, made.err
    line = json.loads(made.out)
    assert [model["model"] for model in line["models"]] == [NANO, "./mine"]
    for model in line["models"]:
        assert model["seeds"] == [7, 8]
        assert len(model["seconds"]) == 2
        assert min(model["seconds"]) > 0
        assert model["warnings"] == []
    with Image.open(line["sheet"]) as sheet:
        assert sheet.width > 4 * 168  # four pictures side by side
    again = call(capsys, "compare", "a red star", *models, "--no-warm-up")
    assert [text.split()[0] for text in again.out.splitlines()] == [NANO, "./mine", "sheet:"]
    assert sorted(path.name for path in (own_folder / "gesso-output").iterdir()) == [
        "compare-a-red-star-2.png",
        "compare-a-red-star.png",
    ]


def test_warnings_are_told(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    models = ("--model", NANO, "--model", NANO, "--no-warm-up")
    assert "does not know 'zebra'" in call(capsys, "compare", "a red zebra", *models).err
    line = json.loads(call(capsys, "compare", "a red zebra", *models, "--json").out)
    assert all("zebra" in model["warnings"][0] for model in line["models"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", NANO), ("model", "2 to 12 times")),
        (("--model", NANO, "--model", "infinity-nana"), ("infinity-nana", "did you mean")),
        (("--model", NANO, "--model", "./none"), ("none", "no such folder")),
        (("--model", NANO, "--model", NANO, "--width", "72"), ("width", "72", NANO)),
        (("--model", NANO, "--model", NANO, "--num-images", "17"), ("num_images", "17", "16")),
        (("--model", NANO, "--model", NANO, "--seed", "-1"), ("seed", "-1")),
    ],
)
def test_unusable_before_any_work(
    capsys: pytest.CaptureFixture[str], own_folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    outcome = call(capsys, "compare", "a red star", *arguments)
    assert outcome.status == 2, outcome.err
    assert all(word in outcome.error for word in words), outcome.error
    assert list(own_folder.iterdir()) == []
