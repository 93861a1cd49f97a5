"""A FLUX-compatible predictor over one long-lived engine: a call in, files and what is to be said of them out.

Asynchronous, so that several calls share batches and each can be cancelled at any time. Not here: the table of inputs
(`flux_compatible`), anybody's server (`docker/sdxl/predict.py` is Cog's).
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from gesso.adapters.sources import Site
from gesso.engine.engine import Engine
from gesso.engine.job import Job, LastEvent
from gesso.errors import CancelledError, RequestError
from gesso.events import Cancelled, Done, Failed, Progress, Result
from gesso.request import GenerationRequest
from gesso.serving.flux_compatible import LORA_FIELDS, FluxCompatibleInput, in_our_words, to_request
from gesso.serving.given_files import Fetching, given_lora, given_pictures, recorded_name
from gesso.serving.watermark import marked
from gesso.settings import load_settings

_KEPT = 600.0  # seconds that files of a finished call stay for whoever sends them on
_ENDINGS = {"webp": ".webp", "png": ".png", "jpg": ".jpeg"}
_BAR = 20  # marks of a progress line
_WARM_EDGE = 64  # pixels of the picture that is painted to load a model


class PredictorSettings(BaseSettings):
    """What an operator sets, beside gesso's own settings: `GESSO_PREDICTOR_MODEL` and so on."""

    model_config = SettingsConfigDict(env_prefix="GESSO_PREDICTOR_", frozen=True)

    model: str = Field(default="illustrious-xl", description="What is painted with: a name, a folder or a file.")
    standard_model: str = Field(default="sdxl", description="The same where use_standard_sdxl is set.")
    refiner_model: str = Field(default="sdxl-refiner", description="What finishes pictures that are to be refined.")
    lora_folder: Path | None = Field(default=None, description="Folder whose LoRAs may be named by their paths in it.")
    warm: bool = Field(default=True, description="Load the first model before the first call.")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a call came to: its files, and each picture's seed, in the same order; what was warned of."""

    files: tuple[Path, ...]
    seeds: tuple[int, ...]
    warnings: tuple[str, ...]


class FluxCompatiblePredictor:
    """Answers calls with one engine, which keeps models and LoRAs loaded as far as they fit.

    Args:
        settings: an operator's; None reads the environment.
        engine: what paints; None is one of the settings' own.
    """

    def __init__(self, settings: PredictorSettings | None = None, engine: Engine | None = None) -> None:
        self.settings = settings or PredictorSettings()
        own = load_settings()
        # Asked for or not, a predictor checks its pictures: only an operator's own word makes "off" the usual.
        self._safety = own.safety if "safety" in own.model_fields_set else "reject"
        self._engine = engine or Engine()
        self._outputs = OutputFolders()

    def warm_up(self) -> None:
        """Load the first model by painting a tiny picture. Raises GessoError for one that cannot be used."""
        if self.settings.warm:
            checked = "safety" in load_settings().model_fields_set and self._safety != "off"
            request = GenerationRequest(
                prompt="warm",
                model=self.settings.model,
                width=_WARM_EDGE,
                height=_WARM_EDGE,
                steps=1,
                safety="blur" if checked else "off",  # which loads the checker, and never refuses
            )
            self._engine.run(request)

    async def run(self, given: FluxCompatibleInput, say: Callable[[str], None]) -> Prediction:
        """Answer one call. Cancelling the task ends the call before its next step.

        Args:
            given: the call.
            say: is told a line at a time: seeds, warnings, and progress as "50%|#####     | 5/10".

        Raises:
            RequestError: a field cannot be used; nothing was begun.
            GessoError: the work failed.
        """
        folder = Path(tempfile.mkdtemp(prefix="gesso-given-"))
        stop = threading.Event()
        try:
            request, warnings = await asyncio.to_thread(self._request, given, folder, stop)
            done = await self._painted(request, say)
            results = done.results
            warnings = (*warnings, *_told(done))
            for warning in warnings:
                say(f"warning: {warning}")
            seeds = tuple(result.seed for result in results)
            say(f"seed: {', '.join(map(str, seeds))}")
            files = await asyncio.to_thread(self._saved, results, given)
            return Prediction(files=files, seeds=seeds, warnings=warnings)
        finally:
            stop.set()
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Cancel what is under way and let go of models and files."""
        self._engine.close(finish=False)
        self._outputs.close()

    def _request(
        self, given: FluxCompatibleInput, folder: Path, stop: threading.Event
    ) -> tuple[GenerationRequest, tuple[str, ...]]:
        """The engine's request; what the call names is fetched. Checked before anything is fetched."""
        standard = given.use_standard_sdxl
        known: dict[str, Any] = {
            "model": self.settings.standard_model if standard else self.settings.model,
            "illustrations": not standard,
            "safety": self._safety,
            "refiner": self.settings.refiner_model,
        }
        to_request(given, **known)
        tokens: dict[Site, str] = {}
        if given.hf_api_token is not None:
            tokens["huggingface"] = given.hf_api_token.get_secret_value()
        if given.civitai_api_token is not None:
            tokens["civitai"] = given.civitai_api_token.get_secret_value()
        fetching = Fetching(folder=folder, stop=stop, tokens=tokens, lora_folder=self.settings.lora_folder)
        image = mask = None
        if given.image is not None:
            image, mask = given_pictures(given.image, given.mask, given.size, fetching)
        asked = {"lora_weights": given.main_lora, "extra_lora": given.extra_lora}
        loras = [
            given_lora(name, text, getattr(given, LORA_FIELDS[name]), fetching)
            for name, text in asked.items()
            if text is not None
        ]
        loras += [given_lora(f"loras {at}", text, None, fetching) for at, text in enumerate(given.loras or [], 1)]
        return to_request(
            given,
            **known,
            image=None if image is None else str(image),
            mask=None if mask is None else str(mask),
            lora=tuple(loras),
        )

    async def _painted(self, request: GenerationRequest, say: Callable[[str], None]) -> Done:
        """The end of a request that came to something. Raises GessoError."""
        job = self._engine.submit(request)
        try:
            last = await _ended(job, _ProgressLines(request.num_images, say))
        finally:
            job.cancel()
        if isinstance(last, Failed):
            error = last.error.with_traceback(None)
            raise in_our_words(error) if isinstance(error, RequestError) else error
        if isinstance(last, Cancelled):
            raise CancelledError
        return last

    def _saved(self, results: tuple[Result, ...], given: FluxCompatibleInput) -> tuple[Path, ...]:
        folder, ending = self._outputs.new(), _ENDINGS[given.output_format]
        quality = None if given.output_format == "png" else max(1, given.output_quality)
        try:
            results = tuple(_as_named(result, given) for result in results)
            if given.apply_watermark:
                results = tuple(_watermarked(result) for result in results)
            return tuple(result.save(folder / f"out-{result.index}{ending}", quality=quality) for result in results)
        finally:
            self._outputs.finished(folder)


