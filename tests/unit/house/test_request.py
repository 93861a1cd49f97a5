"""The only schema: bounds, conversions, and that every refusal is a RequestError with what is allowed."""

import json
import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.errors import RequestError
from gesso.request import LARGEST_SEED, LONGEST_LIST, GenerationRequest, parse_request
from gesso.request_words import allowed_values

# Field names are a public face: the options, the metadata and other people's scripts hang on them.
FIELDS = [
    "prompt",
    "negative",
    "model",
    "width",
    "height",
    "frames",
    "fps",
    "num_images",
    "seed",
    "steps",
    "scheduler",
    "clip_skip",
    "guidance",
    "guidance_layer",
    "true_guidance",
    "guidance_normalization",
    "guidance_truncation",
    "temperature",
    "top_k",
    "top_p",
    "revisions",
    "init_image",
    "init_strength",
    "mask",
    "identity",
    "refiner",
    "lora",
    "cache",
    "deterministic",
    "safety",
]


def test_the_list_of_fields_is_frozen() -> None:
    assert list(GenerationRequest.model_fields) == FIELDS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", "   "),
        ("prompt", "x" * 2001),
        ("prompt", None),
        ("prompt", "\ud800"),
        ("negative", "x" * 2001),
        ("model", ""),
        ("width", 0),
        ("width", 1_000_000),
        ("width", "wide"),
        ("width", 64.5),
        ("height", -64),
        ("frames", 0),
        ("frames", 10_001),
        ("frames", 8.5),
        ("fps", 0),
        ("fps", 241),
        ("fps", math.nan),
        ("num_images", 0),
        ("num_images", 10_001),
        ("seed", -1),
        ("seed", LARGEST_SEED + 1),
        ("guidance", math.nan),
        ("guidance", math.inf),
        ("guidance", -0.1),
        ("guidance", 100.1),
        ("guidance", (1.0, math.nan)),
        ("guidance", ()),
        ("guidance", (1.0,) * (LONGEST_LIST + 1)),
        ("guidance", "strong"),
        ("guidance_layer", 1),
        ("temperature", 0),
        ("temperature", (0.5, 0.0)),
        ("top_k", -1),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("init_image", ""),
        ("mask", ""),
        ("mask", "alone.png"),
        ("init_strength", 2),
        ("init_strength", 0.5),
        ("lora", 3),
        ("lora", "two words"),
        ("lora", ("owner/style", "hf:owner/style::2")),
        ("lora", tuple(f"owner/style-{index}" for index in range(33))),
        ("deterministic", "perhaps"),
        ("safety", "maybe"),
    ],
)
def test_unusable_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request({"prompt": "a star", field: value})
    assert caught.value.field == field
    assert caught.value.allowed
    assert caught.value.__cause__ is None  # pydantic's own report does not reach a person


@pytest.mark.parametrize("more", ["", "x" * 5000])
@pytest.mark.parametrize("times", [2, 33])
def test_a_secret_in_an_adapters_address_is_not_quoted(more: str, times: int) -> None:
    with pytest.raises(RequestError, match=r"^lora") as caught:
        parse_request({"prompt": "a star", "lora": [f"https://h.org/a.safetensors?token=secret{more}"] * times})
    assert "secret" not in str(caught.value.as_dict())


def test_construction_and_parsing_refuse_alike() -> None:
    with pytest.raises(RequestError) as constructed:
        GenerationRequest(prompt="")
    with pytest.raises(RequestError) as parsed:
        parse_request({"prompt": ""})
    assert str(constructed.value) == str(parsed.value) == 'prompt "" is not text of 1 to 2000 characters'


def test_unknown_field_offers_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean width"):
        parse_request({"prompt": "x", "widht": 64})


def test_missing_prompt_is_named() -> None:
    with pytest.raises(RequestError, match="prompt"):
        parse_request({})


def test_last_seed_must_fit_too() -> None:
    assert parse_request({"prompt": "x", "seed": LARGEST_SEED}).seed == LARGEST_SEED
    with pytest.raises(RequestError, match="seed"):
        parse_request({"prompt": "x", "seed": LARGEST_SEED, "num_images": 2})


def test_frozen_and_hashable() -> None:
    request = parse_request({"prompt": "x", "guidance": [1, 2]})
    assert request.guidance == (1.0, 2.0)
    assert hash(request) == hash(parse_request({"prompt": "x", "guidance": (1.0, 2.0)}))
    with pytest.raises(ValueError, match="frozen"):
        request.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@given(
    prompt=st.text(min_size=1, max_size=200).filter(lambda text: text.strip() and text.isprintable()),
    seed=st.integers(0, 2**40),
    guidance=st.one_of(st.none(), st.floats(0, 100), st.lists(st.floats(0, 100), min_size=1, max_size=9).map(tuple)),
    temperature=st.one_of(st.none(), st.floats(0.01, 100)),
)
def test_json_round_trip_is_exact(prompt: str, seed: int, guidance: object, temperature: float | None) -> None:
    request = parse_request({"prompt": prompt, "seed": seed, "guidance": guidance, "temperature": temperature})
    assert parse_request(json.loads(json.dumps(request.model_dump(mode="json")))) == request


@given(
    st.dictionaries(st.sampled_from([*FIELDS, "other"]), st.one_of(st.none(), st.integers(), st.floats(), st.text()))
)
def test_whatever_comes_in_only_request_errors_come_out(values: dict[str, object]) -> None:
    with suppress(RequestError):
        parse_request(values)


def test_allowed_values_come_from_the_fields() -> None:
    assert allowed_values("num_images", GenerationRequest) == "1 to 10000"
    assert allowed_values("temperature", GenerationRequest) == "above 0 and at most 100"
    assert allowed_values("seed", GenerationRequest) == "0 to 2^63 - 1"
    assert allowed_values("deterministic", GenerationRequest) == ""
