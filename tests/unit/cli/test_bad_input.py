"""Bad input at the command line: one clear line that names field, value and way out, the right status, no traceback.

Nothing here paints, so no weights are read; the catalogue is asked for the model's name.
"""

import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gesso import metadata
from gesso.request import parse_request
from gesso.weights.catalogue import ZOO
from tests.unit.cli.running import call


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("GESSO_OUTPUT", "GESSO_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a star", "--model", "infinity-nana"), ("model", "infinity-nana", "infinity-nano")),
        (("",), ("prompt", "1 to 2000 characters")),
        (("   ",), ("prompt", "1 to 2000 characters")),
        (("x" * 2001,), ("prompt", "2001 characters", "1 to 2000")),
        (("a star", ""), ("prompt", "1 to 2000 characters")),
        (("a star", "--guidance", "nan"), ("guidance", "nan", "0 to 100")),
        (("a star", "--guidance", "101"), ("guidance", "101", "0 to 100")),
        (("a star", "--steps", "0"), ("steps", "0", "1 to 1000")),
        (("a star", "--guidance-truncation", "2"), ("guidance_truncation", "2", "0 to 1")),
        (("a star", "--guidance", "1,x"), ("guidance", "1,x", "separated by commas")),
        (("a star", "--temperature", "0"), ("temperature", "0", "above 0 and at most 100")),
        (("a star", "--temperature", "inf"), ("temperature", "inf", "above 0 and at most 100")),
        (("a star", "--top-p", "nan"), ("top_p", "nan", "0 to 1")),
        (("a star", "--top-p", "1.5"), ("top_p", "1.5", "0 to 1")),
        (("a star", "--top-k", "-1"), ("top_k", "-1", "0 to")),
        (("a star", "--num-images", "0"), ("num_images", "0", "1 to 10000")),
        (("a star", "--num-images", "ten"), ("num_images", "ten", "1 to 10000")),
        (("a star", "--seed", "-1"), ("seed", "-1", "0 to 2^63 - 1")),
        (("a star", "--seed", str(2**63)), ("seed", "2^63 - 1")),
        (("a star", "--seed", str(2**63 - 1), "--num-images", "2"), ("seed", "2^63 - 1")),
        (("a star", "--width", "64.5"), ("width", "64.5", "a whole number")),
        (("a star", "--megapixels", "many"), ("megapixels", "many", "a number")),
        (("a star", "--width", "3"), ("width", "3", "8 to 16384")),
        (("a star", "--size", "huge"), ("size", "huge", "1024x768")),
        (("a star", "--size", "64x64", "--width", "64"), ("size", "--width and --height", "one of them")),
        (("a star", "--aspect", "1:0"), ("aspect", "1:0", "3:2")),
        (("a star", "--init-strength", "0.5"), ("init_strength", "0.5", "init_image")),
        (("a star", "--name", "../{index}"), ("name", "../{index}", "--output")),
        (("a star", "--name", "{width}"), ("name", "{width}", "{slug}")),
        (("a star", "--format", "gif"), ("--format", "gif", "png")),
        (("a star", "--file-quality", "50"), ("file_quality", "50", "webp, jpeg or mp4")),
        (("a star", "--format", "jpeg", "--file-quality", "0"), ("file_quality", "0", "1 to 100")),
        (("a star", "--json", "--quiet"), ("--json", "--quiet")),
        (("@none.txt",), ("none.txt", "no such file")),
    ],
)
def test_unusable_arguments(
    capsys: pytest.CaptureFixture[str], own_folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    outcome = call(capsys, "generate", *arguments)
    message = json.loads(outcome.err)["message"] if "--json" in arguments else outcome.error
    assert outcome.status == 2, outcome.err
    assert all(word in message for word in words), message
    assert outcome.out == ""
    assert list(own_folder.iterdir()) == []  # found before any work: not even a folder was made


def test_unwritable_folder_is_found_before_work(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    file = own_folder / "file"
    file.write_text("x")
    for folder in (file, file / "below", Path("/proc/none")):
        outcome = call(capsys, "generate", "a star", "-o", folder)
        assert outcome.status == 2
        assert "cannot be written to" in outcome.error
        assert str(folder) in outcome.error
        assert "--output" in outcome.error


def test_absent_weights_name_the_command_that_fetches_them(
    capsys: pytest.CaptureFixture[str], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GESSO_HOME", str(own_folder / "home"))
    for command in (("generate", "a star"), ("plan", "a star"), ("eval", "shapes")):
        outcome = call(capsys, *command, "--model", "infinity-2b")
        assert outcome.status == 3
        assert "infinity-2b" in outcome.error
        assert "get it with: gesso models pull infinity-2b" in outcome.error
    assert list(own_folder.iterdir()) == []


def test_errors_for_machines_are_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, "generate", "a star", "--json", "--guidance", "nan")
    error = json.loads(outcome.err)
    assert (error["error"], error["field"], error["value"]) == ("RequestError", "guidance", "nan")
    assert error["exit_status"] == outcome.status == 2
    usage = json.loads(call(capsys, "generate", "--json", "--nope").err)
    assert usage["error"] == "UsageError"


def picture(path: Path, record: dict[str, object] | None) -> Path:
    return metadata.save_picture(Image.new("RGB", (8, 8), "red"), path, record)


def record() -> dict[str, object]:
    request = parse_request({"prompt": "a star", "seed": 1, "width": 8, "height": 8})
    return metadata.describe(request, index=0, seed=1, model_digest="", device="cpu", dtype="float32")


@pytest.mark.parametrize("command", ["show", "rerun"])
def test_pictures_without_a_usable_record(capsys: pytest.CaptureFixture[str], own_folder: Path, command: str) -> None:
    plain = picture(own_folder / "plain.png", None)
    tampered = picture(own_folder / "tampered.png", record())
    with Image.open(tampered) as image:
        data, pixels = json.loads(image.info["gesso"]), image.copy()
    info = PngInfo()
    info.add_itxt("gesso", json.dumps({**data, "seed": 2}))
    pixels.save(tampered, pnginfo=info)
    text = own_folder / "text.png"
    text.write_text("no picture")
    for path, words in (
        (plain, "has no gesso metadata"),
        (tampered, "changed after it was written"),
        (text, "no picture"),
        (own_folder / "none.png", "no such file"),
        (own_folder, "folder"),
    ):
        outcome = call(capsys, command, path)
        assert outcome.status == 2
        assert words in outcome.error
        assert str(path) in outcome.error


def test_show_prints_the_request(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    path = picture(own_folder / "a.png", record())
    assert "prompt          a star" in call(capsys, "show", path).out
    shown = json.loads(call(capsys, "show", path, "--json").out)
    assert shown["request"]["prompt"] == "a star"
    assert shown["pixels_changed"] is False


def test_show_notices_changed_pixels(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    path = picture(own_folder / "a.png", record())
    with Image.open(path) as image:
        text, pixels = image.info["gesso"], image.copy()
    pixels.putpixel((0, 0), (0, 0, 0))
    info = PngInfo()
    info.add_itxt("gesso", text)
    pixels.save(path, pnginfo=info)
    outcome = call(capsys, "show", path)
    assert outcome.status == 0
    assert "pixels were changed" in outcome.err


def test_a_model_by_a_path_that_no_system_takes(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    for name in ("a" * 300, "/" + "b" * 5000):
        outcome = call(capsys, "generate", "a star", "--model", name)
        assert outcome.status == 2
        assert "file name too long" in outcome.error
        assert len(outcome.error) < 300


def test_a_model_that_ships_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, "plan", "a star", "--model", str(ZOO / "infinity-nano"))
    assert outcome.status == 0, outcome.err


def test_a_fault_of_ours_is_one_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(entry: object, build: object) -> None:
        raise KeyError("broken\nin two")

    monkeypatch.setattr("gesso.engine.loading.infinity.load_own", broken)
    outcome = call(capsys, "plan", "a star")
    assert outcome.status == 1
    assert "KeyError" in outcome.error
    assert "GESSO_DEBUG=1 shows where" in outcome.error
    assert json.loads(call(capsys, "plan", "a star", "--json").err)["exit_status"] == 1
    monkeypatch.setenv("GESSO_DEBUG", "1")
    with pytest.raises(KeyError):
        call(capsys, "plan", "a star")


def test_train_refuses_before_it_makes_a_folder(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    for arguments in (
        ("no-such-recipe",),
        ("shapes-tokenizer", "--set", "steps"),
        ("shapes-tokenizer", "--set", "x=1"),
        ("infinity-nano", "-o", "made/by/nobody"),  # which lacks its first stage
    ):
        outcome = call(capsys, "train", *arguments)
        assert outcome.status == (3 if "-o" in arguments else 2)
        assert outcome.error
    assert list(own_folder.iterdir()) == []


@pytest.mark.parametrize("prompts", ["0", "5", "1000000"])
def test_eval_refuses_numbers_out_of_range(capsys: pytest.CaptureFixture[str], prompts: str) -> None:
    outcome = call(capsys, "eval", "shapes", "--prompts", prompts)
    assert outcome.status == 2
    assert "prompts" in outcome.error


@pytest.mark.parametrize("score", ["shapes", "faces"])
def test_eval_refuses_a_folder_before_work(capsys: pytest.CaptureFixture[str], own_folder: Path, score: str) -> None:
    outcome = call(capsys, "eval", score, "-o", own_folder)
    assert outcome.status == 2
    assert outcome.error == f"{own_folder}: is a folder, not a file; name one in it, such as {own_folder}/score.json"
    assert list(own_folder.iterdir()) == []


def test_bad_settings_are_one_line(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    (own_folder / "gesso.toml").write_text("device = ")
    outcome = call(capsys, "config")
    assert outcome.status == 2
    assert "gesso.toml" in outcome.error


def test_config_names_every_source(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_DEVICE", "cpu")
    lines = [json.loads(line) for line in call(capsys, "config", "--json").out.splitlines()]
    assert {line["name"]: line["source"] for line in lines}["device"] == "environment GESSO_DEVICE"


def test_doctor_reports_every_topic(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [json.loads(line) for line in call(capsys, "doctor", "--json").out.splitlines()]
    topics = {finding["topic"] for finding in findings}
    assert topics == {"versions", "devices", "memory", "attention", "compiling", "extras", "files"}
    answers = {finding["what"]: finding["answer"] for finding in findings}
    assert answers["diffusion"] == "installed" or "pip install 'gesso[diffusion]'" in answers["diffusion"]
    assert answers["mps"] in ("none", "present, untested by this project")
    assert call(capsys, "doctor").status == 0
