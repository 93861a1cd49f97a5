"""Picture files: saving PNG, WebP and JPEG with or without a record inside, and reading them back safely.

Here: file formats, their text fields, and fitting a picture to a size. Not here: what a record means
(`gesso.metadata`) and where files go.
"""

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gesso.errors import FileError, GessoError, RequestError
from gesso.files import written_aside

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

LARGEST_RECORD = 1 << 20  # characters of JSON; a longer one is not ours
LARGEST_PICTURE = 1 << 26  # pixels; a larger one is refused before it is decoded
LARGEST_FILE = 1 << 28  # bytes of a picture
# What Pillow may take a file for. Not all that it can: some of its readers start other programs, or are seldom tried.
READABLE = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")

FORMATS = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}
ENDINGS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}

_EXIF_DESCRIPTION = 0x010E
_EXIF_ORIENTATION = 0x0112
_EXIF_PRIVATE = 0x8769
_EXIF_USER_COMMENT = 0x9286
_PREFIX = "gesso:"
_LARGEST_JPEG_EXIF = 65_000  # bytes; JPEG's segment holds 65,533 with its header, a chunk of WebP 4 GB
_DEFAULT_JPEG_QUALITY = 95


def write_picture(
    image: "Image.Image",
    path: Path,
    *,
    record: str | None = None,
    parameters: str = "",
    quality: int | None = None,
) -> Path:
    """Writes `image` to `path` aside and renames it; the ending chooses the format. Replaces an existing file.

    Args:
        image: RGB.
        path: ending in .png, .webp, .jpg or .jpeg.
        record: JSON, in ASCII, for the "gesso" field; None leaves all metadata out.
        parameters: the widely read text that goes with it.
        quality: 1 to 100 for WebP and JPEG; None is lossless WebP and JPEG at 95. PNG is lossless and has none.

    Raises:
        RequestError: unknown ending, or a quality out of range.
        FileError: the folder cannot be written to, or the record does not fit the format.
        RunError: the disk failed or is full; nothing partial is left.
    """
    kind = picture_format(path)
    if quality is not None and not 1 <= quality <= 100:
        raise RequestError("file_quality", quality, "a whole number from 1 to 100")
    options: dict[str, object] = {}
    if kind == "jpeg":
        options |= {"quality": quality or _DEFAULT_JPEG_QUALITY, "subsampling": 0}
    elif kind == "webp":
        options |= {"quality": quality, "method": 4} if quality else {"lossless": True}
    if record is not None and kind == "png":
        options["pnginfo"] = _png_text(record, parameters)
    elif record is not None:
        options["exif"] = exif = _exif(record, parameters)
        if kind == "jpeg" and len(exif) > _LARGEST_JPEG_EXIF:
            problem = f"its metadata ({len(exif)} bytes) does not fit into a jpeg"
            raise FileError(path, problem, "use png, webp or --no-metadata")
    with written_aside(path) as aside:
        image.save(aside, format=FORMATS[kind], **options)
    return path


def picture_format(path: Path) -> str:
    """ "png", "webp" or "jpeg", by the ending.

    Raises:
        RequestError: any other ending.
    """
    kind = ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise RequestError("output", str(path), f"a name that ends in {', '.join(ENDINGS)}")
    return kind


def _png_text(record: str, parameters: str) -> "PngInfo":
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("gesso", record)
    text.add_itxt("parameters", parameters)
    return text


