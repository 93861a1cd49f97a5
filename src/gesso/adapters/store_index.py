"""What of adapters lies on the disk: files by their SHA-256, and a record for each source that came to one.

    files/<sha256>.safetensors      whole and checked, never written to again
    files/<sha256>-<digits>/        the same with PEFT's configuration beside it, which has these digits
    sources/<key>.json              a source, and what it was when it was fetched
    .unfinished/<key>.*             what has come of a file that is being fetched
    .locks/                         held for all processes

A file gets its name by a rename once it is whole, and its source's record after that, so that nothing half-done is
ever found. Not here: fetching (`store`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gesso.adapters.formats.peft import CONFIG, config_beside
from gesso.errors import FileError
from gesso.files import ready_folder, written_aside
from gesso.weights import digests

WEIGHTS = ".safetensors"
_PEFT_WEIGHTS = f"adapter_model{WEIGHTS}"
_DIGITS = 16
_TICK = 0.1  # seconds between tries for a lock
_FORGOTTEN = 14 * 24 * 3600.0  # seconds after which nobody goes on with a file that was begun


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A source as it was when it was fetched.

    `revision` is a commit or version, `fetched` seconds since 1970, `private` says that it came by somebody's own token
    and not by the machine's, `facts` is what its site says of it, `config` the digits of PEFT's configuration.
    """

    source: str
    key: str
    sha256: str
    revision: str = ""
    fetched: float = 0.0
    private: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)
    config: str = ""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A file that is here, and where it came from, the latest first; `config` as in `Origin`."""

    path: Path
    sha256: str
    size: int
    origins: tuple[Origin, ...] = ()
    config: str = ""

    @property
    def name(self) -> str:
        """What tells it from others: two configurations make two adapters of the same bytes."""
        return f"{self.sha256}-{self.config}" if self.config else self.sha256


def digits_of(config: bytes) -> str:
    """What tells one configuration from others; "" where there is none."""
    return hashlib.sha256(config).hexdigest()[:_DIGITS] if config else ""


class Index:
    """The folder of adapters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def part(self, key: str) -> Path:
        """Where a file grows that is being fetched. Raises FileError where nothing can be written."""
        unfinished = ready_folder(self.folder / ".unfinished")
        for path in unfinished.iterdir():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _FORGOTTEN:
                    path.unlink()
        return unfinished / f"{key}.part"

    def origin(self, key: str) -> Origin | None:
        """The record of a source, None where there is none that can be read."""
        try:
            return Origin(**json.loads(self._record(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def adapter(self, sha256: str, config: str = "", *, whole: bool = False) -> Adapter | None:
        """A file by its digest, None where it is not here; with `whole` it is held against its digest, too."""
        path = self._file(sha256, config)
        try:
            size = path.stat().st_size
            if config and digits_of(config_beside(path)) != config:
                return None
            if whole and digests.sha256(path) != sha256:
                return None
        except (OSError, FileError):
            return None
        origins = [each for each in self._origins() if (each.sha256, each.config) == (sha256, config)]
        return Adapter(path=path, sha256=sha256, size=size, origins=_latest_first(origins), config=config)

    def weights(self, sha256: str) -> Adapter | None:
        """One whose file has this digest and is whole, with whatever configuration; None where none is here."""
        found = [each for each in self.adapters() if each.sha256 == sha256]
        return next((each for each in found if self.adapter(sha256, each.config, whole=True)), None)

    def path(self, sha256: str, config: str = "") -> Path | None:
        """Where a file lies, None where it is not here."""
        path = self._file(sha256, config)
        return path if path.is_file() and (not config or path.with_name(CONFIG).is_file()) else None

    def adapters(self) -> list[Adapter]:
        """All files that are here, the latest first."""
        origins = self._origins()
        files, found = self.folder / "files", []
        for path in (*files.glob(f"*{WEIGHTS}"), *files.glob(f"*-*/{_PEFT_WEIGHTS}")):
            sha256, _, config = (path.stem if path.parent == files else path.parent.name).partition("-")
            with suppress(OSError):
                own = _latest_first([each for each in origins if (each.sha256, each.config) == (sha256, config)])
                size = path.stat().st_size
                found.append(Adapter(path=path, sha256=sha256, size=size, origins=own, config=config))
        return sorted(found, key=lambda each: (-each.origins[0].fetched if each.origins else 0.0, each.sha256))

    def place(self, whole: Path, origin: Origin, config: bytes = b"") -> None:
        """Give a whole file its name, and note its source. Raises FileError, RunError, OSError."""
        with self.changing():
            target = self._ready(origin, config)
            with whole.open("rb") as file:
                os.fsync(file.fileno())
            whole.replace(target)
            self._write(origin)

    def share(self, other: Adapter, origin: Origin, config: bytes) -> None:
        """Have a file that is here under another configuration, too; its bytes lie there once, if the disk can do so.

        Raises FileError, RunError, OSError.
        """
        with self.changing():
            if self.adapter(origin.sha256, origin.config, whole=True):  # somebody was quicker
                self._write(origin)
                return
            target = self._ready(origin, config)
            try:
                with written_aside(target) as aside:
                    aside.unlink()
                    os.link(other.path, aside)
            except (OSError, FileError):
                with written_aside(target) as aside:
                    shutil.copyfile(other.path, aside)
            self._write(origin)

    def _ready(self, origin: Origin, config: bytes) -> Path:
        """Where a file will lie, with its configuration there already."""
        target = self._file(origin.sha256, origin.config)
        ready_folder(target.parent)
        if config:
            with written_aside(target.with_name(CONFIG)) as aside:
                aside.write_bytes(config)
        return target

    def note(self, origin: Origin) -> None:
        """Note a source of a file that is here. Raises FileError, RunError."""
        with self.changing():
            self._write(origin)

    def remove(self, adapter: Adapter) -> None:
        """Remove a file and all records of it. Raises FileError."""
        with self.changing():
            try:
                # Records first: what is cut short then leaves a file without a name, and no name without its file.
                for origin in self._origins():
                    if (origin.sha256, origin.config) == (adapter.sha256, adapter.config):
                        self._record(origin.key).unlink(missing_ok=True)
                path = self._file(adapter.sha256, adapter.config)
                path.unlink(missing_ok=True)
                if adapter.config:
                    path.with_name(CONFIG).unlink(missing_ok=True)
                    with suppress(OSError):  # somebody may have laid something there
                        path.parent.rmdir()
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise FileError(adapter.path, f"cannot be removed ({reason})") from error

    @contextmanager
    def alone(self, key: str, waiting: Callable[[], None], tick: Callable[[], None]) -> Iterator[None]:
        """Hold a source's lock. `waiting` is called if it is held elsewhere, then `tick` again and again."""
        from filelock import FileLock, Timeout  # comes with torch and huggingface_hub

        lock = FileLock(ready_folder(self.folder / ".locks") / f"{key}.lock")
        told = False
        while True:
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                if not told:
                    waiting()
                told = True
                tick()
                time.sleep(_TICK)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock under which names come and go."""
        with self.alone("names", lambda: None, lambda: None):
            yield

    def _origins(self) -> list[Origin]:
        found = [self.origin(path.stem) for path in (self.folder / "sources").glob("*.json")]
        return [each for each in found if each is not None]

    def _write(self, origin: Origin) -> None:
        record = self._record(origin.key)
        ready_folder(record.parent)
        with written_aside(record) as aside:
            aside.write_text(json.dumps(asdict(origin), ensure_ascii=False), encoding="utf-8")

    def _record(self, key: str) -> Path:
        return self.folder / "sources" / f"{key}.json"

    def _file(self, sha256: str, config: str) -> Path:
        files = self.folder / "files"
        return files / f"{sha256}-{config}" / _PEFT_WEIGHTS if config else files / f"{sha256}{WEIGHTS}"


def _latest_first(origins: list[Origin]) -> tuple[Origin, ...]:
    return tuple(sorted(origins, key=lambda each: -each.fetched))
