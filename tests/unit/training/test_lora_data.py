"""Pictures and captions to train LoRAs on: what is found, and one line that names the file for all that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from gesso.errors import FileError
from gesso.training.lora.data import check_sizes, find_examples, pixels
from gesso.training.lora.settings import LoraSettings
from tests.tiny_lora import CAPTIONS, write_pictures
from tests.unit.cli.running import call


def _settings(data: Path, **fields: object) -> LoraSettings:
    return LoraSettings(model="none", data=str(data), **fields)  # type: ignore[arg-type]


def test_a_folder_and_its_captions(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data")
    (folder / "notes.md").write_text("no picture")
    found = find_examples(_settings(folder))
    assert [(each.path.name, each.caption) for each in found] == [(f"{i}.png", text) for i, text in enumerate(CAPTIONS)]
    assert len({each.digest for each in found}) == len(CAPTIONS)
    told = find_examples(_settings(folder, caption="a chalk drawing", trigger="chalk"))
    assert {each.caption for each in told} == {"a chalk drawing"}
    assert find_examples(_settings(folder, trigger="chalk"))[0].caption == "chalk, a red star"


def test_json_lines(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    lines = [json.dumps({"image": f"pictures/{i}.png", "caption": text}) for i, text in enumerate(CAPTIONS)]
    listed = tmp_path / "data.jsonl"
    listed.write_text("\n".join([lines[1], "", lines[0]]) + "\n")
    assert [each.caption for each in find_examples(_settings(listed))] == [CAPTIONS[1], CAPTIONS[0]]


def test_json_lines_end_where_lines_of_json_do(tmp_path: Path) -> None:
    """JSON may hold U+2028, U+2029 and U+0085 as they are, which some take for ends of lines."""
    write_pictures(tmp_path)
    texts = ("a\u2028red star", "a\u2029blue ring", "a\u0085green square")
    lines = [json.dumps({"image": f"{i}.png", "caption": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    for ending in ("\n", "\r\n"):
        (tmp_path / "data.jsonl").write_bytes((ending.join(lines) + ending).encode())
        found = find_examples(_settings(tmp_path / "data.jsonl"))
        assert [each.caption for each in found] == ["a red star", "a blue ring", "a green square"]


def test_pictures_are_turned_and_cut_about_their_middle(tmp_path: Path) -> None:
    """A picture on its side, of which EXIF says so, and whose middle third alone is red."""
    upright = Image.new("RGB", (30, 90), "white")
    upright.paste("red", (0, 30, 30, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("red")
    (example,) = find_examples(_settings(tmp_path))
    image_13HW = pixels(example, 16, 16)
    assert image_13HW.shape == (1, 3, 16, 16)
    assert torch.allclose(image_13HW[0, :, 4:12].mean(dim=(1, 2)), torch.tensor([1.0, -1.0, -1.0]), atol=0.02)


LINES = {
    "no JSON": ("{", "data.jsonl, line 1: is no JSON"),
    "no image": ('{"caption": "x"}', "line 1: names no image"),
    "no text": ('{"image": "data/0.png"}', "line 1: has no caption for data/0.png"),
    "outside": ('{"image": "../secret.png", "caption": "x"}', "which does not lie in it"),
    "absolute": ('{"image": "/etc/passwd", "caption": "x"}', "which does not lie in it"),
    "absent": ('{"image": "data/9.png", "caption": "x"}', "9.png: no such file"),
    "nothing": ("\n", "data.jsonl: holds no pictures"),
}
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "no such folder or file"),
    "empty": (lambda data: [path.unlink() for path in data.iterdir()], "data: holds no pictures"),
    "no caption": (lambda data: (data / "1.txt").unlink(), "1.png: has no caption beside it (1.txt); set caption=TEXT"),
    "empty caption": (lambda data: (data / "1.txt").write_text(" \n"), "1.txt: is empty"),
    "no UTF-8": (lambda data: (data / "1.txt").write_bytes(b"\xff\xfe\x00"), "1.txt: cannot be read as text"),
    "link": (lambda data: (data / "3.png").symlink_to("/etc/passwd"), "is asked for 3.png, which does not lie in it"),
    "damaged": (
        lambda data: (data / "1.png").write_bytes((data / "1.png").read_bytes()[:90]),
        "1.png: cannot be read",
    ),
    "no picture": (lambda data: (data / "1.png").write_text("hello"), "1.png: is no picture that can be read"),
    "tiny": (
        lambda data: Image.new("RGB", (2, 2)).save(data / "1.png"),
        "1.png: has 2x2 pixels, which 64x64 would enlarge 32.0 times; leave it out, or set most_enlarged=32",
    ),
}


def _broken(folder: Path, case: str) -> tuple[Path, str]:
    """Data with something wrong, and what is said of it."""
    data, listed = write_pictures(folder / "data"), folder / "data.jsonl"
    if case in LINES:
        listed.write_text(LINES[case][0])
        return listed, LINES[case][1]
    spoil, problem = FILES[case]
    spoil(data)
    return data, problem


@pytest.mark.parametrize("case", [*LINES, *FILES])
def test_what_is_wrong_is_one_line(tmp_path: Path, case: str) -> None:
    data, problem = _broken(tmp_path, case)
    with pytest.raises(FileError) as caught:
        check_sizes(find_examples(_settings(data)), 64, 64, 2.0)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_something_must_be_left_to_learn(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds 3 pictures, of which held_out 3 leaves none"):
        find_examples(_settings(write_pictures(tmp_path), held_out=3))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("lora",), 'recipe "lora" is not usable without model; name it with --model'),
        (("lora", "--model", "flux-nano"), "not usable without data; name it with --data"),
        (("lora", "--model", "flux-nanno", "--data", "x"), "did you mean flux-nano"),
        (("lora", "--model", "flux-nano", "--data", "x"), "x: no such folder or file"),
        (("infinity-nano", "--model", "flux-nano"), 'model "flux-nano" is not usable with the recipe infinity-nano'),
        (("lora", "--model", "flux-nano", "--data", "x", "--set", "rank=0"), "rank 0"),
    ],
)
def test_the_command_refuses_before_it_makes_a_folder(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call(capsys, "train", *arguments)
    assert (outcome.status, problem in outcome.error) == (2, True), outcome.error
    assert list(tmp_path.iterdir()) == []