class OutputFolders:
    """Folders of finished calls. A server reads their files after the call's end, so they go later, or at the end."""

    def __init__(self, kept: float = _KEPT) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="gesso-outputs-")
        self._kept = kept
        self._finished: dict[Path, float] = {}
        self._lock = threading.Lock()

    def new(self) -> Path:
        """An empty folder. Those that were finished long ago are removed."""
        with self._lock:
            old = [path for path, when in self._finished.items() if time.monotonic() - when >= self._kept]
            for path in old:
                del self._finished[path]
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=self._root.name))

    def finished(self, folder: Path) -> None:
        """Its files are all there, or never will be."""
        with self._lock:
            self._finished[folder] = time.monotonic()

    def close(self) -> None:
        """Remove them all."""
        self._root.cleanup()


class _ProgressLines:
    """Steps of all pictures of a call as lines that clients read a share from."""

    def __init__(self, pictures: int, say: Callable[[str], None]) -> None:
        self._pictures, self._say = pictures, say
        self._steps: dict[int, int] = {}
        self._said = 0

    def __call__(self, event: object) -> None:
        if not isinstance(event, Progress) or event.stage != "step" or not event.steps:
            return
        self._steps[event.image] = event.step
        done, total = sum(self._steps.values()), event.steps * self._pictures
        if done <= self._said:  # a picture that was begun anew
            return
        self._said = done
        bar = "#" * (done * _BAR // total)
        self._say(f"{done * 100 // total:3}%|{bar:<{_BAR}}| {done}/{total}")


def _as_named(result: Result, given: FluxCompatibleInput) -> Result:
    """With the call's own names of its pictures: the files that were painted from are gone when the call ends."""
    pictures = {"init_image": given.image, "mask": given.mask}
    named = {field: recorded_name(text) for field, text in pictures.items() if text is not None}
    request = {**cast("Mapping[str, object]", result.metadata["request"]), **named}
    return replace(result, metadata={**result.metadata, "request": request})


def _watermarked(result: Result) -> Result:
    return replace(result, image=marked(result.image), metadata={**result.metadata, "watermark": "sdxl"})


def _told(done: Done) -> tuple[str, ...]:
    """The engine's warnings, and pictures that are missing."""
    told = done.results[0].metadata.get("warnings")
    warnings = tuple(map(str, told)) if isinstance(told, list | tuple) else ()
    if not done.rejected:
        return warnings
    seeds = ", ".join(str(each.seed) for each in done.rejected)
    return (*warnings, f"the safety checker rejected {len(done.rejected)} of the pictures (seed {seeds})")


async def _ended(job: Job, watch: Callable[[object], None]) -> LastEvent:
    """The last event of a job, once it is there; `watch` is told of the others. The event loop never waits."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[object]()

    def read() -> None:
        for event in job.events():
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody listens any more
                return

    threading.Thread(target=read, name=f"gesso-events-{job.id}", daemon=True).start()
    while True:
        event = await events.get()
        if isinstance(event, Done | Failed | Cancelled):
            return event
        watch(event)
