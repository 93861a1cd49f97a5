"""Video files: frames and record survive, colours are right, and what cannot be written or read says so on one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from gesso import metadata, videos
from gesso.errors import FileError, MissingError, RequestError
from gesso.events import Result
from gesso.request import GenerationRequest

FPS = 24000 / 1001


def make_frames(count: int = 5, size: tuple[int, int] = (48, 32)) -> tuple[Image.Image, ...]:
    """Ramps of colour that move."""
    across, down = np.meshgrid(np.linspace(0, 200, size[0]), np.linspace(0, 200, size[1]))
    pixels = (np.stack([across + 8 * index, down, 255 - across], axis=-1) for index in range(count))
    return tuple(Image.fromarray(np.clip(frame, 0, 255).astype(np.uint8)) for frame in pixels)


def make_result(**changes: object) -> Result:
    frames = make_frames()
    request = GenerationRequest(prompt="a star \u2605", seed=7, frames=5, fps=FPS)
    record = metadata.describe(request, index=0, seed=7, model_digest="", device="cpu", dtype="float32")
    values = {"image": frames[0], "seed": 7, "index": 0, "metadata": record, "frames": frames, "fps": FPS, **changes}
    return Result(**values)  # pyright: ignore[reportArgumentType]


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def test_frames_and_record_survive(tmp_path: Path) -> None:
    result = make_result()
    path = result.save(tmp_path / "a.mp4")
    read = metadata.read_record(path)
    assert read.request == GenerationRequest(prompt="a star \u2605", seed=7, frames=5, fps=FPS)
    assert read.pixels == metadata.frames_digest(result.frames)
    frames = list(videos.read_frames(path))
    assert len(frames) == 5
    assert max(largest_difference(*pair) for pair in zip(frames, result.frames, strict=True)) < 24
    shift = np.asarray(frames[0]).mean((0, 1)) - np.asarray(result.frames[0]).mean((0, 1))
    assert np.abs(shift).max() < 3  # with another standard it would be 10 and more
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None and float(stream.average_rate) == pytest.approx(FPS)
        assert stream.codec_context.colorspace == 1
        assert "a star" in container.metadata["comment"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_without_metadata_there_is_none(tmp_path: Path) -> None:
    path = make_result().save(tmp_path / "a.mp4", with_metadata=False)
    with pytest.raises(FileError, match="has no gesso metadata"):
        metadata.read_record(path)


def test_quality_makes_a_difference(tmp_path: Path) -> None:
    sizes = [make_result().save(tmp_path / f"{quality}.mp4", quality=quality).stat().st_size for quality in (1, 100)]
    assert sizes[0] < sizes[1]
    for quality in (0, 101):
        with pytest.raises(RequestError, match="1 to 100"):
            make_result().save(tmp_path / "bad.mp4", quality=quality)


def test_odd_sizes_and_one_frame(tmp_path: Path) -> None:
    frames = make_frames(1, (33, 17))
    path = videos.write_video(frames, 1.0, tmp_path / "odd.mp4")
    (read,) = videos.read_frames(path)
    assert read.size == (33, 17)


def test_a_digest_knows_every_frame() -> None:
    frames = make_frames()
    changed = frames[3].copy()
    changed.putpixel((0, 0), (1, 2, 3))
    digests = {metadata.frames_digest(each) for each in (frames, frames[:4], (*frames[:3], changed, frames[4]))}
    assert len(digests) == 3


def test_names_of_pictures_are_not_for_videos_nor_the_other_way(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"ends in \.mp4, as a video's does"):
        make_result().save(tmp_path / "a.png")
    with pytest.raises(RequestError, match=r"ends in \.png"):
        make_result(frames=(), fps=None).save(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x18ftypisom and then nothing", b"#EXTM3U\n/etc/passwd"])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    for read in (metadata.read_record, lambda path: list(videos.read_frames(path))):
        with pytest.raises(FileError, match="no video that can be read") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.mp4")
    (tmp_path / "folder.mp4").mkdir()
    for name, words in (("absent", "no such file"), ("folder", "is no file"), ("endless", "is no file")):
        with pytest.raises(FileError, match=words):
            metadata.read_record(tmp_path / f"{name}.mp4")


def test_a_video_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = make_result().save(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:-400])
    assert metadata.read_record(path).seed == 7  # the record lies before the frames
    with pytest.raises(FileError):
        list(videos.read_frames(path))


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk: the write itself fails, half-way."""
    code = f"""
import resource, signal, sys
from pathlib import Path
from PIL import Image
from gesso.errors import RunError
from gesso.metadata import save_video
frames = [Image.effect_noise((200, 200), 90).convert("RGB") for _ in range(3)]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_video(frames, 8.0, Path({str(tmp_path)!r}) / "a.mp4", None)
except RunError as error:
    sys.exit(77)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 77
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_result().save(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    for work in (lambda: make_result().save(path), lambda: metadata.read_record(path), videos.require_library):
        with pytest.raises(MissingError) as caught:
            work()
        assert caught.value.command == "pip install 'gesso[video]'"
