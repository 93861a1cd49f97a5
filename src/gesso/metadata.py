"""What every picture carries: the whole request and what it takes to make the picture again.

Here: the record's shape and version, how it is put into and read out of PNG, WebP, JPEG and MP4, and the digest of
pixels. Not here: the request's own fields (`gesso.request`), file formats (`gesso.pictures`, `gesso.videos`) and the
making of pictures. What is said of a picture holds for a video.

The record, schema 1 (a JSON object; PNG: text chunk "gesso"; WebP and JPEG: EXIF ImageDescription after "gesso:"; MP4:
tag "gesso"):

    schema     1
    request    every field of GenerationRequest, no blank left
    index      which picture of the request, from 0; its seed is request.seed + index
    seed       the seed of this very picture
    model      {"name": catalogue name or path, "digest": digest of the weights}
    versions   {"gesso", "python", "torch", "numpy", "pillow"}
    device     "cpu", "cuda:0", …                  dtype      "float32", "bfloat16", …
    attention  the kernel of attention             compiled   whether the networks' blocks were
    memory     the memory mode, where the engine loaded the model ("full", "offload+8bit", …)
    cache      what a step cache did, where there was one: {"steps": F for a computed one, T for a forecast, in order;
               "computed", "forecast": how many; "bytes" that it kept; "measured": errors by step, where it measures;
               "expected": mean distance to pictures without it, where `gesso calibrate` measured that}
    safety     {"decision": "off", "passed" or "blurred"}, and where a checker looked: "model", its digest; "score";
               "reason" it was flagged for
    company    the most pictures that ever shared a step with this one; 1 is alone
    seconds    by stage
    init_image digest of the starting picture's file, where there was one
    identity   digests of the photograph's file and of the pose's, {"image", "pose"}, where there was one
    refiner    digest of the refiner's files, where there was one
    likeness   cosine between the photograph's face and the picture's, null where none is found
    mask       digest of the mask's file, where there was one
    lora       of each adapter, where there were any: {"source", "scale"; "digest": of its file; "kind": what is in it;
               "config": of what lies beside it for PEFT}
    warnings   what the person was told about the request
    command    {"given": options that were given, "first_seed": seed of the command's first picture};
               written by `gesso generate`, read by its --resume; and "seed", where a try with another was kept
    pixels     "sha256:…" of the picture, or of all frames of a video, as made, before any lossy coding
               (added when saved)
    digest     "sha256:…" of everything above, so that a change shows       (added when saved)
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata as distributions
from pathlib import Path
from typing import TYPE_CHECKING, cast

from gesso.errors import FileError, RequestError
from gesso.pictures import LARGEST_RECORD, record_text, write_picture
from gesso.request import GenerationRequest, parse_request
from gesso.request_parts import Identity
from gesso.videos import is_video, video_record_text, write_video

if TYPE_CHECKING:
    from PIL import Image

SCHEMA = 1

JsonObject = dict[str, object]

# From a schema's number to the function that turns its record into the next one's. Empty while there is only one.
MIGRATIONS: dict[int, Callable[[JsonObject], JsonObject]] = {}

_NOT_OURS = "only a picture that Gesso saved with metadata can be read"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was read from a picture; the fields are those of the module's docstring, `data` is the whole object."""

    request: GenerationRequest
    index: int
    seed: int
    model_digest: str
    versions: dict[str, str]
    pixels: str
    data: JsonObject

    def request_for_this_picture(self) -> GenerationRequest:
        """The request that makes this picture alone."""
        return self.request.model_copy(update={"seed": self.seed, "num_images": 1})


