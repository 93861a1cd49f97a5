"""TaylorSeer against no cache, fewer steps, and the caches of diffusers and cache-dit, in the same run.

    python -m benchmarks.step_caches [--model flux-nano] [--steps 50] [--pictures 24] [--short] [--save]

Each picture is painted alone and its steps are timed; held against are the wanted wall ratios (3.0 on the trunk, 2.0
by module, a forecast step at most 5 % of a full one on the trunk) and, at equal settings, the other libraries. Beside
every ratio stand PSNR, SSIM and the shapes-score; a cache that is no closer than fewer plain steps in the same time
is reported as losing. diffusers' `TaylorSeerCacheConfig` caches at our places, in float32, and counts its intervals
one step later, which is one full step more at 50: it is held against ours counted so, and as we count. It has no
placement for our own networks, so those have no row of it. cache-dit forecasts the residual of the blocks behind the
first, in the full steps that are ours, and is measured where it is installed (`pip install --no-deps cache-dit`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin

from benchmarks.measuring import Claims, arguments
from gesso.cache_settings import parse_cache
from gesso.caching.hooks import unwrap, wrap
from gesso.caching.policy_interval import full_steps
from gesso.engine.loading import load_pipeline
from gesso.evaluation.caches import Bench, Trial, bench_of
from gesso.fronts import Point
from gesso.sampling.guidance import running_samples

INTERVAL, ORDER, WARMUP = 5, 2, 3
SETTINGS = f"interval={INTERVAL},order={ORDER},warmup={WARMUP}"
WANTED = {"trunk": 3.0, "module": 2.0}
_SLOTS = [r"transformer_blocks\.\d+\.(attn|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"]
_SKIPPED = [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"]
_KNOWN = dict.fromkeys(("digest", "device", "dtype", "hardware"), "")


def measure(bench: Bench, model: str, claims: Claims) -> None:
    """Every row."""
    for granularity, wanted in WANTED.items():
        cache = f"taylorseer:{SETTINGS},granularity={granularity}"
        trials = bench.paint_all(cache)
        point = bench.point(trials, cache, **_KNOWN)
        fewer = _fewer_steps(bench, point)
        verdict = "loses to fewer steps" if fewer.ssim >= point.ssim else "closer than fewer steps"
        name = f"{model}, {point.steps} steps, TaylorSeer N={INTERVAL} O={ORDER} by {granularity}"
        claims.report(
            f"{name}, times as fast (wanted: at least)", point.speed, wanted, point.speed / wanted, **_quality(point)
        )
        ours = f"{name}, SSIM against {fewer.steps} plain steps in the same time: {verdict}"
        claims.report(
            ours, point.ssim, fewer.ssim, point.ssim / fewer.ssim, speed_of_fewer=fewer.speed, **_quality(fewer)
        )
        share = _forecast_share(trials)
        limit = 0.05 if granularity == "trunk" else 1 / wanted
        claims.report(f"{name}, forecast step's share of a full one (wanted: at most)", share, limit, limit / share)
    network = getattr(bench.pipeline, "transformer", None)
    if isinstance(network, CacheMixin):
        for granularity in WANTED:
            for counting in (",schedule=diffusers", ""):
                ours = f"taylorseer:{SETTINGS},granularity={granularity}{counting}"
                _against("diffusers", bench, ours, partial(_diffusers, network, granularity), claims, model)
    if isinstance(network, CacheMixin) and find_spec("cache_dit") is not None:
        ours = f"taylorseer:{SETTINGS},granularity=block,front_blocks=1"
        full = full_steps(len(bench.plain[0].seconds), INTERVAL, WARMUP)
        _against("cache-dit", bench, ours, partial(_cache_dit, network, full), claims, model)


def _fewer_steps(bench: Bench, point: Point) -> Point:
    """As many plain steps as take the same time."""
    steps = max(1, round(point.steps / point.speed))
    return bench.point(bench.paint_all(steps=steps), "", **_KNOWN)


def _forecast_share(trials: Sequence[Trial]) -> float:
    """Seconds of a forecast step over those of a full one."""
    both = [(kind, seconds / one.full) for one in trials for kind, seconds in zip(one.taken, one.seconds, strict=True)]
    return statistics.median(share for kind, share in both if kind == "T")


def _quality(point: Point) -> dict[str, object]:
    found: dict[str, object] = {"psnr": point.psnr, "ssim": point.ssim, "latent_error": point.latent}
    if point.score is not None:
        found |= {"shapes": point.score, "shapes_without": point.score_without}
    return found | {"pictures": point.pictures}


def _against(
    rival: str,
    bench: Bench,
    cache: str,
    around: Callable[[], AbstractContextManager[object]],
    claims: Claims,
    model: str,
) -> None:
    """Speed and closeness beside another library's at the same settings."""
    parse_cache(cache)
    ours = bench.point(bench.paint_all(cache), cache, **_KNOWN)
    theirs = bench.point(bench.paint_all(around=around), "", **_KNOWN)
    name = f"{model}, {ours.steps} steps, {cache} against {rival}"
    claims.report(f"{name}, times as fast", ours.speed, theirs.speed, ours.speed / theirs.speed, computed=ours.computed)
    more = {f"{rival}_{key}": value for key, value in _quality(theirs).items()}
    claims.report(
        f"{name}, PSNR to no cache", ours.psnr, theirs.psnr, ours.psnr / theirs.psnr, **_quality(ours), **more
    )


@contextmanager
def _diffusers(network: Any, granularity: str) -> Iterator[None]:
    """diffusers' cache on the network for one picture, each guidance branch with features of its own."""
    import torch

    places: dict[str, Any] = {"use_lite_mode": True}
    if granularity == "module":
        places = {"cache_identifiers": _SLOTS, "skip_predict_identifiers": _SKIPPED}
    network.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=INTERVAL,
            max_order=ORDER,
            disable_cache_before_step=WARMUP,
            taylor_factors_dtype=torch.float32,
            **places,
        )
    )

    def named(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        ((_, branch),) = running_samples(1)
        with network.cache_context(branch):
            return original(*args, **kwargs)

    wrap(network, "branch", named)
    try:
        yield
    finally:
        unwrap(network, "branch")
        network.disable_cache()


@contextmanager
def _cache_dit(network: Any, full: Sequence[bool]) -> Iterator[None]:
    """cache-dit's on the network for one picture, by the same mask of steps."""
    cache_dit = import_module("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        num_inference_steps=len(full),
        steps_computation_mask=[int(each) for each in full],
        steps_computation_policy="static",
        enable_separate_cfg=True,
    )
    cache_dit.enable_cache(
        network,
        cache_config=config,
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=ORDER),
    )
    try:
        yield
    finally:
        cache_dit.disable_cache(network)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="flux-nano")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--short", action="store_true", help="two pictures of twelve steps, to see that it runs")
    given = parser.parse_args()
    steps, pictures = (12, 2) if given.short else (given.steps, given.pictures)
    claims = Claims(f"step-caches-{given.model}", given.save)
    pipeline = load_pipeline(given.model, given.device)
    bench = bench_of(pipeline, given.model, {"steps": steps}, pictures=pictures, device=given.device)
    measure(bench, given.model, claims)
    claims.keep()


if __name__ == "__main__":
    main()
