"""File names of pictures, made from a template. Folders, endings and free numbers are the caller's affair."""

import re
import string
import unicodedata

from gesso.errors import RequestError

DEFAULT_TEMPLATE = "{index:04}-{slug}-{seed}"
_KEYS = ("index", "slug", "seed", "image", "model")
_LONGEST_SLUG = 48
_LONGEST_NAME = 200  # bytes, below every file system's 255 with a number and an ending added


def check_template(template: str) -> None:
    """Refuses a template that has unknown keys, leaves its folder, or is no template.

    Raises:
        RequestError: with what is allowed.
    """
    try:
        fields = [(key, form, way) for _, key, form, way in string.Formatter().parse(template) if key is not None]
    except ValueError as error:
        raise RequestError("name", template, "a template such as " + DEFAULT_TEMPLATE, str(error)) from None
    for key, form, way in fields:
        if key not in _KEYS:
            raise RequestError(
                "name", template, f"made of {', '.join(f'{{{known}}}' for known in _KEYS)}", f"not {{{key}}}"
            )
        if way or not re.fullmatch(r"(0?\d{1,2})?", form or ""):  # a width of millions would fill the memory
            raise RequestError("name", template, "free of formats but widths up to 99, such as {index:04}")
    picture_name(template, index=1, image=0, seed=0, prompt="prompt", model="model")


def picture_name(template: str, *, index: int, image: int, seed: int, prompt: str, model: str) -> str:
    """A picture's file name without ending.

    Args:
        template: keys {index} (counts over all pictures of the command, from 1), {image} (which of its prompt, from 0),
            {seed}, {slug} (the prompt as a name) and {model}; number formats such as {index:04} work.
        index: from 1.
        image: from 0.
        seed: the picture's own.
        prompt: what was painted.
        model: name or path.

    Raises:
        RequestError: the name would be empty, hidden, too long, or leave the folder.

    Example:
        >>> picture_name("{index:03}-{slug}-{seed}", index=1, image=0, seed=7, prompt="A red star!", model="nano")
        '001-a-red-star-7'
    """
    try:
        name = template.format(index=index, image=image, seed=seed, slug=slug(prompt), model=slug(model))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise RequestError("name", template, "a template such as " + DEFAULT_TEMPLATE, str(error)) from None
    if not name or name.startswith(".") or any(mark in name for mark in '/\\:\0<>|"?*') or not name.isprintable():
        raise RequestError(
            "name", template, "a plain file name", f"it would be {name!r}; the folder is said with --output"
        )
    if len(name.encode()) > _LONGEST_NAME:
        raise RequestError("name", template, f"at most {_LONGEST_NAME} bytes long once filled in")
    return name


def slug(text: str) -> str:
    """The text as a part of a file name: lower-case letters and digits of any script, joined by hyphens.

    Example:
        >>> slug("Two red Stars, above a ring")
        'two-red-stars-above-a-ring'
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    words = re.findall(r"[^\W_]+", plain)
    joined = ""
    for word in words:
        longer = f"{joined}-{word}" if joined else word
        if len(longer.encode()) > _LONGEST_SLUG:
            break
        joined = longer
    return joined or (words[0][: _LONGEST_SLUG // 4] if words else "picture")