def describe(
    request: GenerationRequest,
    *,
    index: int,
    seed: int,
    model_digest: str,
    device: str,
    dtype: str,
    company: int = 1,
    seconds: Mapping[str, float] | None = None,
    given: Mapping[str, object] | None = None,
) -> JsonObject:
    """The record of one picture, ready for `Result.metadata`.

    Args:
        request: the planned request, no blanks left.
        index: which picture of the request, from 0.
        seed: the seed of this very picture.
        model_digest: digest of the weights ("sha256:…"), "" where unknown.
        device: where it was made ("cpu", "cuda:0").
        dtype: what it was computed in ("float32").
        company: the most pictures that shared a step with it; 1 is alone.
        seconds: by stage.
        given: `digests_of_given`, from when the files were read: by now they may be gone, or others.
    """
    record: JsonObject = {
        "schema": SCHEMA,
        "request": request.model_dump(mode="json"),
        "index": index,
        "seed": seed,
        "model": {"name": request.model, "digest": model_digest},
        "versions": dict(versions()),
        "device": device,
        "dtype": dtype,
        "company": company,
        "seconds": {stage: round(value, 4) for stage, value in (seconds or {}).items()},
    }
    return record | dict(given or {})


@cache
def versions() -> Mapping[str, str]:
    """Versions of what can change pixels; read from the installed distributions, so that nothing is imported."""
    found = {"gesso": distributions.version("gesso"), "python": platform.python_version()}
    return found | {name: distributions.version(name) for name in ("torch", "numpy", "pillow")}


def pixels_digest(image: "Image.Image") -> str:
    """Digest of mode, size and every pixel: equal exactly where the pictures are."""
    header = f"{image.mode} {image.width}x{image.height}\n".encode()
    return f"sha256:{hashlib.sha256(header + image.tobytes()).hexdigest()}"


def frames_digest(frames: "Sequence[Image.Image]") -> str:
    """Digest of mode, size and every pixel of every frame of a video, and of how many there are."""
    total = hashlib.sha256(f"{len(frames)} frames {frames[0].mode} {frames[0].width}x{frames[0].height}\n".encode())
    for frame in frames:
        total.update(frame.tobytes())
    return f"sha256:{total.hexdigest()}"


def digests_of_given(request: GenerationRequest) -> JsonObject:
    """Digests of the pictures that a request names, by their fields in a record. Raises FileError."""
    paths = {"init_image": request.init_image, "mask": request.mask}
    found: JsonObject = {name: file_digest(Path(path)) for name, path in paths.items() if path is not None}
    return found if request.identity is None else {**found, "identity": digests_of_person(request.identity)}


def digests_of_person(identity: Identity) -> dict[str, str]:
    """Digests of the files that say who is painted, and how the face is held. Raises FileError."""
    given = {"image": identity.image, "pose": identity.pose}
    return {name: file_digest(Path(path)) for name, path in given.items() if path is not None}


def file_digest(path: Path) -> str:
    """Digest of a file's bytes.

    Raises:
        FileError: it cannot be read, or is no plain file, which might never end.
    """
    try:
        if path.exists() and not path.is_file():
            raise FileError(path, "is no plain file")
        with path.open("rb") as stream:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    except OSError as error:
        raise FileError(path, f"cannot be read ({(error.strerror or str(error)).lower()})") from error


def sealed(record: Mapping[str, object], pixels: str) -> JsonObject:
    """The record with the digest of the picture's pixels and, last, its own."""
    whole: JsonObject = {**record, "pixels": pixels}
    whole.pop("digest", None)
    return whole | {"digest": _record_digest(whole)}


