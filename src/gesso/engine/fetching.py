"""Getting adapters while the loop goes on stepping: fetched, read and brought to the device by threads of their own.

What is in memory already is taken at once, so that such requests begin together with those that came with them. Else
one thread reads; a request takes all its adapters or waits for others to end and takes none, so that two never wait
for each other. A few more fetch what is not on this machine; who needs nothing fetched does not wait for them. What
happens in the loop's thread: `want`, and `Held.release`.
Not here: the disk's side (`adapters/store`), memory's (`adapters/resident`), and what is done with them (`adapters`).
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from gesso.engine.adapters import Held, ModelAdapters, looked_at, marks, told_of
from gesso.engine.device import release_memory
from gesso.engine.failures import is_out_of_memory
from gesso.errors import OutOfMemoryError
from gesso.pipelines.contract import Plan

if TYPE_CHECKING:
    from gesso.adapters.formats.reading import Adapter
    from gesso.adapters.resident import Resident
    from gesso.adapters.sources import Source
    from gesso.adapters.store import AdapterStore, Fetched

_REMEMBERED = 1024  # sources
_FETCHERS = 4  # requests whose adapters are fetched at once; each downloads in several ranges already


class _Read(NamedTuple):
    """An adapter in memory, and the model that it was read for."""

    adapter: Adapter
    model: weakref.ref[ModelAdapters]


@dataclass(eq=False, kw_only=True)
class _Order:
    """What one request wants."""

    held: Held
    model: ModelAdapters
    plan: Plan
    sources: list[Source]
    found: list[Fetched] | None = None


class Fetching:
    """The adapters of one engine, on the disk and in memory.

    Args:
        limit: bytes of adapters in memory, those of all models together.
        wake: called when something is ready for the loop.
    """

    def __init__(self, limit: int, wake: Callable[[], None]) -> None:
        self._limit, self._wake = limit, wake
        self._to_read: SimpleQueue[_Order | None] = SimpleQueue()
        self._to_fetch: SimpleQueue[_Order | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._crowded: list[_Order] = []  # Those that wait until others let go of theirs.
        self._releases = 0
        self._store: AdapterStore | None = None
        self._resident: Resident[_Read] | None = None
        self._last: OrderedDict[str, tuple[Path, tuple[int, ...], Fetched]] = OrderedDict()

    # ---- the loop's side --------------------------------------------------------------------------------------------

    def want(self, model: ModelAdapters, plan: Plan) -> Held:
        """Have a request's adapters, now or by and by: `settled` says when, and the loop is woken."""
        from gesso.adapters.sources import parse

        if self._resident is None:
            self._open()
        model.when_detached = self._forget
        held = Held(settled=False)
        sources = [parse(lora.source) for lora in plan.request.lora]
        order = _Order(held=held, model=model, plan=plan, sources=sources)
        if not self._taken_at_once(order):
            self._to_read.put(order)
        return held

    def let_go(self) -> None:
        """Let go of what is in no use: memory ran out."""
        if self._resident is not None:
            for name in self._resident.names():
                self._resident.forget(name)

    def counters(self) -> dict[str, float]:
        """What is in memory, and what was fetched and read since the engine was made; {} while nobody wanted any."""
        if self._resident is None or self._store is None:
            return {}
        return {**asdict(self._resident.counters()), **asdict(self._store.counters())}

    def close(self) -> None:
        """End the threads, when what they are at is done or cancelled."""
        for thread in self._threads:
            (self._to_fetch if thread.name.startswith("gesso-fetch") else self._to_read).put(None)

    def _taken_at_once(self, order: _Order) -> bool:
        """Whether all of them are in memory, as they were read from the files that their sources still mean."""
        from gesso.adapters.store import Wishes

        assert self._store is not None and self._resident is not None
        found: list[Fetched] = []
        here = self._resident.names()
        wishes = Wishes(family=order.model.family)
        try:
            for source in order.sources:
                path, known = self._store.glance(source, wishes), self._last.get(wishes.key(source))
                if path is None or known is None or known[:2] != (path, marks(path)):
                    return False
                if _name(order.model, known[2]) not in here:
                    return False
                found.append(known[2])
            self._take(order, found)
        except Exception:  # Reading them will say what is wrong.
            return False
        return True

    def _remember(self, order: _Order, found: list[Fetched]) -> None:
        """What each source came to."""
        from gesso.adapters.store import Wishes

        wishes = Wishes(family=order.model.family)
        for source, file in zip(order.sources, found, strict=True):
            path = file.adapter.path
            self._last[wishes.key(source)] = path, marks(path), file
            self._last.move_to_end(wishes.key(source))
        while len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)

    def _open(self) -> None:
        from gesso.adapters.resident import Resident
        from gesso.adapters.store import AdapterStore

        self._store = AdapterStore()
        self._resident = Resident(self._limit, lambda read: read.adapter.nbytes, _leave)
        queues = [("gesso-adapters", self._to_read, self._read)]
        queues += [(f"gesso-fetch-{number}", self._to_fetch, self._fetch) for number in range(_FETCHERS)]
        for name, orders, work in queues:
            thread = threading.Thread(target=self._serve, args=(orders, work), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _forget(self, model: ModelAdapters) -> None:
        """A model is gone, so nobody will use what was read for it."""
        assert self._resident is not None
        for name in self._resident.names():
            if name.startswith(_prefix(model)):
                self._resident.forget(name)

    # ---- the threads ------------------------------------------------------------------------------------------------

    def _serve(self, orders: SimpleQueue[_Order | None], work: Callable[[_Order], bool]) -> None:
        while (order := orders.get()) is not None:
            settled = True
            try:
                settled = order.held.cancelled.is_set() or work(order)
            except BaseException as problem:
                order.held.fail(problem)
            if settled:
                self._wake()
            del order  # What it knows of a model would live until the next one comes.

    def _fetch(self, order: _Order) -> bool:
        """Have all its files here."""
        from gesso.adapters.store import Wishes

        assert self._store is not None
        wishes, cancelled = Wishes(family=order.model.family), order.held.cancelled
        order.found = [self._store.ensure(source, wishes, cancelled=cancelled) for source in order.sources]
        self._to_read.put(order)
        return False

    def _read(self, order: _Order) -> bool:
        """Take all its adapters; whether it has them now."""
        order.found = order.found or self._here(order)
        if order.found is None:
            self._to_fetch.put(order)
            return False
        self._remember(order, order.found)
        with self._lock:
            releases = self._releases
        try:
            self._take(order, order.found)
        except OutOfMemoryError:
            if not self._waits(order, releases):
                raise
            return False
        return True

    def _waits(self, order: _Order, releases: int) -> bool:
        """Whether others have adapters now that make way when they end; it is read then."""
        assert self._resident is not None
        with self._lock:
            if self._releases != releases:
                self._to_read.put(order)
            elif self._resident.counters().pinned:
                self._crowded.append(order)
            else:
                return False
        return True

    def _here(self, order: _Order) -> list[Fetched] | None:
        """All its files, None where one has to be fetched."""
        from gesso.adapters.store import Wishes

        assert self._store is not None
        found: list[Fetched] = []
        for source in order.sources:
            here = self._store.here(source, Wishes(family=order.model.family))
            if here is None:
                return None
            found.append(here)
        return found

    def _take(self, order: _Order, found: list[Fetched]) -> None:
        """Read what is not in memory, and hold it all. Raises what is wrong with any, and holds none."""
        from gesso.adapters.apply import Use, checked
        from gesso.adapters.store import warnings_of

        self._check_limit(order, found)
        uses: list[Use] = []
        records: list[dict[str, object]] = []
        warnings: list[str] = []
        with ExitStack() as pins:
            for lora, source, file in zip(order.plan.request.lora, order.sources, found, strict=True):
                adapter = pins.enter_context(self._held(order, source, file)).adapter
                scale = 1.0 if lora.scale is None else lora.scale
                uses.append(Use(adapter, scale))
                kinds = ", ".join(sorted(adapter.classification.kinds))
                sha256 = f"sha256:{file.adapter.sha256}"
                records.append({"source": source.shown, "scale": scale, "digest": sha256, "kind": kinds})
                if file.adapter.config:
                    records[-1]["config"] = file.adapter.config
                warnings += warnings_of(file.adapter, source)
            together, until_released = checked(uses), ExitStack()
            until_released.callback(self._released, order.model)
            until_released.push(pins.pop_all())
        order.held.settle(order.model, order.plan, together, records, warnings, until_released)

    def _check_limit(self, order: _Order, found: list[Fetched]) -> None:
        """Raise OutOfMemoryError where they would not fit even if nobody else had any."""
        files = {file.adapter.name: file.adapter.path for file in found}
        needed = sum(looked_at(path).bytes_in(order.model.dtype) for path in files.values())
        if needed > self._limit:
            raise OutOfMemoryError(needed, self._limit, ["fewer adapters at once", "a larger adapter_memory"])

    @contextmanager
    def _held(self, order: _Order, source: Source, file: Fetched) -> Iterator[_Read]:
        model, path = order.model, file.adapter.path
        name = _name(model, file)

        def read() -> _Read:
            from gesso.adapters.formats.reading import read_adapter

            with told_of(source):
                found = read_adapter(path, model.networks, name=source.shown)
            return _Read(self._brought(found, model), weakref.ref(model))

        assert self._resident is not None
        expected = 0 if name in self._resident.names() else looked_at(path).bytes_in(model.dtype)
        with self._resident.held(name, expected, read, cancelled=order.held.cancelled) as held:
            yield held

    def _brought(self, adapter: Adapter, model: ModelAdapters) -> Adapter:
        """Where and as the model computes, so that no layer has to make a copy of its own."""
        try:
            return adapter.to(model.device, model.dtype)
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
        self.let_go()
        release_memory()
        return adapter.to(model.device, model.dtype)

    def _released(self, model: ModelAdapters) -> None:
        """Adapters were let go of: who waited for room tries again."""
        with self._lock:
            self._releases += 1
            waiting, self._crowded = self._crowded, []
        for order in waiting:
            self._to_read.put(order)
        if model.detached:  # It went while this was read for it.
            self._forget(model)


def _prefix(model: ModelAdapters) -> str:
    return f"{model.number} "


def _name(model: ModelAdapters, file: Fetched) -> str:
    """By what an adapter in memory is known."""
    return f"{_prefix(model)}{file.adapter.name}"


def _leave(read: _Read) -> None:
    """Nothing of it is kept by its model, if that is still there."""
    model = read.model()
    if model is not None:
        model.forget(read.adapter)
