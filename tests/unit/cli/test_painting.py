"""The command line with the model that comes along: pictures, records, rerun, resume, Ctrl-C."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gesso.metadata import pixels_digest, read_record
from gesso.pictures import read_pixels
from tests.unit.cli.running import call, spawn


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("GESSO_OUTPUT", "GESSO_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_prompts_share_seeds_and_files_are_never_overwritten(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    arguments = ("generate", "a red star", "a blue ring", "--num-images", "2", "--seed", "7", "-o", "out")
    first = call(capsys, *arguments)
    assert first.status == 0
    names = [Path(line).name for line in first.out.splitlines()]
    assert names == [
        "0001-a-red-star-7.png",
        "0002-a-red-star-8.png",
        "0003-a-blue-ring-7.png",
        "0004-a-blue-ring-8.png",
    ]
    again = call(capsys, *arguments)
    assert [Path(line).name for line in again.out.splitlines()] == [name.replace(".png", "-2.png") for name in names]
    for name in names:  # deterministic by default: the same pixels
        copy = own_folder / "out" / name.replace(".png", "-2.png")
        assert pixels_digest(read_pixels(own_folder / "out" / name)) == pixels_digest(read_pixels(copy))


def test_two_processes_in_one_folder_keep_every_picture(own_folder: Path) -> None:
    arguments = ("generate", "a red star", "--num-images", "20", "--seed", "7", "-o", "out", "--name", "star")
    processes = [spawn(*arguments, folder=own_folder) for _ in range(2)]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [status for _, _, status in ended] == [0, 0], ended
    told = [Path(line).name for out, _, _ in ended for line in out.splitlines()]
    files = sorted(path.name for path in (own_folder / "out").iterdir())
    assert len(files) == 40
    assert sorted(told) == files
    assert sorted(read_record(own_folder / "out" / name).seed for name in files) == sorted([*range(7, 27)] * 2)


def test_a_picture_of_a_set_is_the_picture_alone(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    call(capsys, "generate", "a red star", "--num-images", "3", "--seed", "7", "--name", "set-{seed}")
    call(capsys, "generate", "a red star", "--seed", "9", "--name", "alone-{seed}")
    folder = own_folder / "gesso-output"
    assert read_pixels(folder / "set-9.png").tobytes() == read_pixels(folder / "alone-9.png").tobytes()


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_rerun_says_equal_for_every_format(capsys: pytest.CaptureFixture[str], format: str) -> None:
    made = json.loads(call(capsys, "generate", "a red star", "--seed", "7", "--format", format, "--json").out)
    outcome = call(capsys, "rerun", made["file"])
    assert (outcome.status, outcome.out) == (0, "equal\n")
    assert "warning" not in outcome.err


def test_rerun_says_different_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(call(capsys, "generate", "a red star", "--seed", "7").out.strip())
    with Image.open(path) as image:
        text, pixels = image.info["gesso"], image.copy()
    pixels.paste((0, 255, 0), (0, 0, 8, 8))
    info = PngInfo()
    info.add_itxt("gesso", text)
    pixels.save(path, pnginfo=info)
    outcome = call(capsys, "rerun", path, "-o", "again.png")
    assert (outcome.status, outcome.out) == (1, "different\n")
    assert "pixels were changed" in outcome.err
    assert call(capsys, "rerun", "again.png").out == "equal\n"
    verdict = json.loads(call(capsys, "rerun", path, "--json").out)
    assert verdict["verdict"] == "different"


def test_no_metadata_leaves_nothing_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    path = call(capsys, "generate", "a red star", "--no-metadata").out.strip()
    assert call(capsys, "show", path).status == 2


def test_quiet_prints_only_paths(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, "generate", "a red star", "--quiet")
    assert outcome.err == ""
    assert Path(outcome.out.strip()).exists()


def test_size_off_the_list_offers_the_nearest(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    outcome = call(capsys, "generate", "a red star", "--size", "1000x1000", "--quiet")
    assert outcome.status == 2
    assert "nearest" in outcome.error
    assert list((own_folder / "gesso-output").iterdir()) == []


def test_resume_makes_only_the_rest(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    command = ("generate", "a red star", "a blue ring", "--num-images", "2", "--guidance", "2")
    made = [Path(line) for line in call(capsys, *command).out.splitlines()]  # the seed was drawn
    made[1].unlink()
    other = call(capsys, "generate", "a red star", "--guidance", "3").out.strip()  # not the same command
    outcome = call(capsys, *command, "--resume")
    assert [Path(line) for line in outcome.out.splitlines()] == [made[1]]
    assert call(capsys, *command, "--resume").out == ""
    assert len(list((own_folder / "gesso-output").iterdir())) == 5
    assert Path(other).exists()
    assert read_record(made[1]).seed == read_record(made[0]).seed + 1


def test_ctrl_c_keeps_what_is_done_and_resume_makes_the_rest(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    command = ("generate", "a red star", "--seed", "1", "--num-images")
    process = spawn(*command, "2000", folder=own_folder)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.strip().endswith(".png")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    kept = [*first.split(), *out.split()]
    assert f"kept {len(kept)} of 2000 pictures" in err.splitlines()[-1]
    assert "Traceback" not in err
    files = sorted(path.name for path in (own_folder / "gesso-output").iterdir())
    assert files == sorted(Path(path).name for path in kept)  # and nothing half-written beside them
    rest = call(capsys, *command, str(len(kept) + 2), "--resume").out.splitlines()
    assert len(rest) == 2


def test_demo_paints_a_sheet_and_every_picture_reruns(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    done = json.loads(call(capsys, "demo", "--json").out)
    assert len(done["files"]) == 32
    with Image.open(done["sheet"]) as sheet:
        assert sheet.width > 1000
    assert all(read_record(Path(path)).request.deterministic for path in done["files"])
    assert call(capsys, "rerun", done["files"][-1]).out == "equal\n"
    started = time.perf_counter()
    assert call(capsys, "demo").status == 0  # again: its own files are replaced
    assert time.perf_counter() - started < 60
    assert len(list((own_folder / "gesso-output" / "demo").iterdir())) == 33


def test_models_and_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert "infinity-nano" in call(capsys, "models").out
    assert call(capsys, "models", "list").out == call(capsys, "models").out
    assert json.loads(call(capsys, "models", "show", "infinity-nano", "--json").out)["name"] == "infinity-nano"
    unknown = call(capsys, "models", "show", "infinity-nanu")
    assert unknown.status == 2
    assert "infinity-nano" in unknown.error
    plan = json.loads(call(capsys, "plan", "a red star", "--json").out)
    assert plan["flops"] > 0
    assert plan["request"]["width"] is not None


def test_a_full_disk_does_not_take_the_score(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    outcome = call(capsys, "eval", "shapes", "--prompts", "6", "--output", "score.json")
    assert outcome.status == 1
    assert outcome.out.splitlines()[-1].startswith("overall")
    assert outcome.err.splitlines()[-1] == "error: score.json: no space left on device; nothing was left of it"


def test_eval_scores_six_categories(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    outcome = call(capsys, "eval", "shapes", "--prompts", "12", "--output", "score.json", "--json")
    assert outcome.status == 0
    score = json.loads(outcome.out)
    assert len(score["categories"]) == 6
    assert sum(share["asked"] for share in score["categories"].values()) == 12
    whole = json.loads((own_folder / "score.json").read_text())
    assert len(whole["answers"]) == 12
    assert whole["overall"] == score["overall"]
