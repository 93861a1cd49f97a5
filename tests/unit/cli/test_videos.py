"""The command line with a model that makes videos: MP4 by default, shown, made again, resumed, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gesso.metadata import read_record
from gesso.videos import read_frames
from tests.tiny_hunyuan_video import write_tiny_hunyuan_video
from tests.unit.cli.running import Outcome, call

SMALL = ("--width", "32", "--height", "32", "--frames", "5", "--fps", "8", "--steps", "2", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hunyuan_video(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("GESSO_OUTPUT", "GESSO_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def refused(outcome: Outcome) -> str:
    assert outcome.status == 2
    return outcome.error


def test_made_shown_and_made_again(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    outcome = call(capsys, "generate", "a red star", "--model", model, *SMALL, "--seed", "7", "--num-images", "2")
    paths = [Path(line) for line in outcome.out.splitlines()]
    assert [path.name for path in paths] == ["0001-a-red-star-7.mp4", "0002-a-red-star-8.mp4"]
    assert "making" not in outcome.err and "2 videos in" in outcome.err
    frames = list(read_frames(paths[0]))
    assert (len(frames), frames[0].size) == (5, (32, 32))
    shown = call(capsys, "show", paths[0])
    assert "frames          5" in shown.out and "fps             8.0" in shown.out
    again = call(capsys, "rerun", paths[0], "--output", "again.mp4")
    assert (again.status, again.out) == (0, "equal\n")
    assert read_record(Path("again.mp4")).pixels == read_record(paths[0]).pixels


def test_json_and_resume(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    command = ("generate", "a red star", "--model", model, *SMALL)
    line = json.loads(call(capsys, *command, "--json").out)
    assert (line["frames"], line["fps"], line["width"]) == (5, 8.0, 32)
    assert call(capsys, *command, "--resume").out == ""


def test_a_video_that_is_made_otherwise_is_different(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """The record still fits; the pixels before coding are others, so the frames of the file are looked at."""
    path = call(capsys, "generate", "a red star", "--model", model, *SMALL, "--seed", "7").out.strip()
    record = read_record(Path(path))
    from gesso.metadata import save_video

    frames = list(read_frames(Path(path)))
    inverted = [frame.point(lambda value: 255 - value) for frame in frames]
    save_video(inverted, 8.0, Path("inverted.mp4"), record.data)
    outcome = call(capsys, "rerun", "inverted.mp4")
    assert (outcome.status, outcome.out) == (1, "different\n")
    save_video(frames[:3], 8.0, Path("short.mp4"), record.data)
    assert json.loads(call(capsys, "rerun", "short.mp4", "--json").out)["largest_difference"] is None


def test_plan_says_how_long(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    outcome = call(capsys, "plan", "a red star", "--model", model, *SMALL)
    assert "32x32, 5 frames at 8 a second" in outcome.out
    assert "2 a video" in outcome.out


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--frames", "24"), "frames 24 is not one more than a multiple of 4 for"),
        (("--frames", "24"), "nearest: 21 or 25"),
        (("--frames", "600"), "nearest: 257"),
        (("--frames", "0"), "frames 0 is not a whole number from 1 to 10000"),
        (("--frames", "many"), 'frames "many" is not a whole number'),
        (("--fps", "0"), "fps 0.0 is not a number from 1 to 240"),
        (("--width", "9999"), "nearest: 2048"),
        (("--height", "40"), "height 40 is not a multiple of 16"),
        (("--format", "png"), "a format of videos, which"),
        (("--scheduler", "none"), "a scheduler that is known"),
        (("--init-image", "absent.png"), "init_image"),
    ],
)
def test_bad_values(capsys: pytest.CaptureFixture[str], model: Path, options: tuple[str, str], words: str) -> None:
    arguments = [value for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] != options[0] for value in pair]
    outcome = call(capsys, "generate", "a red star", "--model", model, *arguments, *options, "--quiet")
    assert words in refused(outcome)
    assert not Path("gesso-output").exists() or not list(Path("gesso-output").iterdir())


def test_a_model_of_pictures_makes_no_videos(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(call(capsys, "generate", "a red star", "--format", "mp4"))
    assert message == 'format "mp4" is not a format of pictures, which infinity-nano makes; use png, webp, jpeg'
    outcome = call(capsys, "generate", "a red star", "--frames", "5", "--fps", "8")
    assert "warning: infinity-nano has no use for frames" in outcome.err
    assert outcome.out.strip().endswith(".png")


def test_without_the_library_nothing_is_begun(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    outcome = call(capsys, "generate", "a red star", "--model", model, *SMALL)
    assert outcome.status == 3
    assert outcome.error == "av, which reads and writes MP4, is missing; get it with: pip install 'gesso[video]'"
