"""Step-cache goldens of single tokens: ToCa's selection, ClusCa's clusters, and the measures of SpeCa's errors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gesso.cache_settings import MetricName
from gesso.caching.policy_clusters import cluster, representatives, shared
from gesso.caching.policy_speculation import error_of
from gesso.caching.policy_tokens import age_after, aged, attention_score, fresh_ratio, put, select, take, with_bonus
from gesso.caching.predictor import Ladder, Rule, predict
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar

_DEFAULT = 2e-5
_LAYERS = 28
_SCHEDULES = {"ToCa": "ToCa-ddim50"}  # one name for two networks; DiT's is this one
_METRICS: dict[str, MetricName] = {
    "l1": "l1",
    "l2": "l2",
    "relative_l1": "elementwise_l1",
    "relative_l2": "elementwise_l2",
    "cosine_similarity": "cosine",
}


class Selection(SideCar):
    """One selection of tokens."""

    soft_fresh_weight: float
    fresh_ratio: float
    schedule: str
    layer: int
    step_counting_down: int
    num_steps: int
    interval: int
    bonus: float
    grid: int
    selected: int


class SelectionSideCar(SideCar):
    """Selections over one attention map; the picture is square."""

    cases: Mapping[str, Selection]
    grid_side: int


class Clusters(SideCar):
    """Limits of k-means."""

    max_iters_dit: int
    max_iters_flux_hunyuan: int
    kmeans_p: int = 1


class ClusterSideCar(SideCar):
    """Clusters of two sets of tokens, and what is made of fresh ones."""

    clusters: int
    params: Clusters


def check_selection(golden: Golden, comparison: Comparison) -> None:
    """Scores, indices, ages and what is scattered, stage by stage."""
    side_car = golden.view(SelectionSideCar)
    atol = golden.tolerances.get("atol", default=_DEFAULT)
    received = golden.tensor("attn_map").sum(dim=1)
    age, tokens, before = (golden.tensor(name) for name in ("cache_age", "tokens", "cache_before"))
    for name, case in side_car.cases.items():
        if case.grid != 2:
            raise NotYetError(f"cells of {case.grid}")
        ratio = fresh_ratio(
            _SCHEDULES.get(case.schedule, case.schedule),  # pyright: ignore[reportArgumentType]
            case.fresh_ratio,
            remaining=case.step_counting_down / case.num_steps,
            depth=case.layer / (_LAYERS - 1),
        )
        score = aged(attention_score(received), age, case.soft_fresh_weight, case.interval)
        lifted = with_bonus(score, case.bonus, (side_car.grid_side, side_car.grid_side))
        index = select(lifted, ratio)
        comparison.close(f"{name}/score", score, golden.tensor(f"{name}/score"), atol)
        comparison.close(f"{name}/score_with_bonus", lifted, golden.tensor(f"{name}/score_with_bonus"), atol)
        comparison.true(f"{name} count", index.shape[1] == case.selected, f"{index.shape[1]} tokens")
        _equal(golden, comparison, f"{name}/fresh_indices", index)
        _close(golden, comparison, f"{name}/fresh_tokens", take(tokens, index), atol)
        _equal(golden, comparison, f"{name}/cache_age_after", age_after(age, index))
        after = put(before, index, take(golden.tensor("fresh_values_full"), index))
        _close(golden, comparison, f"{name}/cache_after", after, atol)


def check_clusters(golden: Golden, comparison: Comparison) -> None:
    """k-means from given centroids, warm starts, representatives, and how fresh tokens spread."""
    side_car = golden.view(ClusterSideCar)
    if side_car.params.kmeans_p != 1:
        raise NotYetError(f"k-means by distance {side_car.params.kmeans_p}")
    atol = golden.tolerances.get("atol", default=_DEFAULT)
    limits = {"dit": side_car.params.max_iters_dit, "flux": side_car.params.max_iters_flux_hunyuan}
    for port, iterations in limits.items():
        label, centroid = cluster(golden.tensor("x"), golden.tensor("init_centroids"), iterations, original=True)
        _equal(golden, comparison, f"{port}/labels", label)
        _close(golden, comparison, f"{port}/centroids", centroid, atol)
        label_next, centroid_next = cluster(golden.tensor("x_next"), centroid, iterations, original=True)
        _equal(golden, comparison, f"{port}/labels_next_warm_start", label_next)
        _close(golden, comparison, f"{port}/centroids_next", centroid_next, atol)
    weights = golden.tensor("selection_weights")
    labels = [golden.tensor(f"{port}/labels") for port in limits]  # whose were taken is not said
    index, fresh = golden.tensor("fresh_indices"), golden.tensor("fresh_values")
    chosen = [representatives(label, weights, side_car.clusters) for label in labels]
    label = next((label for label, own in zip(labels, chosen, strict=True) if torch.equal(own, index)), labels[0])
    _equal(golden, comparison, "fresh_indices", representatives(label, weights, side_car.clusters))
    before, order1 = golden.tensor("cache_order0_before"), golden.tensor("cache_order1")
    for name in golden.tensors:
        if name.startswith("cache_order0_after/r"):
            ratio = float(name.rpartition("/r")[2])
            after = shared(before, label, index, fresh, ratio, original=True)
            _close(golden, comparison, name, after, atol)
        elif name.startswith("prediction_distance"):
            distance, ratio = name.removeprefix("prediction_distance").split("/r")
            after = golden.tensor(f"cache_order0_after/r{ratio}")
            forecast = predict(Ladder((0, -1), (after, order1)), int(distance), Rule(order=1))
            _close(golden, comparison, name, forecast, atol)


def check_empty_cluster(golden: Golden, comparison: Comparison) -> None:
    """What the published code makes of an empty cluster; by default its token counts once."""
    ratio = golden.data.get("propagation_ratio")
    if not isinstance(ratio, float):
        raise BrokenGoldenError("side-car field 'propagation_ratio' is no number")
    label, fresh = golden.tensor("labels"), golden.tensor("fresh_values")
    index = representatives(label, golden.tensor("weights"), fresh.shape[1])
    _equal(golden, comparison, "fresh_indices", index)
    before = torch.zeros_like(golden.tensor("cache_after"))
    after = shared(before, label, index, fresh, ratio, original=True)
    atol = golden.tolerances.get("atol", default=_DEFAULT)
    _close(golden, comparison, "cache_after", after, atol)
    right = shared(before, label, index, fresh, ratio)
    comparison.true("by default", not torch.equal(after, right), "an empty cluster counts twice by default too")


def check_metrics(golden: Golden, comparison: Comparison) -> None:
    """Errors with every stated epsilon; relative ones that divide by it are compared to six digits."""
    predicted, true = golden.tensor("predicted"), golden.tensor("true")
    for name, values in golden.data.items():
        if not name.startswith("values_eps_") or not isinstance(values, dict):
            continue
        eps = float(name.removeprefix("values_eps_").replace("_", "-"))
        for metric, value in values.items():
            if metric not in _METRICS:
                raise NotYetError(f"metric {metric}")
            measured = error_of(predicted, true, _METRICS[metric], eps)
            comparison.close(f"{name}.{metric}", measured, value, 1e-6 * max(abs(value), 1))


def _equal(golden: Golden, comparison: Comparison, name: str, measured: Tensor) -> None:
    """Exactly; of nothing there is nothing to compare but the shape."""
    recorded = golden.tensor(name)
    if recorded.numel():
        comparison.equal(name, measured, recorded)
    else:
        comparison.true(name, measured.shape == recorded.shape, f"shape {tuple(measured.shape)}")


def _close(golden: Golden, comparison: Comparison, name: str, measured: Tensor, atol: float) -> None:
    recorded = golden.tensor(name)
    if recorded.numel():
        comparison.close(name, measured, recorded, atol)
    else:
        comparison.true(name, measured.shape == recorded.shape, f"shape {tuple(measured.shape)}")