def _record_digest(record: Mapping[str, object]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def parameters_text(record: Mapping[str, object]) -> str:
    """The widely read one-paragraph form: prompt, negative prompt, then "Name: value" pairs."""
    request = cast("Mapping[str, object]", record["request"])
    model = cast("Mapping[str, object]", record["model"])
    lines = [str(request["prompt"])]
    if request.get("negative"):
        lines.append(f"Negative prompt: {request['negative']}")
    pairs = {
        "Seed": record["seed"],
        "CFG scale": request.get("guidance"),
        "Temperature": request.get("temperature"),
        "Size": f"{request['width']}x{request['height']}" if request.get("width") else None,
        "Model": model["name"],
        "Model hash": str(model["digest"]).removeprefix("sha256:")[:10] or None,
        "Version": f"gesso {cast('Mapping[str, str]', record['versions'])['gesso']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def save_picture(
    image: "Image.Image", path: Path, record: Mapping[str, object] | None, *, quality: int | None = None
) -> Path:
    """Writes a picture with its record inside; see `gesso.pictures.write_picture` for formats, quality and errors.

    Args:
        image: RGB.
        path: the ending chooses the format.
        record: from `describe`; the digests are added here. None writes no metadata.
        quality: 1 to 100 for WebP and JPEG.
    """
    if record is None:
        return write_picture(image, path, quality=quality)
    whole = sealed(record, pixels_digest(image))
    text = json.dumps(whole, ensure_ascii=True)
    return write_picture(image, path, record=text, parameters=parameters_text(whole), quality=quality)


def save_video(
    frames: "Sequence[Image.Image]",
    fps: float,
    path: Path,
    record: Mapping[str, object] | None,
    *,
    quality: int | None = None,
) -> Path:
    """Writes a video with its record inside; see `gesso.videos.write_video` for arguments and errors."""
    if record is None:
        return write_video(frames, fps, path, quality=quality)
    whole = sealed(record, frames_digest(frames))
    text = json.dumps(whole, ensure_ascii=True)
    return write_video(frames, fps, path, record=text, parameters=parameters_text(whole), quality=quality)


def read_record(path: Path) -> Record:
    """Reads what a picture says about itself.

    Raises:
        FileError: no such file, no picture, no record in it, a record that was changed, or one of a newer schema.
        MissingError: a video, and the library that reads it is not installed.
    """
    text = video_record_text(path) if is_video(path) else record_text(path)
    if text is None:
        raise FileError(path, "has no gesso metadata", _NOT_OURS)
    if len(text) > LARGEST_RECORD:
        raise FileError(path, f"its gesso metadata is longer than {LARGEST_RECORD} bytes", _NOT_OURS)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(path, "its gesso metadata is no JSON", _NOT_OURS) from error
    if not isinstance(data, dict):
        raise FileError(path, "its gesso metadata is no JSON object", _NOT_OURS)
    data = cast("JsonObject", data)
    schema = data.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise FileError(path, f"its gesso metadata names no schema (schema: {schema})", _NOT_OURS)
    if schema > SCHEMA:
        raise FileError(path, f"its metadata has schema {schema}, this gesso knows up to {SCHEMA}", "upgrade gesso")
    if data.get("digest") != _record_digest(data):
        raise FileError(
            path, "its gesso metadata was changed after it was written (digest)", "give its options to gesso generate"
        )
    return _record(path, _migrated(data))


def _migrated(data: JsonObject) -> JsonObject:
    schema = cast("int", data["schema"])
    while schema < SCHEMA:
        data = MIGRATIONS[schema](data)
        schema += 1
    return data


def _record(path: Path, data: JsonObject) -> Record:
    def unusable(key: str, value: object) -> FileError:
        return FileError(path, f"its gesso metadata has no usable {key} ({value})", _NOT_OURS)

    def number(key: str) -> int:
        value = data.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise unusable(key, value)
        return value

    def mapping(key: str) -> JsonObject:
        value = data.get(key)
        if not isinstance(value, dict):
            raise unusable(key, value)
        return cast("JsonObject", value)

    pixels = data.get("pixels")
    if not isinstance(pixels, str):
        raise unusable("pixels", pixels)
    try:
        request = parse_request(mapping("request"))
    except RequestError as error:
        raise FileError(path, f"its gesso metadata holds a request that cannot be used: {error}") from error
    return Record(
        request=request,
        index=number("index"),
        seed=number("seed"),
        model_digest=str(mapping("model").get("digest", "")),
        versions={name: str(value) for name, value in mapping("versions").items()},
        pixels=pixels,
        data=data,
    )
