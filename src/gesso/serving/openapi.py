"""The OpenAPI document of the FLUX-compatible predictor, made from its table of inputs.

    python -m gesso.serving.openapi > docker/sdxl/.cog/openapi_schema.json

What may be null says so by a pair of types: Cog's server takes no notice of OpenAPI 3.0's `nullable`. Not here: the
table (`flux_compatible`).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from gesso.serving.flux_compatible import FluxCompatibleInput

_KEPT = ("type", "description", "default", "minimum", "maximum", "enum", "format", "writeOnly", "items", "maxItems")
_JSON_NULL = {"type": "null"}


def input_schema() -> dict[str, Any]:
    """The JSON schema of the inputs, in the table's order."""
    fields = FluxCompatibleInput.model_json_schema()["properties"]
    properties = {
        name: {"x-order": order, "title": name.replace("_", " ").capitalize(), **_plain(values)}
        for order, (name, values) in enumerate(fields.items())
    }
    return {"type": "object", "title": "Input", "additionalProperties": True, "properties": properties}


def document() -> dict[str, Any]:
    """The whole document."""
    from gesso import __version__

    text = {"type": "string"}
    prediction: dict[str, Any] = {
        "type": "object",
        "properties": {
            "id": text,
            "status": {"type": "string", "enum": ["starting", "processing", "succeeded", "canceled", "failed"]},
            "input": _ref("Input"),
            "output": _ref("Output"),
            "logs": text,
            "error": text,
            "metrics": {"type": "object", "additionalProperties": True},
        },
    }
    request = {
        "type": "object",
        "properties": {
            "id": text,
            "input": _ref("Input"),
            "webhook": {"type": "string", "format": "uri"},
            "webhook_events_filter": {
                "type": "array",
                "items": {"type": "string", "enum": ["start", "output", "logs", "completed"]},
            },
        },
    }
    output = {
        "type": "array",
        "title": "Output",
        "items": {"type": "string", "format": "uri"},
        "description": "A file for each picture that may be seen; fewer than num_outputs where some were unsafe.",
    }
    answer = {"200": {"description": "The prediction", "content": _json("PredictionResponse")}}
    refusal = {"422": {"description": "An input that cannot be used"}}
    predict = {
        "summary": "Predict",
        "operationId": "predict_predictions_post",
        "x-cog-streaming": True,
        "requestBody": {"content": _json("PredictionRequest")},
        "responses": answer | refusal,
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "gesso: FLUX-compatible SDXL", "version": __version__},
        "paths": {"/predictions": {"post": predict}},
        "components": {
            "schemas": {
                "Input": input_schema(),
                "Output": output,
                "PredictionRequest": request,
                "PredictionResponse": prediction,
            }
        },
    }


def as_text() -> str:
    """The document as it lies in its file."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """One field without pydantic's ways: of a choice between something and null, a pair of types."""
    choices = [each for each in values.get("anyOf", []) if each != _JSON_NULL]
    merged = {**values, **(choices[0] if choices else {})}
    if choices:
        merged["type"] = [merged["type"], "null"]
    if merged.get("format") == "password":
        merged["x-cog-secret"] = True
    return {name: merged[name] for name in (*_KEPT, "x-cog-secret") if name in merged}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


if __name__ == "__main__":
    sys.stdout.write(as_text())
