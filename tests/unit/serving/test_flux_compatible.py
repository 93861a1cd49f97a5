"""The table of FLUX-compatible inputs: held to what predictors publish, to Cog's files, and to what requests become."""

from __future__ import annotations

import inspect
import json
import runpy
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import SecretStr

from gesso.errors import RequestError
from gesso.request import GenerationRequest
from gesso.request_parts import Lora, Refiner
from gesso.sampling.noise_schedulers import NAMES
from gesso.serving.flux_compatible import (
    ILLUSTRATION_NEGATIVE,
    SCHEDULERS,
    FluxCompatibleInput,
    in_our_words,
    parse_input,
    to_request,
)
from gesso.serving.flux_sizes import size_of
from gesso.serving.openapi import as_text, input_schema

REPOSITORY = Path(__file__).parents[3]
PREDICTOR = REPOSITORY / "docker" / "sdxl"
PUBLISHED = json.loads((REPOSITORY / "tests/golden/data/flux-compatible/inputs.json").read_text())
# Where "not given" must be told from a number or a text, so that the model's preset can be taken.
PRESETS = {"guidance": 7.5, "cfg_scale": 7.5, "negative_prompt": ""}
EXTENSIONS = ["width", "height", "loras", "guidance_scale", "replicate_weights", "hf_lora"]


def mapped(**values: Any) -> GenerationRequest:
    given, _ = parse_input(values)
    return to_request(given, model="illustrious-xl", illustrations=True, safety="reject")[0]


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_published_field_is_there_with_its_bounds() -> None:
    ours = input_schema()["properties"]
    assert list(ours) == [*PUBLISHED["properties"], *EXTENSIONS]
    for name, theirs in PUBLISHED["properties"].items():
        found = dict(ours[name])
        for word in ("title", "description"):
            del found[word]
        wanted = dict(theirs)
        if name in PRESETS:
            assert wanted["default"] == PRESETS[name]
            wanted |= {"type": [wanted["type"], "null"], "default": None}
        if name in ("scheduler", "aspect_ratio"):  # more are known here
            assert set(wanted.pop("enum")) <= set(found.pop("enum"))
        if name == "seed":
            assert found.pop("minimum") == -1
        assert found == wanted, name


def test_the_document_in_the_repository_is_made_from_the_table() -> None:
    written = (PREDICTOR / ".cog" / "openapi_schema.json").read_text(encoding="utf-8")
    assert written == as_text(), "python -m gesso.serving.openapi > docker/sdxl/.cog/openapi_schema.json"


def test_the_signature_that_cog_reads_is_the_table() -> None:
    cog = pytest.importorskip("cog", reason="needs pip install 'gesso[cog]'")
    run = runpy.run_path(str(PREDICTOR / "predict.py"))["Predictor"].run
    hints = get_type_hints(run)
    parameters = {name: each.default for name, each in inspect.signature(run).parameters.items() if name != "self"}
    assert list(parameters) == list(FluxCompatibleInput.model_fields)
    assert hints.pop("return") == list[cog.Path]
    table = get_type_hints(FluxCompatibleInput)
    for name, schema in input_schema()["properties"].items():
        found = parameters[name]
        secret = schema.get("x-cog-secret", False)
        kinds = {str(hint).replace("cog.types.Secret", "pydantic.types.SecretStr") for hint in (hints[name],)}
        if "enum" not in schema:
            assert kinds == {str(table[name])} or secret, name
        assert (found.default, found.description) == (schema["default"], schema["description"]), name
        assert (found.ge, found.le) == (schema.get("minimum"), schema.get("maximum")), name
        assert found.choices == schema.get("enum"), name


@pytest.mark.parametrize("megapixels", ["0.25", "0.5", "1", "2"])
@pytest.mark.parametrize("ratio", list(PUBLISHED["sizes"]))
def test_sizes(ratio: Any, megapixels: Any) -> None:
    size, theirs = size_of(ratio, megapixels), tuple(PUBLISHED["sizes"][ratio][megapixels])
    if megapixels == "0.25" and ratio != "1:1":  # theirs stretches the shorter side to 512, and the ratio with it
        assert size != theirs
        assert max(size) == max(theirs)
    else:
        assert size == theirs
    wide, high = map(int, ratio.split(":"))
    assert size[0] / size[1] == pytest.approx(wide / high, rel=0.06)


# ---- what a call becomes --------------------------------------------------------------------------------------------


def test_defaults() -> None:
    request = mapped()
    assert (request.width, request.height, request.steps, request.num_images) == (1024, 1024, 28, 1)
    assert (request.scheduler, request.guidance, request.seed) == ("euler", None, None)
    assert request.negative == ILLUSTRATION_NEGATIVE
    assert request.safety == "reject"
    assert request.lora == ()


