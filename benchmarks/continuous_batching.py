"""What continuous batching pays, through the real engine: one JSON line a claim. Nothing here asserts a speed.

    python -m benchmarks.continuous_batching [--model infinity-nano] [--requests 16] [--repeats 5] [--device cpu]

Measured: (a) the throughput of requests that arrive together against the same ones after another, and (b) the two
scheduling policies under Poisson arrivals at several loads: mean time from arrival to picture, and throughput. A load
of 1 offers as many pictures a second as the engine paints one after another.
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
from gesso.request import GenerationRequest

MakeEngine = Callable[[str], Engine]

LOADS = (0.5, 1.0, 2.0, 4.0)


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


def requests_of(model: str, count: int) -> list[GenerationRequest]:
    """So many requests of one picture each, all different."""
    colours, shapes = ("red", "blue", "green", "yellow"), ("star", "ring", "square", "circle")
    return [
        GenerationRequest(prompt=f"a {colours[index % 4]} {shapes[index // 4 % 4]}", model=model, seed=index)
        for index in range(count)
    ]


def warm(engine: Engine, requests: list[GenerationRequest]) -> None:
    """Load the model and meet every batch size once, alone and together."""
    engine.run(requests[0])
    engine.run(requests)


def together_and_apart(make: MakeEngine, requests: list[GenerationRequest], repeats: int) -> tuple[float, float]:
    """Median seconds for all requests handed in together, and for the same ones one after another."""
    together, apart = [], []
    with make("oldest") as engine:
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


def compare(make: MakeEngine, model: str, count: int, repeats: int, arrivals: int, claims: Claims) -> None:
    """Measure both claims and print their lines."""
    requests = requests_of(model, count)
    together, apart = together_and_apart(make, requests, repeats)
    claims.report(
        f"{count} requests together, pictures/s (rival: one after another; wanted: ratio >= 3)",
        count / together,
        count / apart,
        apart / together,
    )
    stream = requests_of(model, arrivals)
    for load in LOADS:
        met: dict[str, Arrivals] = {}
        for policy in ("laggards", "oldest"):
            with make(policy) as engine:
                warm(engine, requests)
                met[policy] = poisson_arrivals(engine, stream, load * count / apart, seed=int(load * 10))
        laggards, oldest = met["laggards"], met["oldest"]
        claims.report(
            f"laggards under Poisson arrivals at load {load}, mean seconds to a picture (rival: oldest)",
            laggards.mean,
            oldest.mean,
            oldest.mean / laggards.mean,
            slowest_laggards=laggards.slowest,
            slowest_oldest=oldest.slowest,
            company_laggards=laggards.company,
            company_oldest=oldest.company,
        )
        claims.report(
            f"laggards under Poisson arrivals at load {load}, pictures/s (rival: oldest)",
            laggards.throughput,
            oldest.throughput,
            laggards.throughput / oldest.throughput,
        )


def make_engine(policy: str, *, device: str | None, max_batch: int) -> Engine:
    return Engine(device=device, policy=policy, max_batch=max_batch)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="infinity-nano")
    parser.add_argument("--requests", type=int, default=16, help="how many arrive together")
    parser.add_argument("--arrivals", type=int, default=96, help="how many arrive one by one, at each load and policy")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--device")
    given = parser.parse_args()
    claims = Claims("continuous-batching", given.save)
    make = partial(make_engine, device=given.device, max_batch=given.max_batch)
    compare(make, given.model, given.requests, given.repeats, given.arrivals, claims)
    claims.keep()


if __name__ == "__main__":
    main()
