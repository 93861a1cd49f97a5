"""Step caches measured against pictures without one: a grid of policies, and fewer steps in the same time.

Each picture is painted alone, the verbs called in a plain loop, so that seconds are those of the steps and nothing
else. Not here: closeness of two pictures (`closeness`), what is stored (`gesso.fronts`), printing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image
from torch import Tensor

from gesso.cache_settings import parse_cache, spelled
from gesso.devices import CPU
from gesso.engine.caches import Cached, Caches, calling, check_room, computed_steps
from gesso.engine.device import settle
from gesso.engine.planning import planned
from gesso.errors import OutOfMemoryError, RequestError
from gesso.evaluation.closeness import psnr, relative_error, ssim
from gesso.evaluation.lpips import Lpips, lpips
from gesso.fronts import Point, alike, painted_with
from gesso.pipelines.contract import Pipeline, without_breaths
from gesso.request import GenerationRequest, parse_request
from gesso.sampling.flow import EULER, STOCHASTIC
from gesso.worlds import faces, shapes

_LATENTS = ("tokens_1LD", "latent_C1hw", "latent_1Cfhw")
"""Under which name families keep what becomes the picture."""

PROMPTS = (
    "a red fox asleep in fresh snow, photograph",
    "an old harbour at dawn, oil painting",
    "a bowl of lemons on a blue table by a window",
    "the words OPEN LATE in neon above a narrow street",
    "portrait of a sailor with a grey beard, soft light",
    "a city of glass towers seen from a hill, wide view",
)
"""What models are calibrated with that no synthetic world judges."""

GRID = (
    *(f"lite:interval={interval},order={order}" for interval in (2, 3, 4, 5, 7) for order in (1, 2)),
    *(
        f"taylorseer:interval={interval},order={order},granularity={granularity}"
        for interval in (3, 5, 7)
        for order in (1, 2)
        for granularity in ("module", "block")
    ),
    *(f"first_block:threshold={threshold}" for threshold in (0.05, 0.1, 0.2)),
    *(f"speca:threshold={threshold}" for threshold in (0.1, 0.3)),
)
"""What is tried: cheap in memory first."""
_TIMED = 5  # steps
PLAIN_SHARES = (0.75, 0.5, 0.35, 0.25, 0.2)
"""Fewer steps without a cache, as shares of the whole number."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One picture, or video: its frames, latent, and seconds of each step.

    `full` is what a step without a cache took just before, so that speeds hold on a machine that others use as well.
    `right` is what its world's judge says.
    """

    frames: tuple[Image.Image, ...]
    latent: Tensor | None
    seconds: tuple[float, ...]
    full: float
    taken: str
    right: bool | None = None


@dataclass(kw_only=True)
class Bench:
    """A pipeline and the pictures it is measured on.

    Attributes:
        requests: one a picture, without a cache.
        questions: what the shapes world asked, one a request; none where it does not judge.
        device: where it runs, to wait for it.
        attention: the kernel that was chosen, which not every cache can look into.
        told: gets a line for each cache that has no room.
        lpips: the network that also compares pictures, where its weights are there.
    """

    pipeline: Pipeline
    requests: Sequence[GenerationRequest]
    questions: Sequence[shapes.Question] = ()
    device: str = CPU
    attention: str = ""
    told: Callable[[str], object] = str
    lpips: Lpips | None = None
    _plain: list[Trial] = field(default_factory=list)

    @property
    def plain(self) -> list[Trial]:
        """The pictures without a cache; painted once, after one that warms up."""
        if not self._plain:
            self.paint(self.requests[0])
            self._plain = self.paint_all()
        return self._plain

    @property
    def painted(self) -> tuple[str, ...]:
        """What every picture is painted with, as points note it."""
        return painted_with(self.pipeline.plan(self.requests[0]).request)

    def paint_all(
        self,
        cache: str = "",
        steps: int | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> list[Trial]:
        """Every picture with this cache, or so many steps; each within `around`, which may change the network."""
        update: dict[str, object] = {"cache": parse_cache(cache) if cache else None}
        if steps is not None:
            update["steps"] = steps
        requests = [request.model_copy(update=update) for request in self.requests]
        trials: list[Trial] = []
        for request in requests:
            full = self.full_step()
            with around():
                trials.append(self.paint(request, full))
        if not self.questions:
            return trials
        verdicts = [shapes.judge(*pair) for pair in zip(self.questions, (one.frames[0] for one in trials), strict=True)]
        return [replace(trial, right=verdict.right) for trial, verdict in zip(trials, verdicts, strict=True)]

    def paint(self, request: GenerationRequest, full: float | None = None) -> Trial:
        """One picture, alone; `full` where a step without a cache was timed already."""
        caches = Caches(self.pipeline)
        try:
            return self._paint(request, caches, self.full_step() if full is None else full)
        finally:
            caches.detach()

    def full_step(self) -> float:
        """Seconds of a step without a cache, now: the median of a few."""
        plan = self.pipeline.plan(self.requests[0])
        state = self.pipeline.begin(plan, self.pipeline.encode([plan])[0], 0)
        return statistics.median(self._timed_step(state, None) for _ in range(min(_TIMED, state.total)))

    def _timed_step(self, state: Any, cached: Cached | None) -> float:
        settle(self.device)
        started = time.perf_counter()
        if cached is not None:
            cached.decision(state.total - state.remaining, state.total)
        with calling([cached]):
            self.pipeline.step([state])
        settle(self.device)
        return time.perf_counter() - started

    def _paint(self, request: GenerationRequest, caches: Caches, full: float) -> Trial:
        plan = planned(self.pipeline, request, attention=self.attention)
        (conditioning,) = self.pipeline.encode([plan])
        state = self.pipeline.begin(plan, conditioning, 0)
        cached = caches.begin(plan)
        seconds = tuple(self._timed_step(state, cached) for _ in range(state.total))
        if cached is not None:
            cached.end()
        taken = "F" * state.total if cached is None else str(cached.record["steps"])
        latent = next((getattr(state, name).cpu() for name in _LATENTS if hasattr(state, name)), None)
        (output,) = without_breaths(self.pipeline.decode([state]))
        frames = output.frames or (output.image,)
        return Trial(frames=frames, latent=latent, seconds=seconds, full=full, taken=taken)

    def point(self, trials: Sequence[Trial], cache: str, **known: str) -> Point:
        """What these pictures come to beside those without a cache."""
        pairs = list(zip(trials, self.plain, strict=True))
        frames = [both for trial, plain in pairs for both in zip(trial.frames, plain.frames, strict=True)]
        latents = [
            relative_error(trial.latent, plain.latent)
            for trial, plain in pairs
            if trial.latent is not None and plain.latent is not None
        ]
        seen = [] if self.lpips is None else [lpips(self.lpips, *both) for both in frames]
        steps = len(self.plain[0].taken)
        return Point(
            cache=cache,
            steps=len(trials[0].taken),
            reference=steps,
            painted=self.painted,
            computed=statistics.fmean(trial.taken.count("F") for trial in trials),
            speed=round(statistics.median(steps * one.full / sum(one.seconds) for one in trials), 3),
            psnr=round(statistics.fmean(psnr(*both) for both in frames), 2),
            ssim=round(statistics.fmean(ssim(*both) for both in frames), 4),
            latent=round(statistics.fmean(latents), 4) if latents else 0.0,
            lpips=round(statistics.fmean(seen), 4) if seen else None,
            score=share_right(trials),
            score_without=share_right(self.plain),
            pictures=len(trials),
            **known,
        )


def share_right(trials: Sequence[Trial]) -> float | None:
    """Share of right pictures; None where nobody judges."""
    judged = [trial.right for trial in trials if trial.right is not None]
    return round(sum(judged) / len(judged), 4) if judged else None


def bench_of(
    pipeline: Pipeline, model: str, fields: dict[str, object], *, pictures: int, device: str, attention: str = ""
) -> Bench:
    """So many pictures of a model: of the small world whose words it knows, or of general prompts.

    Where the model's own scheduler draws fresh noise, all are by Euler's, also those without a cache.
    """
    prompts, questions = _asked(pipeline, pictures)
    plain = parse_request({"prompt": prompts[0], "model": model, **fields})
    if "scheduler" not in fields and pipeline.plan(plain).request.scheduler == STOCHASTIC:
        fields = {**fields, "scheduler": EULER}
    requests = [
        GenerationRequest.model_validate({**fields, "model": model, "prompt": prompt, "seed": number, "num_images": 1})
        for number, prompt in enumerate(prompts)
    ]
    return Bench(pipeline=pipeline, requests=requests, questions=questions, device=device, attention=attention)


def _asked(pipeline: Pipeline, pictures: int) -> tuple[list[str], list[shapes.Question]]:
    """Prompts, and what the shapes world judges their pictures by, if it can: a model that was trained on a small world
    has no other words."""
    unknown: Callable[[str], list[str]] = getattr(getattr(pipeline, "text", None), "unknown", lambda prompt: [])
    general = [PROMPTS[n % len(PROMPTS)] for n in range(pictures)]
    questions = shapes.prompts(max(pictures, len(shapes.CATEGORIES)), 0)[:pictures]
    portraits = [faces.caption(faces.held_out_portrait(seed), seed) for seed in range(pictures)]
    if not any(map(unknown, general)):
        return general, []
    if not any(unknown(question.prompt) for question in questions):
        return [question.prompt for question in questions], questions
    return (general if any(map(unknown, portraits)) else portraits), []


def calibrate(
    bench: Bench,
    caches: Sequence[str],
    have: Sequence[Point],
    known: dict[str, str],
) -> Iterator[Point]:
    """Measure what is not measured yet, fewer steps and then these caches, as `fitting` or `usable` found them: yields
    each point. `known` are its fields of weights and machine.
    """
    steps = bench.pipeline.plan(bench.requests[0]).steps
    same = [point for point in alike(have, known) if (point.reference, point.painted) == (steps, bench.painted)]
    there = {(point.cache, point.steps) for point in same if point.pictures >= len(bench.requests)}
    for fewer in dict.fromkeys(max(1, round(share * steps)) for share in PLAIN_SHARES):
        if ("", fewer) not in there:
            yield bench.point(bench.paint_all(steps=fewer), "", **known)
    for cache in caches:
        if (cache, steps) not in there:
            yield bench.point(bench.paint_all(cache), cache, **known)


def usable(bench: Bench, caches: Sequence[str]) -> list[str]:
    """These caches, blanks filled, each once. Raises RequestError for the first that the model or its steps cannot take
    or that forecasts nothing here, and OutOfMemoryError for one that has no room.
    """
    found: dict[str, None] = {}
    for cache in caches:
        request = bench.requests[0].model_copy(update={"cache": parse_cache(cache)})
        plan = planned(bench.pipeline, request, attention=bench.attention)
        check_room(plan, bench.device, Caches(bench.pipeline))
        if computed_steps(plan) == plan.steps:
            hint = f"all {plan.steps} steps are computed; take more steps, or a smaller warmup"
            raise RequestError("cache", cache, f"of any effect at {plan.steps} steps", hint)
        assert plan.request.cache is not None
        found[spelled(plan.request.cache)] = None
    return list(found)


def fitting(bench: Bench, grid: Sequence[str]) -> list[str]:
    """Those of the grid that are usable here, likewise. Tells the bench of those that have no room."""
    found: dict[str, None] = {}
    for cache in grid:
        try:
            found |= dict.fromkeys(usable(bench, [cache]))
        except RequestError:
            continue
        except OutOfMemoryError as error:
            bench.told(f"left out: {cache}: {error}")
    return list(found)
