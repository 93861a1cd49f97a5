"""Where prompts come from: arguments, standard input (`-`), files (`@FILE`). What they mean is the request's affair."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from gesso.errors import FileError, RequestError

MOST_PROMPTS = 100_000
LARGEST_FILE = 64 << 20  # bytes; of standard input, characters


def read_prompts(arguments: Iterable[str]) -> list[str]:
    """Every prompt, in order. `-` and `@FILE` hold one a line; their empty lines are skipped.

    Raises:
        RequestError: no prompt, or more than a hundred thousand.
        FileError: a file or standard input cannot be read, is too long or is no UTF-8 text.
    """
    prompts: list[str] = []
    for argument in arguments:
        if argument == "-":
            prompts.extend(_lines(_standard_input()))
        elif argument.startswith("@") and len(argument) > 1:
            prompts.extend(_lines(_file(Path(argument[1:]))))
        else:
            prompts.append(argument)
        if len(prompts) > MOST_PROMPTS:
            raise RequestError("prompt", f"{len(prompts)} prompts", f"at most {MOST_PROMPTS} at once")
    if not prompts:
        raise RequestError("prompt", "", "given", 'type one in quotes, "-" for standard input, or @FILE')
    return prompts


def _lines(text: str) -> Iterator[str]:
    # Not by `splitlines`, which also cuts at U+2028, U+0085 and the like, wherever a prompt was pasted from.
    return (line.strip() for line in text.split("\n") if line.strip())


def _standard_input() -> str:
    if sys.stdin is None:  # whoever started the program closed it
        raise FileError("standard input", "is closed", "type prompts in quotes, or name a file with @FILE")
    try:
        text = sys.stdin.read(LARGEST_FILE + 1)
    except UnicodeDecodeError as error:
        raise FileError("standard input", "is no UTF-8 text") from error
    except OSError as error:
        raise FileError("standard input", f"cannot be read ({(error.strerror or str(error)).lower()})") from error
    if len(text) > LARGEST_FILE:
        raise FileError("standard input", f"is longer than {LARGEST_FILE} characters", "hand in fewer prompts at once")
    return text


def _file(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise FileError(path, f"is larger than {LARGEST_FILE >> 20} MiB")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(path, "is no UTF-8 text", "a prompt that begins with @ can come in a file") from error
    except OSError as error:
        raise FileError(
            path, f"cannot be read ({(error.strerror or str(error)).lower()})", "@FILE means prompts from a file"
        ) from error
