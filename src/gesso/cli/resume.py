"""Which pictures and videos of a command are there already: read from their own metadata, never from a side file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gesso.errors import FileError
from gesso.metadata import read_record
from gesso.pictures import ENDINGS
from gesso.request import GenerationRequest
from gesso.videos import is_video

Done = set[tuple[str, int | None]]


def find_done(
    folder: Path, prompts: Sequence[str], given: Mapping[str, object], *, videos: bool = False
) -> tuple[Done, int | None]:
    """Looks through a folder for pictures that the same command made before.

    A picture counts if the same options were given with the same values; seed and number of pictures may differ, since
    they only say which pictures.

    Args:
        folder: where the earlier run wrote.
        prompts: every prompt of the command.
        given: the options that were given, as `given_options` makes them.
        videos: whether they may be videos; what reads these is needed for nothing else.

    Returns:
        Prompt and seed of every picture that is there, and the first seed of the newest run, None if there was none.
    """
    wanted = set(prompts)
    done: Done = set()
    newest: tuple[float, int] | None = None
    for path in folder.iterdir():
        if path.suffix.lower() not in ENDINGS and not (videos and is_video(path)):
            continue
        try:
            record = read_record(path)
        except FileError:  # somebody else's picture
            continue
        command = record.data.get("command")
        if record.request.prompt not in wanted or not isinstance(command, dict) or command.get("given") != given:
            continue
        asked = command.get("seed", record.seed)  # another, where a later try was the best
        done.add((record.request.prompt, asked if isinstance(asked, int) else record.seed))
        first_seed = command.get("first_seed")
        if isinstance(first_seed, int):
            newest = max(newest or (0.0, 0), (path.stat().st_mtime, first_seed))
    return done, newest[1] if newest else None


def given_options(request: GenerationRequest) -> dict[str, object]:
    """The fields that were given, with their values as JSON has them; what only says which pictures is left out."""
    values = request.model_dump(mode="json", exclude_unset=True, exclude={"prompt", "seed", "num_images"})
    return dict(sorted(values.items()))
