"""Fetching published models from a hub into the home, and removing them again.

Sizes are summed and the disk looked at before a byte is asked for; the files then come several at once and resumed
(`hub_transfer`), what only earlier pulls had is removed, and at the end `manifest.json` lists what is there and
`revisions.json` which commits it is of. One pull of a model runs at a time; another waits. Not here: speaking to a hub
(`hub_clients`), what there is to fetch (`catalogue`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from gesso.errors import FileError, RequestError, RunError, WeightsError
from gesso.files import inside, ready_folder, written_aside
from gesso.settings import load_settings
from gesso.weights import manifest
from gesso.weights.catalogue import Entry, Source
from gesso.weights.hub_clients import HubName, Listing, TransientError, connect, quiet
from gesso.weights.hub_transfer import Wanted, disk_error, fetch_all, part_of

HUBS: tuple[HubName, ...] = ("huggingface", "modelscope")
REVISIONS = "revisions.json"
"""File beside a pulled model's manifest: each repository, and the commit that its files are of."""
# Weights without code in them, and text. Other files come only where the catalogue names them in full.
_ENDINGS = (".safetensors", ".json", ".txt", ".model", ".jinja")


class Watcher(Protocol):
    """Who is told how a pull goes."""

    def begin(self, total: int, here: int) -> None:
        """All files have so many bytes, of which so many are here."""
        ...

    def move(self, here: int) -> None:
        """So many bytes are here now."""
        ...

    def wait(self) -> None:
        """Another pull of the same model runs; this one waits for it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What a pull came to. `revisions` are (repository, commit); `fetched` are bytes that came over the network."""

    folder: Path
    revisions: tuple[tuple[str, str], ...]
    files: int
    size: int
    fetched: int


def pull(entry: Entry, *, origin: HubName, revisions: Sequence[str], watcher: Watcher) -> Pulled:
    """Fetch a published model, or the rest of it, or what of it is damaged.

    Args:
        entry: of the catalogue, with sources.
        origin: which hub.
        revisions: branches, tags or commits, else the catalogue's: one for a model of one repository, and
            "REPOSITORY=REVISION" for one of several.
        watcher: told from this thread.

    Raises:
        RequestError: it cannot be fetched, not from there or not at that revision; offline is set.
        MissingError: the hub's client is not installed, or a licence has to be accepted first.
        FileError: a name leads out of the folder, or the folder cannot be written to.
        RunError: too little room, other bytes than the hub states, or the connection failed; the same call goes on.
    """
    sources = _sources(entry, origin)
    wanted_revisions = _revisions(entry, [repository for _, repository in sources], revisions)
    hub = connect(origin, f"gesso models pull {entry.name}")
    folder = _own_folder(entry)
    with quiet(), _settled(), _alone(entry, watcher.wait):
        listings = [hub.listing(repository, revision) for repository, revision in wanted_revisions]
        chosen = [(source, listing) for (source, _), listing in zip(sources, listings, strict=True)]
        wanted = _wanted(entry, folder, chosen)
        total, here = sum(task.file.size for task in wanted), sum(task.have() for task in wanted)
        _make_sure_of_room(entry, total - here)
        watcher.begin(total, here)
        ready_folder(folder / manifest.UNFINISHED)  # from now on the model is not ready
        outdated = _outdated(folder, wanted)
        digests, fetched = fetch_all(hub, wanted, watcher.move)
        _drop(outdated)
        _write_manifest(folder, wanted, digests)
        _write_json(folder / REVISIONS, {listing.repository: listing.revision for listing in listings})
        shutil.rmtree(folder / manifest.UNFINISHED)
    return Pulled(
        folder=folder,
        revisions=tuple((listing.repository, listing.revision) for listing in listings),
        files=len(wanted),
        size=total,
        fetched=fetched,
    )


def pulled_from(entry: Entry) -> dict[str, str]:
    """Each repository that a model was pulled from, and the commit that its files are of; a branch from hubs without.

    {} where nobody knows: for what was not pulled, or by a gesso that did not write it down, or not to the end.
    """
    if not entry.sources or (entry.folder / manifest.UNFINISHED).exists():
        return {}
    try:
        found = json.loads((entry.folder / REVISIONS).read_text(encoding="utf-8"))
        return {str(repository): str(revision) for repository, revision in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError):  # it is a remark: nothing depends on it
        return {}


def removable(entry: Entry) -> tuple[Path, int]:
    """The folder of a pulled model, and the bytes that its removal frees.

    Raises RequestError for what was not pulled, FileError where there is none or it lies elsewhere.
    """
    if not entry.sources:
        raise RequestError("name", entry.name, "a model that was pulled", f"it is {entry.source}, and stays")
    folder = _own_folder(entry)
    if not folder.is_dir():
        raise FileError(folder, "no such folder", f"{entry.name} is not here")
    return folder, sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def remove(entry: Entry) -> int:
    """Remove a pulled model's folder; returns the bytes freed.

    Raises as `removable`, and RunError while it is being pulled.
    """
    with _alone(entry, None):
        folder, size = removable(entry)
        # Moved away first, so that a removal that is cut short leaves no half of a model.
        away = folder.with_name(f".{entry.name}.removed")
        try:
            shutil.rmtree(away, ignore_errors=True)
            folder.rename(away)
            shutil.rmtree(away)
        except OSError as error:
            raise FileError(folder, f"cannot be removed ({(error.strerror or str(error)).lower()})") from error
    return size


