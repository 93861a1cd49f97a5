"""Records in pictures: round trips in every format, refusal of whatever was damaged or changed, migration."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gesso import metadata, pictures
from gesso.errors import FileError, RequestError
from gesso.events import Result
from gesso.request import GenerationRequest, parse_request


def make_picture(side: int = 24) -> Image.Image:
    picture = Image.new("RGB", (side, side))
    picture.putdata([(x * 9 % 256, y * 7 % 256, (x * y) % 256) for y in range(side) for x in range(side)])
    return picture


def make_record(**fields: object) -> dict[str, object]:
    request = parse_request(
        {"prompt": "näh 星 😀 star", "seed": 7, "width": 24, "height": 24, "guidance": [1, 3.5]} | fields
    )
    return metadata.describe(
        request,
        index=0,
        seed=7,
        model_digest="sha256:abc",
        device="cpu",
        dtype="float32",
        seconds={"step": 0.123456},
        given=metadata.digests_of_given(request),
    )


@pytest.mark.parametrize("ending", ["png", "webp", "jpg", "jpeg"])
def test_record_comes_back_from_every_format(tmp_path: Path, ending: str) -> None:
    record = make_record()
    path = Result(image=make_picture(), seed=7, index=0, metadata=record).save(tmp_path / f"a.{ending}")
    read = metadata.read_record(path)
    assert read.request == parse_request(dict(record["request"]))  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert (read.seed, read.index, read.model_digest) == (7, 0, "sha256:abc")
    assert read.pixels == metadata.pixels_digest(make_picture())
    assert read.request_for_this_picture().num_images == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # nothing is left beside it


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, ending: str) -> None:
    path = metadata.save_picture(make_picture(), tmp_path / f"a.{ending}", make_record())
    assert metadata.pixels_digest(pictures.read_pixels(path)) == metadata.read_record(path).pixels


def test_parameters_text_is_what_other_programs_read(tmp_path: Path) -> None:
    path = metadata.save_picture(make_picture(), tmp_path / "a.png", make_record(negative="blur"))
    with Image.open(path) as image:
        text = image.info["parameters"]
    assert text.startswith("näh 星 😀 star\nNegative prompt: blur\nSeed: 7, ")
    assert "Size: 24x24" in text
    assert "Model: infinity-nano" in text


def test_without_metadata_nothing_is_written(tmp_path: Path) -> None:
    path = Result(image=make_picture(), seed=7, index=0, metadata=make_record()).save(
        tmp_path / "a.png", with_metadata=False
    )
    with pytest.raises(FileError, match="no gesso metadata"):
        metadata.read_record(path)


def rewrite(path: Path, change: Callable[[dict[str, object]], None], *, seal: bool = False) -> None:
    """Changes the record in a PNG as a careless editor would; with `seal`, as somebody who also renews its digest."""
    with Image.open(path) as image:
        data = json.loads(image.info["gesso"])
        pixels = image.copy()
    change(data)
    if seal:
        data = metadata.sealed(data, metadata.pixels_digest(pixels))
    text = PngInfo()
    text.add_itxt("gesso", json.dumps(data))
    pixels.save(path, pnginfo=text)


def test_a_changed_record_is_refused(tmp_path: Path) -> None:
    path = metadata.save_picture(make_picture(), tmp_path / "a.png", make_record())
    rewrite(path, lambda data: data.update(seed=8))
    with pytest.raises(FileError, match="changed after it was written"):
        metadata.read_record(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "upgrade gesso"),
        ({"schema": "one"}, "names no schema"),
        ({"schema": 0}, "names no schema"),
        ({"request": {"prompt": ""}}, "cannot be used"),
        ({"request": {"prompt": "x", "colour": 1}}, "cannot be used"),
        ({"request": 3}, "no usable request"),
        ({"seed": "seven"}, "no usable seed"),
        ({"index": True}, "no usable index"),
        ({"model": None}, "no usable model"),
        ({"versions": []}, "no usable versions"),
    ],
)
def test_records_that_make_no_sense_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = metadata.save_picture(make_picture(), tmp_path / "a.png", make_record())
    rewrite(path, lambda data: data.update(change), seal=True)
    with pytest.raises(FileError, match=message):
        metadata.read_record(path)


@pytest.mark.parametrize("text", ["", "no json", "[1, 2]", '"text"', "{", "[" * 5000, "NaN"])
def test_foreign_text_is_refused(tmp_path: Path, text: str) -> None:
    info = PngInfo()
    info.add_itxt("gesso", text)
    make_picture().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(FileError):
        metadata.read_record(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"])
def test_files_that_are_no_pictures_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(FileError):
        metadata.read_record(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        metadata.read_record(tmp_path / "none.png")
    with pytest.raises(FileError, match="folder"):
        metadata.read_record(tmp_path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_pictures_are_refused(tmp_path: Path, kept: float) -> None:
    path = metadata.save_picture(make_picture(64), tmp_path / "a.png", make_record())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(FileError):  # the record may be whole, the pixels are not
        pictures.read_pixels(path)


def test_older_records_are_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = metadata.save_picture(make_picture(), tmp_path / "a.png", make_record())

    def to_two(data: dict[str, object]) -> dict[str, object]:
        return {**data, "schema": 2, "versions": {"migrated": "yes"}}

    monkeypatch.setattr(metadata, "SCHEMA", 2)
    monkeypatch.setattr(metadata, "MIGRATIONS", {1: to_two})
    assert metadata.read_record(path).versions == {"migrated": "yes"}


def test_every_older_schema_has_a_migration() -> None:
    assert sorted(metadata.MIGRATIONS) == list(range(1, metadata.SCHEMA))


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.exe"])
def test_unknown_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"\.png"):
        metadata.save_picture(make_picture(), tmp_path / name, None)


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_quality_out_of_range_is_refused(tmp_path: Path, quality: int) -> None:
    with pytest.raises(RequestError, match="file_quality"):
        metadata.save_picture(make_picture(), tmp_path / "a.jpg", None, quality=quality)
    assert list(tmp_path.iterdir()) == []


def test_a_record_too_long_for_jpeg_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    record = make_record(prompt="😀" * 2000, negative="😀" * 2000) | {"more": "x" * 200_000}
    with pytest.raises(FileError, match="does not fit into a jpeg; use png, webp or --no-metadata"):
        metadata.save_picture(make_picture(), tmp_path / "a.jpg", record)
    assert list(tmp_path.iterdir()) == []
    for name in ("a.png", "a.webp"):
        read = metadata.read_record(metadata.save_picture(make_picture(), tmp_path / name, record))
        assert (read.data["more"], read.request.prompt) == ("x" * 200_000, "😀" * 2000)


def test_digest_tells_pictures_apart() -> None:
    picture = make_picture()
    digest = metadata.pixels_digest(picture)
    picture.putpixel((3, 3), (1, 2, 3))
    assert metadata.pixels_digest(picture) != digest
    wide, high = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert metadata.pixels_digest(wide) != metadata.pixels_digest(high)


def test_the_starting_picture_is_remembered_by_digest(tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    make_picture().save(start)
    record = make_record(init_image=str(start), init_strength=0.5, mask=str(start))
    assert record["init_image"] == record["mask"] == metadata.file_digest(start)


def test_request_defaults_survive() -> None:
    record = make_record()
    assert GenerationRequest.model_validate(record["request"]).deterministic is False


def test_what_never_ends_has_no_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(FileError, match="is no plain file"):
            metadata.file_digest(path)
    with pytest.raises(FileError, match="no such file"):
        metadata.file_digest(tmp_path / "none")
