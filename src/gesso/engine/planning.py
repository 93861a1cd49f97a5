"""A request's plan with all that the engine adds to a family's own: step caches and adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gesso.engine.adapters import with_adapters
from gesso.engine.caches import with_cache
from gesso.pipelines.contract import Pipeline, Plan

if TYPE_CHECKING:
    from gesso.request import GenerationRequest


def planned(pipeline: Pipeline, request: GenerationRequest, *, attention: str = "") -> Plan:
    """What a request comes to on a pipeline, which may be on the meta device; nothing is fetched.

    `attention` is the kernel in force. Raises as the pipeline's `plan` does; RequestError for a step cache that does
    not fit the model, its steps or the kernel, and for adapters on a model that has none; FileError and WeightsError
    for adapters that are here and cannot be used.
    """
    return with_adapters(pipeline, with_cache(pipeline, pipeline.plan(request), attention=attention))
