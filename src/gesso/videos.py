"""Video files: MP4 (H.264) with or without a record inside, written from frames and read back safely.

Through PyAV, which is an extra and is imported where a file is written or read. Colours are BT.709 and said to be so;
players would otherwise guess from the size. Not here: what a record means (`gesso.metadata`), pictures
(`gesso.pictures`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gesso.errors import FileError, MissingError, RequestError, RunError
from gesso.files import written_aside
from gesso.pictures import LARGEST_PICTURE

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = {".mp4": "mp4"}

_INSTALL = "pip install 'gesso[video]'"
_ENCODER = "libx264"
_DEFAULT_QUALITY = 70
_BT709 = 1  # in the standard's tables of primaries, transfer and matrix
_LIMITED = 1  # its range of values, the only one that all players know


def require_library() -> None:
    """Refuse work whose videos could not be written in the end (MissingError)."""
    av = _library()
    if _ENCODER not in av.codecs_available:
        raise MissingError(f"{_ENCODER}, which an av with all its codecs writes MP4 with,", "pip install -U av")


def is_video(path: Path) -> bool:
    """Whether the name's ending is that of a video file."""
    return path.suffix.lower() in ENDINGS


def write_video(
    frames: "Sequence[Image.Image]",
    fps: float,
    path: Path,
    *,
    record: str | None = None,
    parameters: str = "",
    quality: int | None = None,
) -> Path:
    """Writes frames to `path` aside and renames it. Replaces an existing file.

    Args:
        frames: RGB, of one size; at least one.
        fps: frames a second.
        path: ending in .mp4.
        record: JSON, in ASCII, for the tag "gesso"; None leaves all metadata out.
        parameters: the widely read text that goes with it, as the comment.
        quality: 1 to 100, None is 70; never lossless, since few players read that.

    Raises:
        RequestError: another ending, or a quality out of range.
        MissingError: PyAV is not installed.
        FileError: the folder cannot be written to.
        RunError: the disk failed or is full; nothing partial is left.
    """
    check_video_name(path)
    if quality is not None and not 1 <= quality <= 100:
        raise RequestError("file_quality", quality, "a whole number from 1 to 100")
    require_library()
    av = _library()
    tags = {} if record is None else {"gesso": record, "comment": parameters}
    options = {"movflags": "+faststart+use_metadata_tags"}  # plays while it loads; keeps tags that MP4 does not know
    with written_aside(path) as aside:
        try:
            with av.open(f"file:{aside}", "w", format="mp4", options=options) as container:
                container.metadata.update(tags)
                stream = container.add_stream(_ENCODER, rate=Fraction(fps).limit_denominator(1001))
                stream.options = {"crf": str(51 - (quality or _DEFAULT_QUALITY) // 2)}
                _encode(av, container, stream, frames)
        except av.FFmpegError as error:
            if isinstance(error, OSError):  # of the disk
                raise
            raise RunError(f"{path}: the video cannot be coded ({_reason(error)}); nothing was left of it") from error
    return path


def _encode(av: Any, container: Any, stream: Any, frames: "Sequence[Image.Image]") -> None:
    stream.width, stream.height = frames[0].size
    stream.pix_fmt = "yuv444p" if stream.width % 2 or stream.height % 2 else "yuv420p"  # half the colours halve an edge
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = _LIMITED
    for number, image in enumerate(frames):
        frame = av.VideoFrame.from_image(image.convert("RGB"))
        frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts = number
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def check_video_name(path: Path) -> None:
    """Refuse a name that does not end as a video's (RequestError)."""
    if not is_video(path):
        raise RequestError("output", str(path), f"a name that ends in {', '.join(ENDINGS)}, as a video's does")


def video_record_text(path: Path) -> str | None:
    """The record's JSON as it stands in the file, None where the video has none. Decodes no frame.

    Raises:
        FileError: no such file, or no MP4.
        MissingError: PyAV is not installed.
    """
    with _opened(path) as container:
        return container.metadata.get("gesso")


def read_frames(path: Path) -> "Iterator[Image.Image]":
    """Every frame, decoded to RGB, one at a time.

    Raises:
        FileError: no such file, no MP4, truncated, or frames larger than 2^28 pixels.
        MissingError: PyAV is not installed.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        if stream.width * stream.height > LARGEST_PICTURE:
            raise FileError(path, f"has frames larger than {LARGEST_PICTURE} pixels")
        count = 0
        for frame in container.decode(stream):
            count += 1
            yield frame.to_image()
        if count < stream.frames:
            raise FileError(path, f"ends after {count} of {stream.frames} frames", "fetch or make it again")


@contextmanager
def _opened(path: Path) -> "Iterator[Any]":
    """The file as an MP4 with a video in it; every way in which a file can be bad becomes a FileError.

    The reader is given an open file and the format, so that no name or content leads it to another file.
    """
    av = _library()
    if path.exists() and not path.is_file():  # what is no file might never end
        raise FileError(path, "is no file", "name an mp4")
    try:
        with path.open("rb") as stream, av.open(stream, "r", format="mp4") as container:
            if not container.streams.video:
                raise FileError(path, "holds no video", "name an mp4 with one")
            yield container
    except FileNotFoundError as error:
        raise FileError(path, "no such file") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise FileError(path, f"is no video that can be read ({_reason(error)})", "name an mp4") from error


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingError("av, which reads and writes MP4,", _INSTALL) from error
    return av
