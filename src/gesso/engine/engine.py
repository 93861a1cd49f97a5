"""``Engine``: loaded models, and one thread that paints with them. This file is its public face.

Callers' threads run what is here; all the work is done in ``loop``, what a caller holds is a ``job``.
"""

from __future__ import annotations

import math
import secrets
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from gesso.devices import check_dtype, check_name
from gesso.engine.acceleration import PLAIN, Acceleration
from gesso.engine.admission import Load
from gesso.engine.budget import parse_budget
from gesso.engine.job import Job
from gesso.engine.loop import Loop
from gesso.engine.safety import Guard
from gesso.engine.scheduler import Policy, check_policy
from gesso.engine.standing import HIGHEST, LOWEST
from gesso.errors import RequestError, RunError
from gesso.events import Event, Result
from gesso.memory_modes import check_memory
from gesso.pipelines.contract import Pipeline
from gesso.request import GenerationRequest
from gesso.settings import load_settings

_DRAWN_SEEDS = 2**32  # Short enough to be read aloud; far below the largest seed whatever the number of pictures.


class Engine:
    """Keeps models loaded and paints with them. Every method may be called from any thread.

    Requests join and leave between steps: pictures of different requests that are at the same step of the same model
    at the same size advance together. One thread works, on one device; it starts with the first request.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None takes the setting, else CUDA if there is one, else the CPU.
        dtype: what to compute in, by PyTorch's name (``float32``, ``bfloat16``, ``float16``); None takes the setting,
            else leaves it to the model.
        attention: the kernel of attention in the networks that are run at every step (``sdpa``, ``flash``, …;
            `docs/speed.md`); None takes the setting, which is ``sdpa`` unless it was changed. One that does not run
            here fails the requests before weights are read.
        compile: whether the blocks of these networks are compiled, each kind once, when they first run; None takes the
            setting, which is not to unless it was changed.
        memory: how models lie in memory (``full``, ``offload``, ``8bit``, …; `docs/memory.md`); None takes the setting,
            which is ``auto`` unless it was changed: by what is free and what the first request to a model needs, a mode
            that leaves every bit of the pictures as it is.
        policy: who steps next among requests of equal priority: ``fair`` shares by cost between models and requests,
            ``oldest`` waits for nobody, ``laggards`` lets those behind catch up so that more step together. Nobody
            starves under any; ``benchmarks/continuous_batching.py`` compares them.
        max_batch: the most pictures of one model in one step. As many of each model are under way at once, and up to
            twice as many where some need not wait for others' places (of higher priority, or of another request than
            the one that holds most). Bounds memory; where it still runs out, fewer step together.
        preview_every: a Preview event after every so many steps; 0 for none. ``submit`` and ``stream`` may differ.
        model_budget: what the weights of all loaded models may take: bytes, an amount such as ``"24GB"``, or ``"auto"``
            for what is free on the device. For another model those go that have had nothing to do for longest; one that
            is in use is waited for, and one that is larger than the budget is loaded alone. None takes the setting,
            which is to keep models until memory runs out, and then to let go of idle ones.
        adapter_memory: what adapters of requests may take in memory, those of all models together: bytes, or an amount.
            Those in no use for longest go first; requests that want more at once than fit wait for others. None takes
            the setting.
        load: makes a pipeline from a model's name or path, a device and a dtype; None is the catalogue's. For tests
            and for models that no catalogue knows.

    Raises:
        RequestError: an argument is out of range.

    Example:
        >>> import gesso
        >>> with gesso.Engine(device="cpu") as engine:
        ...     results = engine.run(gesso.GenerationRequest(prompt="a red star", num_images=2, seed=7))
        >>> [result.seed for result in results]
        [7, 8]
    """

    def __init__(
        self,
        *,
        device: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        compile: bool | None = None,
        memory: str | None = None,
        policy: str = "fair",
        max_batch: int = 16,
        preview_every: int = 0,
        model_budget: int | str | None = None,
        adapter_memory: int | str | None = None,
        load: Load | None = None,
    ) -> None:
        checked: Policy = check_policy(policy)
        if not _is_whole(max_batch) or max_batch < 1:
            raise RequestError("max_batch", max_batch, "a whole number above 0")
        self._preview_every = _checked_interval(preview_every)
        settings = load_settings({"device": device, "dtype": dtype, "attention": attention, "compile": compile})
        adapters = load_settings({"adapter_memory": adapter_memory}).adapter_memory
        budget = parse_budget(load_settings({"model_budget": model_budget}).model_budget)
        device = None if settings.device is None else check_name(settings.device)
        dtype = None if settings.dtype is None else check_dtype(settings.dtype)
        acceleration = Acceleration(attention=settings.attention, compile=settings.compile)
        mode = check_memory(load_settings({"memory": memory}).memory)
        measure = partial(_measure, memory=mode) if load is None else None
        loader = _loader(load, acceleration, mode)
        self._guard = Guard(settings)
        how = acceleration.record
        self._loop = Loop(loader, device, dtype, checked, max_batch, how, budget, measure, adapters, self._guard)
        # The thread knows the loop and not the engine, so that a forgotten engine can be collected and closes itself.
        self._thread = threading.Thread(target=self._loop.run, name=f"gesso-engine-{device or 'auto'}", daemon=True)
        self._starting = threading.Lock()
        self._close_at_exit = weakref.finalize(self, _stop, self._loop, self._thread)

    def submit(
        self,
        request: GenerationRequest,
        *,
        preview_every: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Job:
        """Hand in a request and return at once.

        Args:
            request: a seed that is left blank is drawn here.
            preview_every: a preview after every so many steps, 0 for none; None as the engine was told.
            priority: -10 to 10. From the next step on the higher goes first, whatever model it asks for; the lower get
                a turn now and then.
            deadline: seconds from now by which it should be done. It is no promise: when waiting longer would miss
                it, the request goes before every priority, the earliest deadline first. Once missed it counts no more,
                nor while the request would take more than twice the seconds that are left.

        Raises:
            RequestError: an argument is out of range.
            RunError: the engine is closed. All that is wrong with the request itself ends the job instead.
        """
        interval = self._preview_every if preview_every is None else _checked_interval(preview_every)
        _check_urgency(priority, deadline)
        if request.seed is None:
            request = request.model_copy(update={"seed": secrets.randbelow(_DRAWN_SEEDS)})
        job = Job(request, preview_every=interval, when_cancelled=self.cancel, priority=priority, deadline=deadline)
        with self._starting:
            if self._thread.ident is None and self._loop.inbox.closing is None:
                self._thread.start()
        self._loop.inbox.submit(job)
        if not self._thread.is_alive() and not job.done():
            raise RunError("the engine's thread has ended (was the process forked?); make a new Engine")
        return job

    def stream(
        self,
        request: GenerationRequest,
        *,
        preview_every: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Iterator[Event]:
        """Hand in a request now and iterate over its events; the last is Done, Failed or Cancelled.

        Leaving the iteration early, by ``break``, an exception or Ctrl-C, cancels the request; so does letting go of
        the iterator, begun or not, or its ``close()``. The engine never waits for the one who iterates. A picture that
        memory ran out for in company is begun anew, and its steps are told once more.

        Args and Raises:
            as ``submit``.
        """
        return _Stream(self.submit(request, preview_every=preview_every, priority=priority, deadline=deadline))

    def run(
        self,
        request: GenerationRequest | Sequence[GenerationRequest],
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[Result]:
        """Paint one request, or several together, and wait for the pictures: in order of requests, then of images.

        Pictures that the safety checker rejected are not among them; where all of a request are, it has failed.
        An error, and Ctrl-C, cancels those requests of this call that are not finished, and is raised.

        Args:
            request: one, or several.
            priority: as ``submit``, for each of them.
            deadline: likewise.

        Raises:
            GessoError: the first request, in their order, that failed.
        """
        requests = [request] if isinstance(request, GenerationRequest) else list(request)
        jobs: list[Job] = []
        try:
            for each in requests:
                jobs.append(self.submit(each, priority=priority, deadline=deadline))
            return [result for job in jobs for result in job.result()]
        finally:
            for job in jobs:
                job.cancel()

    def cancel(self, job: Job) -> None:
        """Stop a job before its next step; the pictures it has finished are kept. Harmless if it has ended."""
        self._loop.inbox.cancel(job)

    def counters(self) -> dict[str, dict[str, float]]:
        """What was done since the engine was made, for metrics, by what it was done for; safe to ask at any time.

        ``adapters``: how many are in memory (``entries``, of them ``pinned``), in how many ``bytes`` of what ``limit``,
        ``hits``, ``misses`` and ``evictions`` there; of files how many were ``kept``, ``fetched`` and ``failed``.
        ``safety``: how many finished pictures were not looked at (``off``), ``passed``, ``blurred`` and ``rejected``.
        """
        return {"adapters": self._loop.fetching.counters(), "safety": self._guard.counters()}

    def close(self, *, finish: bool = True) -> None:
        """Take no more requests, finish those under way, or with ``finish=False`` cancel them, and wait for the thread.

        May be called again, from anywhere, also to cancel what an earlier call waits for.
        """
        self._loop.inbox.close("finish" if finish else "cancel")
        _join(self._thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what is under way; after an exception cancel it."""
        self.close(finish=kind is None)


class _Stream(Iterator[Event]):
    """The events of a job that is cancelled when nobody iterates over them any more. A generator would not do: one
    that was never begun is let go without a word.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._events = job.events()

    def __next__(self) -> Event:
        try:
            return next(self._events)
        except BaseException:  # Ctrl-C while waiting; after the last event there is nothing to cancel.
            self.close()
            raise

    def close(self) -> None:
        """Cancel the request if it has not ended. The iteration goes on to its last event."""
        self._job.cancel()

    def __del__(self) -> None:
        self.close()


def _loader(load: Load | None, acceleration: Acceleration, memory: str) -> Load:
    """What makes pipelines: the catalogue's loader, or somebody's own and then what is put onto what it made."""
    if load is not None and acceleration == PLAIN:
        return load

    def loaded(name: str, device: str, dtype: str | None) -> Pipeline:
        from gesso.engine.loading import load_pipeline
        from gesso.engine.loading.accelerate import accelerate

        if load is None:
            return load_pipeline(name, device, dtype, acceleration=acceleration, memory=memory)
        acceleration.check(device)
        pipeline = load(name, device, dtype)
        accelerate(pipeline, acceleration)
        return pipeline

    return loaded


def _measure(name: str, device: str, dtype: str | None, memory: str) -> int | None:
    from gesso.engine.loading import measure

    return measure(name, device, dtype, memory)


def _stop(loop: Loop, thread: threading.Thread) -> None:
    """Close at the interpreter's exit, or when nobody holds the engine or a job of it any more."""
    loop.inbox.close("cancel")
    _join(thread)


def _join(thread: threading.Thread) -> None:
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join()


def _checked_interval(preview_every: int) -> int:
    if not _is_whole(preview_every) or preview_every < 0:
        raise RequestError("preview_every", preview_every, "a whole number from 0")
    return preview_every


def _check_urgency(priority: int, deadline: float | None) -> None:
    if not _is_whole(priority) or not LOWEST <= priority <= HIGHEST:
        raise RequestError("priority", priority, f"a whole number from {LOWEST} to {HIGHEST}")
    if deadline is not None and not (_is_number(deadline) and math.isfinite(deadline) and deadline > 0):
        raise RequestError("deadline", deadline, "a number of seconds above 0")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