def test_names_of_fields() -> None:
    given = FluxCompatibleInput(
        prompt="a cat",
        num_outputs=3,
        seed=7,
        num_inference_steps=12,
        guidance=4,
        negative_prompt="a dog",
        clip_skip=2,
        prompt_strength=0.3,
        image="https://example.org/a.png",
        mask="https://example.org/b.png",
        disable_safety_checker=True,
        aspect_ratio="9:16",
    )
    lora = (Lora(source="owner/style", scale=0.5),)
    request, warnings = to_request(
        given, model="sdxl", illustrations=False, safety="reject", image="a.png", mask="b.png", lora=lora
    )
    assert request == GenerationRequest(
        prompt="a cat",
        negative="a dog",
        model="sdxl",
        width=768,
        height=1344,
        num_images=3,
        seed=7,
        steps=12,
        scheduler="euler",
        clip_skip=2,
        guidance=4,
        init_image="a.png",
        init_strength=0.3,
        mask="b.png",
        lora=lora,
        safety="off",
    )
    assert warnings == ()


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (8, 8), (10, 10), (15, 10), (28, 14), (50, 25)])
def test_going_fast_never_takes_more_steps(asked: int, taken: int) -> None:
    assert mapped(num_inference_steps=asked, go_fast=True).steps == taken
    assert mapped(num_inference_steps=asked).steps == asked


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, None),
        ({"guidance": 7.5, "cfg_scale": 3}, 7.5),  # a number that happens to be upstream's default counts
        ({"cfg_scale": 3}, 3),
        ({"guidance_scale": 4, "cfg_scale": 3}, 4),
        ({"guidance": None, "cfg_scale": None}, None),
    ],
)
def test_guidance_under_its_names(given: dict[str, Any], wanted: float | None) -> None:
    assert mapped(**given).guidance == wanted


def test_guidance_that_is_said_twice_is_told() -> None:
    _, warnings = to_request(
        FluxCompatibleInput(guidance=5, cfg_scale=3), model="sdxl", illustrations=False, safety="off"
    )
    assert warnings == ("guidance 5 was used; its other names said otherwise",)


def test_a_blank_text_is_not_given() -> None:
    names = [
        name
        for name, field in FluxCompatibleInput.model_fields.items()
        if {str, SecretStr, list[str]} & set(get_args(field.annotation))
        and field.default is None
        and name != "negative_prompt"
    ]
    assert {"image", "mask", "extra_lora", "loras", "hf_lora", "civitai_api_token"} < set(names)
    for blank in ("", " \n"):
        values = {name: [blank, blank] if name == "loras" else blank for name in names}
        given, warnings = parse_input(values)
        assert [getattr(given, name) for name in names] == [None] * len(names) and not warnings
        assert parse_input({"loras": [blank, "a/b", blank] * 30})[0].loras == ["a/b"] * 30
    assert parse_input({"hf_api_token": SecretStr("")})[0].hf_api_token is None


def test_an_empty_negative_prompt_is_empty() -> None:
    assert mapped(negative_prompt="").negative == ""
    assert mapped(negative_prompt=None).negative == ILLUSTRATION_NEGATIVE
    assert mapped(guidance=1).negative == ""
    given = FluxCompatibleInput()
    assert to_request(given, model="sdxl", illustrations=False, safety="off")[0].negative == ""


@pytest.mark.parametrize("seed", [None, -1])
def test_seeds_that_are_drawn(seed: int | None) -> None:
    assert mapped(seed=seed).seed is None


def test_every_scheduler_is_one_of_the_engine() -> None:
    assert set(SCHEDULERS.values()) == set(NAMES)
    assert {name: mapped(scheduler=name).scheduler for name in SCHEDULERS} == SCHEDULERS
    for name, spellings in {"dpm++2m-karras": ["dpm++ 2m karras", "DPM++_2M_Karras"], "euler-a": ["Euler_A"]}.items():
        assert {mapped(scheduler=spelling).scheduler for spelling in spellings} == {name}


def test_ways_of_a_refiner() -> None:
    assert mapped().refiner is None
    taking_over = mapped(refine="expert_ensemble_refiner", high_noise_frac=0.7, refine_steps=9).refiner
    assert taking_over == Refiner(model="sdxl-refiner", start=0.7)
    assert mapped(refine="base_image_refiner").refiner == Refiner(model="sdxl-refiner", strength=0.3)
    anew = mapped(refine="base_image_refiner", refine_steps=20).refiner
    assert anew == Refiner(model="sdxl-refiner", strength=0.3, steps=20)


def test_own_sizes_stand_over_the_ratio() -> None:
    request = mapped(width=640, height=1536, aspect_ratio="1:1")
    assert (request.width, request.height) == (640, 1536)


