"""Having adapters here: the one that a source means, fetched once, checked, kept by its SHA-256.

Safe for threads and for several processes; a crash leaves no broken entry. Not here: what lies where on the disk
(`store_index`), getting bytes (`sources_download`), adapters in memory (`resident`), what is in a file (`formats`).
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from gesso.adapters.formats.classification import Classification, classify
from gesso.adapters.formats.peft import LARGEST_CONFIG, config_beside, parse_config
from gesso.adapters.sources import Site, Source
from gesso.adapters.sources_archive import extract, is_archive
from gesso.adapters.sources_download import Downloaded, download, drop, probe, small
from gesso.adapters.sources_sites import Remote, look_up
from gesso.adapters.store_index import WEIGHTS, Adapter, Index, Origin, digits_of
from gesso.errors import CancelledError, FileError, RequestError, RunError, WeightsError
from gesso.network import Network
from gesso.settings import load_settings
from gesso.weights import digests, manifest
from gesso.weights.hub_clients import AGAIN
from gesso.weights.hub_transfer import disk_error

_HEX = frozenset("0123456789abcdef")
LEFT_OUT = "left out"
"""The fact of a source's origin that names what of it is not read."""
_SHORTEST = 6  # digits of a digest that name a file


class Watcher(Protocol):
    """Who is told how a fetch goes."""

    def begin(self, total: int | None, here: int) -> None:
        """The file has so many bytes, None where its host does not say, of which so many are here."""
        ...

    def move(self, here: int) -> None:
        """So many bytes are here now."""
        ...

    def wait(self) -> None:
        """Another process or thread fetches the same; this one waits for it."""
        ...


