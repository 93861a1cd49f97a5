"""What a run reports: progress, preview, done, failed, cancelled; and the picture it hands over.

Here: plain frozen data, made by the engine and read by every face of the project (command line, server, page).
Not here: queues, threads and printing. Pillow is imported only when a result is saved.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gesso.errors import GessoError

if TYPE_CHECKING:
    from PIL import Image

Stage = Literal["load", "encode", "step", "decode"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished picture, or a video.

    Attributes:
        image: the picture (RGB); of a video its first frame.
        seed: the seed that this very picture used (the request's seed + index).
        index: which picture of its request this is, from 0.
        metadata: what `gesso.metadata.describe` made: the request without blanks, digests, versions, seconds.
        frames: of a video all its frames in order; of a picture none.
        fps: how many of them are shown a second.
    """

    image: "Image.Image"
    seed: int
    index: int
    metadata: dict[str, object] = field(default_factory=dict)
    frames: "tuple[Image.Image, ...]" = ()
    fps: float | None = None

    def save(self, path: str | Path, *, with_metadata: bool = True, quality: int | None = None) -> Path:
        """Writes the picture, its metadata inside, beside the target first and then renamed onto it.

        Args:
            path: where to; the ending chooses the format (.png, .webp, .jpg, .jpeg; .mp4 for a video). An existing
                file is replaced.
            with_metadata: False leaves the metadata out.
            quality: 1 to 100 for WebP, JPEG and MP4; None is lossless WebP, JPEG at 95 and MP4 at 70. PNG is always
                lossless.

        Returns:
            The path written.

        Raises:
            RequestError: the ending names no format of pictures, or of videos, or the quality is out of range.
            FileError: the folder cannot be written to.
            MissingError: a video, and the library that writes it is not installed.
            RunError: the disk is full or failed while writing; nothing partial is left.
        """
        from gesso.metadata import save_picture, save_video

        record = self.metadata if with_metadata else None
        if self.frames:
            assert self.fps is not None
            return save_video(self.frames, self.fps, Path(path), record, quality=quality)
        return save_picture(self.image, Path(path), record, quality=quality)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A finished picture, or video, that the safety checker lets nobody see.

    Attributes:
        seed: the seed that made it.
        index: which picture of its request it would be, from 0.
        metadata: what its file would say, without a digest of its pixels.
    """

    seed: int
    index: int
    metadata: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A stage moved on. `image`, `step` and `steps` count from 0, 1 and 1; all 0 where a stage has none.

    Attributes:
        job: the job's id.
        image: which picture of the request.
        step: steps done so far for that picture.
        steps: steps it takes in all.
        stage: what is being done.
        seconds: time since the job was submitted.
    """

    job: str
    image: int
    step: int
    steps: int
    stage: Stage
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A cheap look at a picture that is still being made; of a video `frames`, the first of which is the picture.

    Of a request that is checked for safety it is blurred: it has not been checked yet.
    """

    job: str
    image: int
    step: int
    picture: "Image.Image"
    frames: "tuple[Image.Image, ...]" = ()


@dataclass(frozen=True, kw_only=True)
class Done:
    """Every picture of the job is made. The last event of its job.

    `rejected` are those that the safety checker lets nobody see; where it is all of them, the job has Failed.
    """

    job: str
    results: tuple[Result, ...]
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The job failed; `results` are the pictures that were finished before. The last event of its job."""

    job: str
    error: GessoError
    results: tuple[Result, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cancelled:
    """The job was cancelled; `results` are the pictures that were finished before. The last event of its job."""

    job: str
    results: tuple[Result, ...]


Event = Progress | Preview | Done | Failed | Cancelled