@pytest.mark.parametrize("name", ["lora_weights", "replicate_weights", "hf_lora"])
def test_names_of_the_main_lora(name: str) -> None:
    assert parse_input({name: "owner/style"})[0].main_lora == "owner/style"


# ---- what is told and refused ---------------------------------------------------------------------------------------


def test_unknown_fields_are_told() -> None:
    given, warnings = parse_input({"prompt": "a cat", "promt_strength": 1, "zzz": None})
    assert given.prompt == "a cat"
    assert warnings == (
        "promt_strength is not known and has no effect; did you mean prompt_strength?",
        "zzz is not known and has no effect",
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_outputs": 5}, "num_outputs 5 is not a whole number from 1 to 4"),
        ({"num_outputs": None}, "num_outputs None is not a whole number from 1 to 4"),
        ({"seed": -2}, "seed -2 is not a whole number"),
        ({"seed": 2**63}, "seed 9223372036854775808 is not a whole number"),
        ({"guidance": 0.5}, "guidance 0.5 is not a number from 1 to 20"),
        ({"guidance": float("nan")}, "guidance nan is not"),
        ({"aspect_ratio": "7:1"}, 'aspect_ratio "7:1" is not one of: 1:1, 2:3'),
        ({"output_format": "gif"}, 'output_format "gif" is not one of: webp, png, jpg'),
        ({"scheduler": "PLMS"}, 'scheduler "PLMS" is not one of: DDIM'),
        ({"scheduler": 3}, "scheduler 3 is not text"),
        ({"prompt": ""}, 'prompt "" is not text of 1 to 2000 characters'),
        ({"prompt": "x", "negative_prompt": "x" * 2001}, 'negative_prompt "xxx'),
        ({"mask": "data:,a"}, 'mask "data:,a" is not usable alone; name the picture with image'),
        ({"width": 512}, "width 512 is not usable alone; give width and height"),
        ({"refine": "some"}, 'refine "some" is not one of: no_refiner, expert_ensemble_refiner, base_image_refiner'),
        ({"high_noise_frac": 1.1}, "high_noise_frac 1.1 is not a number from 0 to 1"),
        ({"refine": "base_image_refiner", "refine_steps": 3}, "refine_steps 3 is not at least 4"),
        ({"refine": "base_image_refiner", "num_inference_steps": 2}, "num_inference_steps 2 is not at least 4"),
        ({"lora_weights": "a/b", "hf_lora": "c/d"}, 'hf_lora "c/d" is not usable with lora_weights'),
        ({"lora_scale": 3.5}, "lora_scale 3.5 is not a number from -1 to 3"),
        ({"loras": ["a/b"] * 31}, 'loras "a list of 31" is not a list of at most 30 texts'),
        ({"loras": "x"}, 'loras "x" is not a list of at most 30 texts'),
        ({"loras": [1]}, "loras 1 is not a list of at most 30 texts"),
        ({"prompt": "x" * 2001}, 'prompt "xxx'),
        ({"clip_skip": 3}, "clip_skip 3 is not a whole number from 0 to 2"),
    ],
)
def test_refusals_are_one_line_in_the_callers_words(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        mapped(**values)
    assert str(refusal.value).startswith(words)


def test_the_engines_words_become_the_callers() -> None:
    error = in_our_words(RequestError("init_strength", 0, "enough to leave one of 28 steps", "raise it"))
    assert str(error) == "prompt_strength 0 is not enough to leave one of 28 steps; raise it"
    assert in_our_words(RequestError("lora.scale", 9, "less")).field == "lora.scale"


def test_tokens_are_not_shown() -> None:
    given = FluxCompatibleInput(hf_api_token=SecretStr("hf_secret"))
    assert "hf_secret" not in repr(given)
    assert "hf_secret" not in given.model_dump_json()


ADDRESS = "https://h.org/a.safetensors?token=12345678"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hf_api_token": 12345678}, 'hf_api_token "(not shown)" is not text'),
        ({"civitai_api_token": ["12345678"]}, 'civitai_api_token "(not shown)" is not text'),
        ({"lora_weights": ADDRESS, "hf_lora": ADDRESS}, 'hf_lora "https://h.org/a.safetensors" is not usable with'),
        ({"lora_weights": [ADDRESS]}, 'lora_weights "a list of 1" is not text'),
        ({"loras": ADDRESS}, 'loras "https://h.org/a.safetensors" is not a list'),
        ({"loras": [ADDRESS] * 31}, 'loras "a list of 31" is not a list'),
        ({"mask": ADDRESS}, 'mask "https://h.org/a.safetensors" is not usable alone'),
    ],
)
def test_refusals_do_not_tell_secrets(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parse_input(values)
    assert str(refusal.value).startswith(words)
    assert "12345678" not in str(refusal.value.as_dict())