Outcome = Literal["local", "kept", "fetched", "updated"]
"""A file of this machine; one that was here; one that came; one that came because its source has changed."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """An adapter, how it came to be here, and the bytes that came over the network for it."""

    adapter: Adapter
    outcome: Outcome
    received: int = 0


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How an adapter is to be had.

    `update`: ask its site whether it has changed, also if it is here. `family` chooses among a CivitAI model's versions
    where none is named. `limit`: bytes that it may have, instead of the setting `largest_adapter`. `tokens` are
    somebody's own, by site: what comes by one is given to nobody else before the site has agreed.
    """

    update: bool = False
    family: str = ""
    limit: int | None = None
    tokens: Mapping[Site, str] | None = None

    def key(self, source: Source) -> str:
        """One for everything that means the same file at the same time."""
        open_version = source.site == "civitai" and not source.version
        return _hashed(source.key, self.family) if self.family and open_version else source.key


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What a store did since it was made, for metrics."""

    kept: int = 0
    fetched: int = 0
    failed: int = 0
    received_bytes: int = 0
    fetching_seconds: float = 0.0


class AdapterStore:
    """The adapters of one home.

    Args:
        folder: where they lie; else `adapters` in the settings' home.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._index = Index(folder or load_settings().home / "adapters")
        self._counters = Counters()
        self._lock = threading.Lock()

    def ensure(
        self,
        source: Source,
        wishes: Wishes | None = None,
        *,
        cancelled: threading.Event | None = None,
        watcher: Watcher | None = None,
    ) -> Fetched:
        """Have an adapter here.

        Args:
            source: where it comes from.
            wishes: how.
            cancelled: ends this with CancelledError once it is set.
            watcher: told from this thread.

        Raises:
            RequestError, FileError, WeightsError: no source, or a file of this machine that is no adapter.
            MissingError: a licence has to be accepted first, or a library is not installed.
            RunError: it did not come, is too large or no adapter; what has come is kept where that helps.
            CancelledError: it was cancelled.
        """
        wishes = wishes or Wishes()
        if (here := self.here(source, wishes)) is not None:
            return here
        began = time.monotonic()
        try:
            with Network(allow_private=load_settings().allow_private_addresses, cancelled=cancelled) as network:
                found = self._alone(source, wishes, network, watcher)
        except BaseException:
            self._count(failed=1, fetching_seconds=time.monotonic() - began)
            raise
        new = int(found.outcome != "kept")
        seconds = time.monotonic() - began
        self._count(kept=1 - new, fetched=new, received_bytes=found.received, fetching_seconds=seconds)
        return found

    def here(self, source: Source, wishes: Wishes | None = None) -> Fetched | None:
        """The same without asking anybody: a file of this machine, or one that was fetched; None for others.

        Raises RequestError for what could be two things; FileError, WeightsError.
        """
        wishes = wishes or Wishes()
        if source.path is not None:
            return Fetched(adapter=checked_file(source.path), outcome="local")
        known = self._known(source, wishes)
        here = None if known is None else self._index.adapter(known.sha256, known.config, whole=True)
        if here is None:
            return None
        self._count(kept=1)
        return Fetched(adapter=here, outcome="kept")

    def glance(self, source: Source, wishes: Wishes | None = None) -> Path | None:
        """The file that a source will likely be, None for one that is to be fetched; its bytes are not looked at.

        Raises RequestError for what could be two things, FileError for a file of this machine that is not there.
        """
        if source.path is not None:
            if not source.path.is_file():
                raise _no_such_file(source.path)
            return source.path
        known = self._known(source, wishes or Wishes())
        return None if known is None else self._index.path(known.sha256, known.config)

    def _known(self, source: Source, wishes: Wishes) -> Origin | None:
        """What is noted of a source, where that may be used."""
        if source.site == "huggingface" and source.file and _is_file(source.shown):
            way_out = f"write ./{source.shown} for the file here, hf:{source.shown} for the repository"
            raise RequestError("source", source.shown, "one thing: it is a file here, too", way_out)
        known = self._index.origin(wishes.key(source))
        return None if known is None or wishes.update or known.private else known

    def adapters(self) -> list[Adapter]:
        """All that are here, the latest first."""
        return self._index.adapters()

    def find(self, name: str | Source) -> Adapter:
        """One that is here, by its source or the first digits of its SHA-256. Raises RequestError."""
        here = self.adapters()
        if isinstance(name, Source):
            shown = name.shown
            found = [each for each in here if any(origin.source == shown for origin in each.origins)]
        else:
            shown, digits = name, name.lower()
            usable = len(digits) >= _SHORTEST and _HEX.issuperset(digits.replace("-", "", 1))
            exact = [each for each in here if each.name == digits]
            found = exact or [each for each in here if usable and each.name.startswith(digits)]
        if len(found) == 1:
            return found[0]
        if found:
            same = len({each.sha256 for each in found}) < len(found)
            several = ", ".join(each.name if same else each.sha256[:12] for each in found)
            raise RequestError("adapter", shown, "one adapter", f"name one by its digits: {several}")
        way_out = f"write ./{shown} for the file here" if _is_file(shown) else f"gesso lora list shows {len(here)}"
        raise RequestError("adapter", shown, "an adapter that is here", way_out)

    def remove(self, adapter: Adapter) -> int:
        """Remove one and what is known of it; returns the bytes freed. Raises FileError."""
        self._index.remove(adapter)
        return adapter.size

    def counters(self) -> Counters:
        """What this store did since it was made."""
        with self._lock:
            return self._counters

    def _alone(self, source: Source, wishes: Wishes, network: Network, watcher: Watcher | None) -> Fetched:
        """Fetch while nobody else fetches the same."""

        def tick() -> None:
            if network.stop.is_set():
                raise CancelledError

        since = time.time()
        with self._index.alone(wishes.key(source), watcher.wait if watcher else lambda: None, tick):
            return self._fetch(source, wishes, network, watcher, since)

    def _fetch(
        self, source: Source, wishes: Wishes, network: Network, watcher: Watcher | None, since: float
    ) -> Fetched:
        """Ask the site, and get the file unless it is here."""
        key, tokens = wishes.key(source), wishes.tokens or {}
        known = self._index.origin(key)
        new = known and known.fetched >= since and not known.private
        if known and new and (here := self._index.adapter(known.sha256, known.config)):
            return Fetched(adapter=here, outcome="kept")  # somebody else has fetched it while this waited
        remote = look_up(source, network, family=wishes.family, tokens=tokens)
        first = None
        if not remote.revision:
            first = probe(remote, network)
            remote = replace(remote, revision=first.mark)
        same = known.sha256 if known and remote.revision and remote.revision == known.revision else ""
        origin = Origin(
            source=source.shown,
            key=key,
            sha256=remote.sha256 or same,
            revision=remote.revision,
            fetched=time.time(),
            private=source.site in tokens,
            facts=remote.facts,
        )
        config = small(remote.config, network, limit=LARGEST_CONFIG) if remote.config else b""
        if origin.sha256 and (here := self._index.weights(origin.sha256)):
            if all(each.private for each in here.origins) and first is None:
                probe(remote, network)  # a site may tell of what it does not give to everybody
            origin = replace(origin, facts={**(known.facts if known and same else {}), **remote.facts})
            return self._kept(here, origin, config, known)
        part = self._index.part(_hashed(key, remote.revision, remote.sha256))
        limit = int(wishes.limit or load_settings().largest_adapter)
        got = download(remote, part, network, limit=limit, tell=_Teller(watcher), first=first)
        adapter = self._place(part, got, remote, origin, limit, config)
        changed = known is not None and (known.sha256, known.config) != (adapter.sha256, adapter.config)
        return Fetched(adapter=adapter, outcome="updated" if changed else "fetched", received=got.fetched)

    def _kept(self, here: Adapter, origin: Origin, config: bytes, known: Origin | None) -> Fetched:
        """Note the source of a file whose bytes are here; what its site says of alpha may have changed all the same."""
        with _told_of(origin.source):
            config = _used(config, here.path, classify(here.path))
        origin = replace(origin, config=digits_of(config))
        if self._index.adapter(origin.sha256, origin.config, whole=True):
            self._index.note(origin)
        else:
            try:
                self._index.share(here, origin, config)
            except OSError as error:
                raise disk_error(here.path, error) from error
        changed = known is not None and known.config != origin.config
        adapter = self._index.adapter(origin.sha256, origin.config) or here
        return Fetched(adapter=adapter, outcome="updated" if changed else "kept")

    def _place(self, part: Path, got: Downloaded, remote: Remote, origin: Origin, limit: int, config: bytes) -> Adapter:
        """Check what has come and give it its name. What is no adapter is removed."""
        whole = part
        try:
            if is_archive(part):
                whole = part.with_suffix(WEIGHTS)
                member, words = extract(part, remote.member, whole, name=remote.name, limit=limit)
                left_out = {LEFT_OUT: f"trained words ({', '.join(words)})"} if words else {}
                origin = replace(origin, facts={**origin.facts, "file": member} | left_out)
                origin = replace(origin, sha256=manifest.sha256(whole))
            else:
                origin = replace(origin, sha256=got.sha256)
            with _told_of(remote.name):
                config = _used(config, whole, check(whole))
            origin = replace(origin, config=digits_of(config))
            self._index.place(whole, origin, config)
        except OSError as error:
            raise disk_error(part, error) from error
        finally:
            drop(part)
            part.with_suffix(WEIGHTS).unlink(missing_ok=True)
        adapter = self._index.adapter(origin.sha256, origin.config)
        if adapter is None:
            raise RunError(f"{remote.name} came, and was removed by somebody else at once; {AGAIN}")
        return adapter

    def _count(self, **more: float) -> None:
        with self._lock:
            sums = {name: getattr(self._counters, name) + count for name, count in more.items()}
            self._counters = replace(self._counters, **sums)


