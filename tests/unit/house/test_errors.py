"""The error tree: exit statuses, one-line messages and the form for machines."""

import json

import pytest

from gesso import errors

EVERY = [
    (errors.RequestError("width", 1000, "a multiple of 16", "nearest: 992 or 1008"), 2),
    (errors.FileError("/x/y.png", "no such file", "give another"), 2),
    (errors.WeightsError("nano", missing=["a", "b", "c", "d"], unexpected=["e"], mismatched=["f: 1, 2"]), 2),
    (errors.WeightsError("nano", detail="the file ends early"), 2),
    (errors.MissingError("diffusers", "pip install 'gesso[diffusion]'"), 3),
    (errors.RunError("disk full"), 1),
    (errors.OutOfMemoryError(3 << 30, 1 << 30, ("offload", "8bit")), 1),
    (errors.OutOfMemoryError(None, None), 1),
    (errors.RejectedError([7, 9], 4), 1),
    (errors.CancelledError(), 130),
]


@pytest.mark.parametrize(("error", "status"), EVERY)
def test_every_error_has_a_status_one_line_and_a_json_form(error: errors.GessoError, status: int) -> None:
    assert error.exit_status == status
    assert isinstance(error, errors.GessoError)
    assert str(error)
    assert "\n" not in str(error)
    whole = json.loads(json.dumps(error.as_dict(), allow_nan=False))
    assert whole["message"] == str(error)
    assert whole["error"] == type(error).__name__
    assert whole["exit_status"] == status


def test_request_error_reads_as_a_sentence() -> None:
    error = errors.RequestError("width", 1000, "a multiple of 16 for z-image-turbo", "nearest: 992 or 1008")
    assert str(error) == "width 1000 is not a multiple of 16 for z-image-turbo; nearest: 992 or 1008"


def test_long_and_multiline_values_stay_short_and_on_one_line() -> None:
    message = str(errors.RequestError("prompt", "a\n" * 3000, "text"))
    assert "\n" not in message
    assert len(message) < 250
    assert "6000 characters" in message


def test_not_a_number_is_text_for_a_machine() -> None:
    error = errors.RequestError("guidance", float("nan"), "a number")
    assert error.as_dict()["value"] == "nan"


def test_weights_error_names_some_and_counts_all() -> None:
    message = str(errors.WeightsError("f.safetensors", missing=[f"layer.{i}" for i in range(9)]))
    assert "9 missing (layer.0, layer.1, layer.2, and 6 more)" in message
