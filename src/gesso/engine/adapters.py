"""Adapters as the engine uses them: planned with a request, held while it is under way, on its model for each call.

Here: what adapters mean before anything is fetched (`with_adapters`), one request's (`Held`), and those on one model's
networks (`ModelAdapters`). Not here: fetching and reading them beside the loop's work (`fetching`), what they are and
what they do (`adapters`), who steps with whom (`groups`). PyTorch is not imported before a request has one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from gesso.devices import CPU
from gesso.errors import FileError, RequestError, WeightsError
from gesso.pipelines.contract import Pipeline, Plan

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gesso.adapters.apply import Adapted, Uses
    from gesso.adapters.formats.classification import Classification
    from gesso.adapters.formats.reading import Adapter
    from gesso.adapters.sources import Source

ROLES = ("transformer", "unet", "text_encoder", "text_encoder_2")
"""Parts of a model that adapters are for, by the names under which loaders place them."""
_BY_TOKENS = ("toca", "duca", "random", "clusca")
"""Policies of step caches under which layers see some tokens of each picture, so that rows are not told apart."""
_NUMBERS = count()


# ---- before the first step ------------------------------------------------------------------------------------------


def with_adapters(pipeline: Pipeline, plan: Plan) -> Plan:
    """The plan with all that the request's adapters mean, as far as files are here: scales filled in, bytes.

    The pipeline may be on the meta device; nothing is fetched and no tensor is read. Raises RequestError for a model
    that adapters are not for, FileError or WeightsError for files that are here and cannot be used.
    """
    wanted = plan.request.lora
    if not wanted:
        return plan
    model = ModelAdapters(pipeline)
    if not model.family:
        hint = "its network is of no family that adapters are for; leave it out"
        raise RequestError("lora", wanted[0].shown, f"usable with {plan.request.model}", hint)

    held = sum(size or 0 for _, size in adapter_bytes(pipeline, plan))
    filled = tuple(lora.model_copy(update={"scale": 1.0 if lora.scale is None else lora.scale}) for lora in wanted)
    return replace(
        plan,
        request=plan.request.model_copy(update={"lora": filled}),
        peak_bytes=plan.peak_bytes + held,
        activations={stage: size + held for stage, size in plan.activations.items()},
    )


def adapter_bytes(pipeline: Pipeline, plan: Plan) -> list[tuple[str, int | None]]:
    """Each adapter's source as it is shown, and its bytes in memory; None for one that is to be fetched first.

    Raises FileError or WeightsError for files that are here and cannot be used.
    """
    if not plan.request.lora:
        return []

    from gesso.adapters.formats.reading import check_family
    from gesso.adapters.sources import parse
    from gesso.adapters.store import AdapterStore, Wishes

    model, store = ModelAdapters(pipeline), AdapterStore()
    family, dtype = model.family, model.dtype
    found: list[tuple[str, int | None]] = []
    for source in (parse(lora.source) for lora in plan.request.lora):
        path, size = store.glance(source, Wishes(family=family)), None
        if path is not None:
            with told_of(source):
                check_family(path, looked_at(path).classification, family)
                size = looked_at(path).bytes_in(dtype)
        found.append((source.shown, size))
    return found


@dataclass(frozen=True)
class Looked:
    """What a file is by its header, and how many bytes its tensors have as they are."""

    classification: Classification
    numbers: int
    bytes: int

    def bytes_in(self, dtype: torch.dtype | None) -> int:
        """How many they will have in memory."""
        return self.bytes if dtype is None else self.numbers * dtype.itemsize


def looked_at(path: Path) -> Looked:
    """A file by its header, read once as long as the file stays what it was. Raises FileError, WeightsError."""
    return _looked_at(path, marks(path))


@lru_cache(maxsize=1024)
def _looked_at(path: Path, found: tuple[int, ...]) -> Looked:
    from gesso.adapters.formats.classification import classify
    from gesso.weights.headers import read_header

    return Looked(classify(path), sum(tensor.count for tensor in read_header(path).values()), found[0])


def marks(path: Path) -> tuple[int, ...]:
    """Size, time of change and inode: what tells that a file was written to since, or what lies beside it for PEFT.

    Raises FileError.
    """
    from gesso.adapters.formats.peft import CONFIG

    try:
        found = [path.stat()]
        with suppress(FileNotFoundError):
            found.append(path.with_name(CONFIG).stat())
    except OSError as error:
        raise FileError(path, f"cannot be read ({(error.strerror or str(error)).lower()})") from error
    return tuple(mark for each in found for mark in (each.st_size, each.st_mtime_ns, each.st_ino))


@contextmanager
def told_of(source: Source) -> Iterator[None]:
    """Errors within tell of a file by its source, not by where it lies."""
    try:
        yield
    except FileError as error:
        raise FileError(source.shown, error.problem, error.hint) from error
    except WeightsError as error:
        raise WeightsError(source.shown, error.missing, error.unexpected, error.mismatched, error.detail) from error


# ---- while pictures are painted -------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class Held:
    """One request's adapters: on their way, then in memory until `release`. Without any, it is there at once.

    Attributes:
        uses: adapters and how strongly each is wanted; empty before they are there, and when they are let go.
        mixing: belongs in the key of those who may step together.
        reading: belongs in the key of those whose prompts may be read together.
        records: of each what goes into the metadata of pictures.
        warnings: sentences for the person who asked.
        problem: why they cannot be had.
        settled: whether they are there, or cannot be had.
        seconds: what that took.
        cancelled: set when nobody waits for them any more.
    """

    uses: Uses = ()
    mixing: Hashable = ()
    reading: Hashable = ()
    records: Sequence[Mapping[str, object]] = ()
    warnings: tuple[str, ...] = ()
    problem: BaseException | None = None
    settled: bool = True
    seconds: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)
    _began: float = field(default_factory=time.perf_counter)
    _pins: ExitStack | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(
        self,
        model: ModelAdapters,
        plan: Plan,
        uses: Uses,
        records: Sequence[Mapping[str, object]],
        warnings: Sequence[str],
        pins: ExitStack,
    ) -> None:
        """They are there, and stay for as long as `pins` are not closed; which is at once where nobody waits."""
        from gesso.adapters.apply import marks_of, mixing_key, reading_key

        with self._lock:
            if self.cancelled.is_set():
                pins.close()
                return
            cache = plan.request.cache
            by_tokens = cache is not None and cache.policy in _BY_TOKENS
            self.mixing = marks_of(uses) if by_tokens else mixing_key(uses, model.network)
            self.reading = reading_key(uses, model.network)
            self.uses, self.records, self._pins = uses, records, pins
            self.warnings = (*(warning for adapter, _ in uses for warning in adapter.warnings), *warnings)
            self.seconds, self.settled = time.perf_counter() - self._began, True

    def fail(self, problem: BaseException) -> None:
        """They cannot be had."""
        self.problem, self.settled = problem, True

    def release(self) -> None:
        """The request has ended. Nothing happens the second time."""
        with self._lock:
            self.cancelled.set()
            self.uses, pins, self._pins = (), self._pins, None
        if pins is not None:
            pins.close()


class ModelAdapters:
    """The adapters on one model's networks.

    Attributes:
        number: tells it from other models.
        networks: by role, those that adapters are for.
        network: the one that tells the family, None where none does.
        family: "" where adapters are for none of its networks.
        device: where adapters go.
        dtype: what they are brought to, None for that of their files.
        when_detached: called once the model is let go of.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.number = next(_NUMBERS)
        self._pipeline = pipeline
        self._adapted: Adapted | None = None
        self.detached = False
        self.when_detached: Callable[[ModelAdapters], None] | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        placed = getattr(getattr(self._pipeline, "build", None), "networks", None)
        found = placed or {role: getattr(self._pipeline, role, None) for role in ROLES}
        return {role: network for role in ROLES if (network := found.get(role)) is not None}

    @property
    def family(self) -> str:
        from gesso.adapters.formats.places import family_of

        return "" if self.network is None else family_of(self.network)

    @property
    def network(self) -> nn.Module | None:
        from gesso.adapters.formats.places import family_of

        return next((network for network in self.networks.values() if family_of(network)), None)

    @property
    def device(self) -> str:
        build = getattr(self._pipeline, "build", None)
        return str(getattr(build, "device", None) or getattr(self._pipeline, "device", CPU))

    @property
    def dtype(self) -> torch.dtype | None:
        return getattr(self._pipeline, "dtype", None)

    @contextmanager
    def using(self, company: Sequence[Held]) -> Iterator[None]:
        """While it lasts, networks are evaluated for these requests' pictures, in this order, each with its own."""
        if not any(held.uses for held in company):
            yield
            return
        if self._adapted is None:
            from gesso.adapters.apply import Adapted

            self._adapted = Adapted(self.networks)
        with self._adapted.using([held.uses for held in company]):
            yield

    @contextmanager
    def reading(self, company: Sequence[Held]) -> Iterator[None]:
        """The same for prompts of these requests, whose `reading` is equal."""
        with self.using(company if company[0].reading else ()):
            yield

    def forget(self, adapter: Adapter) -> None:
        """Keep nothing of an adapter that is about to leave memory, and in no use."""
        if self._adapted is not None:
            self._adapted.forget(adapter)

    def detach(self) -> None:
        """The model is let go of, and its adapters with it."""
        self.detached, self._adapted = True, None
        if self.when_detached is not None:
            self.when_detached(self)