def free_bytes(folder: Path) -> int:
    """Room on the disk that a folder lies on, or would lie on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _sources(entry: Entry, origin: HubName) -> list[tuple[Source, str]]:
    """Each source with its repository's name on that hub."""
    if not entry.sources:
        raise RequestError("name", entry.name, "a published model", f"it is {entry.source}: nothing is to be fetched")
    if origin == "huggingface":
        return [(source, source.repository) for source in entry.sources]
    if not all(source.modelscope for source in entry.sources):
        raise RequestError("from", origin, f"a hub that has {entry.name}", "use --from huggingface")
    return [(source, source.modelscope) for source in entry.sources]


def _revisions(entry: Entry, repositories: Sequence[str], said: Sequence[str]) -> list[tuple[str, str | None]]:
    """Each repository with its revision: as it was said, else the catalogue's, else None for the hub's main branch."""
    chosen = {name: source.revision or None for name, source in zip(repositories, entry.sources, strict=True)}
    for each in said:
        repository, _, revision = each.rpartition("=")
        if not repository and len(chosen) == 1:
            repository = next(iter(chosen))
        if repository not in chosen or not revision:
            known = " or ".join(f"{name}=REVISION" for name in chosen)
            allowed = "a revision of it" if len(chosen) == 1 else "said of one of its repositories"
            raise RequestError("revision", each, allowed, f"say {known}")
        chosen[repository] = revision
    return [(repository, chosen[repository]) for repository in repositories]


def _own_folder(entry: Entry) -> Path:
    """The entry's folder.

    Raises RequestError for an entry that was found by a path or another name, FileError where a link leads it out of
    the home's weights.
    """
    if entry.name != entry.folder.name:
        raise RequestError("name", entry.name, "a model's own name", f"say {entry.folder.name}, which lies there")
    weights = load_settings().home / "weights"
    folder = inside(weights, entry.name)
    if folder != entry.folder or folder.is_symlink():
        raise FileError(entry.folder, f"is no folder of its own in {weights}")
    return folder


def _wanted(entry: Entry, folder: Path, sources: Sequence[tuple[Source, Listing]]) -> list[Wanted]:
    """Every file to have, by its place. Raises FileError for names that lead out, RunError where parts are missing."""
    found: dict[Path, Wanted] = {}
    for source, listing in sources:
        for file in listing.files:
            named = file.name in source.patterns
            if named or (
                file.name.endswith(_ENDINGS) and any(fnmatchcase(file.name, each) for each in source.patterns)
            ):
                path = inside(folder / source.folder, file.name)
                part = part_of(folder, path, listing, file)
                found[path] = Wanted(listing=listing, file=file, path=path, part=part)
    for name in entry.files:
        if not any(path == folder / name or folder / name in path.parents for path in found):
            repositories = ", ".join(f"{listing.repository} at {listing.revision[:12]}" for _, listing in sources)
            raise RunError(f"{repositories} holds no {name}, which {entry.name} needs; try another --revision")
    return list(found.values())


def _make_sure_of_room(entry: Entry, needed: int) -> None:
    free = free_bytes(entry.folder)
    if needed > free:
        raise RunError(
            f"{entry.name} needs {amount(needed)} more and {entry.folder} has {amount(free)} free; "
            "make room there, or set GESSO_HOME to another disk"
        )


def amount(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _outdated(folder: Path, wanted: Sequence[Wanted]) -> list[Path]:
    """Files of earlier pulls that this one does not have: beside its own, an old index of shards would be believed.

    Names are kept until a pull is whole, so that those of pulls that were cut short are known to the next.
    """
    begun = folder / manifest.UNFINISHED
    here = {task.path.relative_to(folder).as_posix() for task in wanted}
    before: set[str] = set()
    for place in (folder, begun):
        with suppress(WeightsError):  # nothing was pulled, or nobody knows what
            before.update(manifest.names(place))
    _write_json(begun / manifest.NAME, dict.fromkeys(sorted(before | here)))
    return [inside(folder, name) for name in sorted(before - here)]


def _drop(outdated: Sequence[Path]) -> None:
    for path in outdated:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(path, error) from error


def _write_manifest(folder: Path, wanted: Sequence[Wanted], digests: dict[Path, str]) -> None:
    listed = {
        task.path.relative_to(folder).as_posix(): {"bytes": task.file.size, "sha256": digests[task.path]}
        for task in sorted(wanted, key=lambda task: task.path)
    }
    _write_json(folder / manifest.NAME, listed)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _settled() -> Iterator[None]:
    """What might have passed and did not is a plain failure of the run."""
    try:
        yield
    except TransientError as error:
        raise RunError(error.message) from error


@contextmanager
def _alone(entry: Entry, wait: Callable[[], None] | None) -> Iterator[None]:
    """Hold the model's lock; without `wait` a busy one is an error. The system frees it if this process dies."""
    from filelock import FileLock, Timeout  # comes with torch and both clients

    lock = FileLock(ready_folder(load_settings().home / "weights" / ".locks") / f"{entry.folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if wait is None:
            raise RunError(f"{entry.name} is being pulled; wait for that, or stop it") from None
        wait()
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()