def _used(config: bytes, path: Path, found: Classification) -> bytes:
    """A configuration that came with weights, where these have need of one. Raises FileError for one that is broken."""
    if config and found.peft:
        parse_config(path, config)
    return config if found.peft else b""


def checked_file(path: Path) -> Adapter:
    """A file of this machine, used where it lies. Raises FileError, WeightsError."""
    if not path.is_file():
        raise _no_such_file(path)
    config = config_beside(path) if check(path).peft else b""
    return Adapter(path=path, sha256=digests.sha256(path), size=path.stat().st_size, config=digits_of(config))


def warnings_of(adapter: Adapter, source: Source) -> tuple[str, ...]:
    """What was left out of what the source has, in sentences for the person who asked for it."""
    facts = [origin.facts for origin in adapter.origins if origin.source == source.shown]
    words = [found[LEFT_OUT] for found in facts if LEFT_OUT in found]
    said = "that are not read, so that what stands for them in prompts (TOK, <s0>) means nothing here"
    return tuple(f"{source.shown} has {each} {said}" for each in words[:1])


def _is_file(name: str) -> bool:
    """Whether a name that need not be a path is that of a file here."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # longer than names may be, or with a zero byte
        return False


def _no_such_file(path: Path) -> FileError:
    return FileError(path, "no such file", "name a .safetensors file")


def check(path: Path) -> Classification:
    """Make sure that a file is safetensors throughout, and an adapter. Raises FileError, WeightsError."""
    from safetensors import SafetensorError, safe_open

    found = classify(path)
    try:
        with safe_open(path, framework="np"):  # tensors must lie side by side and fill the file
            return found
    except (SafetensorError, OSError) as error:
        raise WeightsError(path, detail="not safetensors, or its header is damaged") from error


class _Teller:
    """Passes on to a watcher what a download tells."""

    def __init__(self, watcher: Watcher | None) -> None:
        self._watcher = watcher
        self._begun = False

    def __call__(self, total: int | None, here: int) -> None:
        if self._watcher is None:
            return
        if not self._begun:
            self._begun = True
            self._watcher.begin(total, here)
        self._watcher.move(here)


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Tell of a file that has come by its name, not by where it lay for a moment."""
    try:
        yield
    except FileError as error:
        raise RunError(f"{name} {error.problem}; {error.hint}") from error
    except WeightsError as error:
        raise RunError(f"{name} cannot be used: {error.detail}") from error


def _hashed(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
