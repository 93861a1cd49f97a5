"""What continuous batching pays, through the real engine: one JSON line a claim. Nothing here asserts a speed.

    python -m benchmarks.continuous_batching [--model infinity-nano] [--dtype bfloat16] [--revisions 0]
                                             [--requests 16] [--arrivals 0]

Measured: (a) the throughput of requests that arrive together against the same ones after another, (b) the scheduling
policies under Poisson arrivals at several loads: mean time from arrival to picture, and throughput, and (c) single
pictures of one model that arrive while another paints a large request: their mean time, and the large one's. A load
of 1 offers as many pictures a second as the engine paints one after another. Without arrivals only (a).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from benchmarks.measuring import Claims, arguments
from gesso.engine import Engine, Job
from gesso.engine.loading import load_pipeline
from gesso.events import Failed
from gesso.pipelines.contract import Pipeline
from gesso.request import GenerationRequest

MakeEngine = Callable[[str], Engine]

LOADS = (0.5, 1.0, 2.0, 4.0)
RIVAL = "oldest"
OTHERS = ("fair", "laggards")
BESIDE = "beside: "  # before a model's name: loaded once more, as another model


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """What a stream of requests met.

    Attributes:
        mean: seconds from arrival to picture.
        slowest: their 95th percentile.
        throughput: pictures a second.
        company: mean of the most that ever shared a batch with each.
    """

    mean: float
    slowest: float
    throughput: float
    company: float


def requests_of(model: str, count: int, revisions: int | None = None) -> list[GenerationRequest]:
    """So many requests of one picture each, all different, revised as often as said or as the model does else."""
    colours, shapes = ("red", "blue", "green", "yellow"), ("star", "ring", "square", "circle")
    return [
        GenerationRequest(
            prompt=f"a {colours[index % 4]} {shapes[index // 4 % 4]}", model=model, seed=index, revisions=revisions
        )
        for index in range(count)
    ]


def warm(engine: Engine, requests: list[GenerationRequest]) -> None:
    """Load the model and meet every batch size once, alone and together."""
    engine.run(requests[0])
    engine.run(requests)


def together_and_apart(make: MakeEngine, requests: list[GenerationRequest], repeats: int) -> tuple[float, float]:
    """Median seconds for all requests handed in together, and for the same ones one after another."""
    together, apart = [], []
    with make(RIVAL) as engine:
        warm(engine, requests)
        for _ in range(repeats):
            started = time.perf_counter()
            engine.run(requests)
            together.append(time.perf_counter() - started)
            started = time.perf_counter()
            for request in requests:
                engine.run(request)
            apart.append(time.perf_counter() - started)
    return statistics.median(together), statistics.median(apart)


def poisson_arrivals(engine: Engine, requests: list[GenerationRequest], rate: float, seed: int) -> Arrivals:
    """Hand in the requests at random moments, ``rate`` of them a second on average, and wait for all."""
    chance = random.Random(seed)
    gaps = [chance.expovariate(rate) for _ in requests]

    def seconds_to_picture(job: Job) -> tuple[float, float]:
        company = job.result()[0].metadata["company"]
        return time.perf_counter() - job.submitted, float(str(company))

    with ThreadPoolExecutor(len(requests)) as pool:
        started = time.perf_counter()
        due = started
        waiting = []
        for gap, request in zip(gaps, requests, strict=True):
            due += gap
            time.sleep(max(0.0, due - time.perf_counter()))
            waiting.append(pool.submit(seconds_to_picture, engine.submit(request)))
        met = [future.result() for future in waiting]
        ended = time.perf_counter()
    latencies = sorted(latency for latency, _ in met)
    return Arrivals(
        mean=statistics.fmean(latencies),
        slowest=latencies[int(0.95 * (len(latencies) - 1))],
        throughput=len(requests) / (ended - started),
        company=statistics.fmean(company for _, company in met),
    )


def compare(
    make: MakeEngine, model: str, count: int, repeats: int, arrivals: int, claims: Claims, revisions: int | None
) -> None:
    """Measure both claims and print their lines."""
    requests = requests_of(model, count, revisions)
    together, apart = together_and_apart(make, requests, repeats)
    claims.report(
        f"{count} {model} requests together, pictures/s (rival: one after another; wanted: ratio >= 3)",
        count / together,
        count / apart,
        apart / together,
    )
    stream = requests_of(model, arrivals, revisions)
    for load in LOADS if stream else ():
        met: dict[str, Arrivals] = {}
        for policy in (*OTHERS, RIVAL):
            with make(policy) as engine:
                warm(engine, requests)
                met[policy] = poisson_arrivals(engine, stream, load * count / apart, seed=int(load * 10))
        for policy in OTHERS:
            ours, rival = met[policy], met[RIVAL]
            claims.report(
                f"{policy} under Poisson arrivals at load {load}, mean seconds to a picture (rival: {RIVAL})",
                ours.mean,
                rival.mean,
                rival.mean / ours.mean,
                slowest=ours.slowest,
                slowest_rival=rival.slowest,
                company=ours.company,
                company_rival=rival.company,
            )
            claims.report(
                f"{policy} under Poisson arrivals at load {load}, pictures/s (rival: {RIVAL})",
                ours.throughput,
                rival.throughput,
                ours.throughput / rival.throughput,
            )


def singles_beside_a_large_request(
    engine: Engine, large: GenerationRequest, singles: list[GenerationRequest], rate: float
) -> tuple[Arrivals, float]:
    """Single pictures that arrive while the engine paints a large request; what they met, and seconds it took."""
    job = engine.submit(large)
    met = poisson_arrivals(engine, singles, rate, seed=1)
    last = job.wait()
    if isinstance(last, Failed):
        raise last.error
    return met, time.perf_counter() - job.submitted


def compare_models(make: MakeEngine, model: str, other: str, images: int, count: int, claims: Claims) -> None:
    """Measure the claim about two models and print its lines. They may have the same weights; they share no batch."""
    large = GenerationRequest(prompt="a red star", model=model, num_images=images, seed=0)
    singles = requests_of(other, count)
    met: dict[str, tuple[Arrivals, float]] = {}
    for policy in (*OTHERS, RIVAL):
        with make(policy) as engine:
            part = large.model_copy(update={"num_images": 16})
            engine.run([part, singles[0]])
            started = time.perf_counter()
            engine.run(part)
            seconds = (time.perf_counter() - started) * images / 16
            met[policy] = singles_beside_a_large_request(engine, large, singles, count / seconds)
    for policy in OTHERS:
        (ours, took), (rival, rival_took) = met[policy], met[RIVAL]
        claims.report(
            f"{policy}: single pictures beside {images} of another model, mean seconds to a picture (rival: {RIVAL})",
            ours.mean,
            rival.mean,
            rival.mean / ours.mean,
            slowest=ours.slowest,
            slowest_rival=rival.slowest,
            large_request=took,
            large_request_rival=rival_took,
        )


def make_engine(policy: str, *, device: str | None, dtype: str | None, max_batch: int) -> Engine:
    def load(name: str, place: str, dtype: str | None) -> Pipeline:
        return load_pipeline(name.removeprefix(BESIDE), place, dtype)

    return Engine(device=device, dtype=dtype, policy=policy, max_batch=max_batch, load=load)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="infinity-nano")
    parser.add_argument("--revisions", type=int, help="of Infinity's pictures; else the model's own")
    parser.add_argument("--requests", type=int, default=16, help="how many arrive together")
    parser.add_argument("--arrivals", type=int, default=96, help="how many arrive one by one, at each load and policy")
    parser.add_argument("--beside", help="the model of single pictures beside a large request; else the same once more")
    parser.add_argument("--large", type=int, default=200, help="pictures of the large request")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--dtype", help="of the large matmuls; else the model's own")
    parser.add_argument("--device")
    given = parser.parse_args()
    revised = None if given.revisions is None else f"{given.revisions}-revisions"
    claims = Claims("-".join(filter(None, ("continuous-batching", given.model, given.dtype, revised))), given.save)
    make = partial(make_engine, device=given.device, dtype=given.dtype, max_batch=given.max_batch)
    compare(make, given.model, given.requests, given.repeats, given.arrivals, claims, given.revisions)
    if given.arrivals:
        beside = BESIDE + (given.beside or given.model)
        compare_models(make, given.model, beside, given.large, given.arrivals // 4, claims)
    claims.keep()


if __name__ == "__main__":
    main()
