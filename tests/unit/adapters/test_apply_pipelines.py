"""Pipelines as the engine calls them: prompts read plan by plan, then pictures of different adapters step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from torch import nn

from gesso.adapters.apply import Adapted, Use, Uses
from gesso.pipelines.contract import Plan, without_breaths
from gesso.request import GenerationRequest
from tests import tiny_flux, tiny_infinity, tiny_qwen_image, tiny_sdxl, tiny_z_image
from tests.adapter_files import random_adapter

# A pipeline, its network's role, layers that steps call (others read prompts), and guidance of each picture.
SUBJECTS: dict[str, tuple[Callable[[], Any], str, str, tuple[float, ...]]] = {
    "flux": (tiny_flux.tiny_pipeline, "transformer", "", (3.0, 3.0, 3.0)),
    "qwen-image": (tiny_qwen_image.tiny_pipeline, "transformer", "", (3.0, 3.0, 3.0)),
    "z-image": (tiny_z_image.tiny_pipeline, "transformer", "layers", (3.0, 1.0, 2.0)),
    "sdxl": (tiny_sdxl.tiny_pipeline, "unet", "", (3.0, 3.0, 3.0)),
    "infinity": (tiny_infinity.tiny_pipeline, "transformer", "self_attention", (3.0, 1.0, 2.0)),
}


def _begun(pipeline: Any, adapted: Adapted, plan: Plan, uses: Uses) -> Any:
    with adapted.using([uses]):
        (conditioning,) = pipeline.encode([plan])
        return pipeline.begin(plan, conditioning, 0)


def _painted(pipeline: Any, adapted: Adapted, states: Sequence[Any], company: Sequence[Uses]) -> list[np.ndarray]:
    while states[0].remaining:
        with adapted.using(company):
            pipeline.step(states)
    return [np.asarray(output.image, dtype=int) for output in without_breaths(pipeline.decode(states))]


@pytest.mark.parametrize("family", SUBJECTS)
def test_pictures_of_a_batch_have_each_their_own_adapters(family: str) -> None:
    make, role, stepping, guidance = SUBJECTS[family]
    pipeline = make()
    network: nn.Module = getattr(pipeline, role)
    adapted = Adapted({role: network})
    first, second = (random_adapter(network, seed, only=stepping, role=role) for seed in (1, 2))
    company: list[Uses] = [(Use(first, 0.8),), (), (Use(second, 0.5), Use(first, -0.3))]
    requests = [GenerationRequest(prompt="a star", seed=seed, guidance=value) for seed, value in enumerate(guidance)]
    plans = [pipeline.plan(request) for request in requests]
    states = [_begun(pipeline, adapted, plan, uses) for plan, uses in zip(plans, company, strict=True)]
    together = _painted(pipeline, adapted, states, company)
    for picture, plan, uses in zip(together, plans, company, strict=True):
        (alone,) = _painted(pipeline, adapted, [_begun(pipeline, adapted, plan, uses)], [uses])
        assert np.abs(picture - alone).max() <= 2
    (plain,) = _painted(pipeline, adapted, [_begun(pipeline, adapted, plans[0], ())], [()])
    assert np.abs(plain - together[0]).max() > 8