def _exif(record: str, parameters: str) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = _PREFIX + record
    exif.get_ifd(_EXIF_PRIVATE)[_EXIF_USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
    return exif.tobytes()


@contextmanager
def _opened(path: Path) -> "Iterator[Image.Image]":
    """The file as a picture, header read and pixels not; every way in which a file can be bad becomes a FileError."""
    from PIL import Image, UnidentifiedImageError

    check_file(path)
    too_many = f"cannot be read: it has more than {LARGEST_PICTURE / 1e6:.0f} megapixels"
    try:
        Image.init()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that does not keep the picture from being read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            formats = [name for name in READABLE if name in Image.OPEN]
            # Of a stream, since of a path Pillow maps some TIFFs into memory, and then turned ones are scrambled.
            with path.open("rb") as stream, Image.open(stream, formats=formats) as image:
                if image.width * image.height > LARGEST_PICTURE:
                    raise FileError(path, too_many, "make it smaller")
                yield image
    except UnidentifiedImageError as error:
        raise FileError(path, "is no picture that can be read", "use a png, webp or jpeg") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FileError(path, too_many, "make it smaller") from error
    except (GessoError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        raise FileError(path, f"cannot be read ({str(error) or type(error).__name__})") from error


def check_file(path: Path) -> None:
    """Refuse what is no plain file, which might never end, and a file that is larger than any picture. FileError."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileError(path, "no such file") from error
    except (OSError, ValueError) as error:
        raise FileError(path, f"cannot be read ({error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise FileError(path, "is a folder, not a picture")
    if not stat.S_ISREG(status.st_mode):
        raise FileError(path, "is no plain file", "use a png, webp or jpeg")
    if status.st_size > LARGEST_FILE:
        raise FileError(path, f"is larger than {LARGEST_FILE >> 20} MiB", "make it smaller")


def record_text(path: Path) -> str | None:
    """The record's JSON as it stands in the file, None where the picture has none. Reads no pixels.

    Raises:
        FileError: no such file, or no picture.
    """
    with _opened(path) as image:
        if image.format == "PNG":
            text = image.info.get("gesso")
            return str(text) if text is not None else None
        described = image.getexif().get(_EXIF_DESCRIPTION, "")
    if not isinstance(described, str) or not described.startswith(_PREFIX):
        return None
    return described[len(_PREFIX) : len(_PREFIX) + LARGEST_RECORD + 1]


def read_pixels(path: Path, background: str = "white") -> "Image.Image":
    """The picture as it is meant to be seen, decoded to RGB and turned as its EXIF says.

    Args:
        path: the file.
        background: what transparent places lie on. A mask's lie on black, where nothing is painted anew.

    Raises:
        FileError: no such file, no picture of a format that is READABLE, truncated, or larger than 2^26 pixels.
    """
    from PIL import Image

    with _opened(path) as opened:
        image = _turned(opened)
        if image.mode.startswith("I"):  # sixteen bits of grey, which a plain conversion would clip to white
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return image.convert("RGB")


def _turned(image: "Image.Image") -> "Image.Image":
    """The picture as the camera was held. Only the orientation is asked for, so other tags may be damaged.

    Pillow's `exif_transpose` writes all the others anew, and breaks where one of them is not of its type.
    """
    from PIL import Image

    image.load()  # first: in some formats EXIF comes after the pixels
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # EXIF that cannot be read says nothing, and the pixels are there
        return image
    return image if turn is None else image.transpose(turn)


def cover_crop(image: "Image.Image", width: int, height: int, name: object = "the picture") -> "Image.Image":
    """The picture scaled (Lanczos) until it just covers `width` x `height`, then cut to that size about its middle.

    Sizes and offsets are rounded down, as in the published training code of Infinity, whose pictures this reproduces.

    Args:
        image: the picture.
        width, height: in pixels.
        name: of the picture, for errors.

    Raises:
        FileError: it is so long a strip that it would be scaled to more than 2^26 pixels.
    """
    from PIL import Image

    aspect = image.width / image.height
    narrow = aspect <= width / height
    across, down = (width, int(width / aspect)) if narrow else (int(aspect * height), height)
    across, down = max(across, width), max(down, height)  # a quotient just below a whole number would fall short
    if across * down > LARGEST_PICTURE:
        problem = f"has {image.width}x{image.height} pixels, too long a strip to cover {width}x{height}"
        raise FileError(name, problem, "crop it first")
    covering = image.resize((across, down), Image.Resampling.LANCZOS)
    left, top = (across - width) // 2, (down - height) // 2
    return covering.crop((left, top, left + width, top + height))
