"""HunyuanVideo's plans, previews and breaths: what no comparison with diffusers can show."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from gesso.engine import Engine
from gesso.errors import RequestError
from gesso.events import Done, Preview
from gesso.models.hunyuan_video_text import BEFORE, DROPPED, HunyuanVideoText
from gesso.pipelines.hunyuan_video import HunyuanVideoPipeline
from gesso.pipelines.hunyuan_video_state import HunyuanVideoDefaults
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.tiny_flux import clip_tokenizer
from tests.tiny_hunyuan_video import SCHEDULER, llama_tokenizer, tiny_pipeline


@pytest.fixture(scope="module")
def tiny() -> HunyuanVideoPipeline:
    return tiny_pipeline(tile=32, stride=24)


@pytest.fixture(scope="module")
def published() -> HunyuanVideoPipeline:
    """All networks at their published sizes, on the meta device."""
    sizes: dict[str, Any] = {
        "vocab_size": 128320,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    clip: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    with torch.device("meta"):
        parts: Any = [
            HunyuanVideoTransformer3DModel(),
            AutoencoderKLHunyuanVideo(),
            LlamaModel(LlamaConfig(**sizes)),
            CLIPTextModel(CLIPTextConfig(**clip, num_hidden_layers=12, projection_dim=768)),
        ]
    for part in parts:
        torch.nn.Module.to(part, torch.bfloat16)
    transformer, autoencoder, llama, small = parts
    return HunyuanVideoPipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=HunyuanVideoText(
            llama=llama, clip=small, llama_tokenizer=llama_tokenizer(), clip_tokenizer=clip_tokenizer()
        ),
        scheduler=SCHEDULER,
        defaults=HunyuanVideoDefaults(),
        device=torch.device("meta"),
        dtype=torch.bfloat16,
        name="hunyuan-video",
        digest="",
    )


def ask(prompt: str = "a red star", **fields: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "seed": 7, **fields})


# ---- plan -----------------------------------------------------------------------------------------------------------


def test_the_published_model_is_planned_for(published: HunyuanVideoPipeline) -> None:
    plan = published.plan(ask())
    request = plan.request
    assert (request.width, request.height, request.frames, request.fps) == (1280, 720, 129, 24.0)
    assert (request.steps, request.guidance, request.true_guidance, request.scheduler) == (50, 6.0, 1.0, "euler")
    assert plan.warnings == ()
    weights = 2 * (12_821_012_544 + 7_505_186_816 + 123_060_480 + 246_478_803)
    assert plan.peak_bytes == weights + plan.activations["step"]
    assert 12e9 < plan.activations["step"] < 14e9
    assert 3e9 < plan.activations["decode"] < 5e9
    assert 5.9e17 < plan.cost.flops < 6.3e17


def test_cost_grows_with_length_and_doubles_with_true_guidance(published: HunyuanVideoPipeline) -> None:
    short, long = (published.plan(ask(frames=frames, width=960, height=544)) for frames in (61, 129))
    assert long.cost.flops > 2 * short.cost.flops
    assert long.peak_bytes > short.peak_bytes
    doubled = published.plan(ask(frames=61, width=960, height=544, true_guidance=6.0, negative="blur"))
    assert doubled.cost.flops == pytest.approx(2 * short.cost.flops, rel=0.02)
    assert doubled.warnings == ()


@pytest.mark.parametrize(
    ("fields", "field", "hint"),
    [
        ({"frames": 2}, "frames", "nearest: 1 or 5"),
        ({"frames": 128}, "frames", "nearest: 125 or 129"),
        ({"frames": 9999}, "frames", "nearest: 257"),
        ({"width": 9999}, "width", "nearest: 2048"),
        ({"height": 730}, "height", "nearest: 720 or 736"),
        ({"scheduler": "ddim"}, "scheduler", "one of: euler"),
        ({"guidance": (1.0, 2.0)}, "guidance", "a list needs 50 values"),
        ({"init_image": "a.png"}, "init_image", "leave it out"),
    ],
)
def test_what_cannot_be_done_is_refused(
    published: HunyuanVideoPipeline, fields: dict[str, Any], field: str, hint: str
) -> None:
    with pytest.raises(RequestError) as caught:
        published.plan(ask(**fields))
    assert caught.value.field == field
    assert hint in caught.value.hint


def test_warnings(published: HunyuanVideoPipeline) -> None:
    long = published.plan(ask("two rings " * 150))
    llama, clip = long.warnings
    assert llama.startswith("prompt is longer than the 256 tokens that hunyuan-video reads; cut off: ")
    assert "77 tokens that CLIP reads" in clip
    assert "129 frames" in published.plan(ask(frames=133)).warnings[0]
    assert "true_guidance" in published.plan(ask(negative="blur")).warnings[0]
    assert "has no use for top_k" in published.plan(ask(top_k=3)).warnings[0]


def test_what_is_cut_is_what_is_not_read(published: HunyuanVideoPipeline) -> None:
    """The words of the template are no part of what is cut, even where the prompt has the same."""
    text, tokenizer = published.text, llama_tokenizer()
    assert len(tokenizer(BEFORE)["input_ids"]) == DROPPED
    most = "user" + " video" * 254 + " a"
    assert text.count(most + " star") == 258 and text.cut(most + " star") == "star"
    assert text.cut(most) == ""  # only the template's last mark is not read


# ---- the other verbs ------------------------------------------------------------------------------------------------


def test_a_preview_has_a_frame_for_every_latent_one(tiny: HunyuanVideoPipeline) -> None:
    request = ask(frames=9, height=48)
    with Engine(device="cpu", load=lambda name, device, dtype: tiny) as engine:
        events = list(engine.stream(request, preview_every=1))
    seen = [event for event in events if isinstance(event, Preview)]
    assert len(seen) == 2
    assert [len(event.frames) for event in seen] == [3, 3]
    assert all(event.picture is event.frames[0] and event.picture.size == (32, 48) for event in seen)
    last = events[-1]
    assert isinstance(last, Done)
    (wanted,) = run_plainly(tiny, request)
    assert [frame.tobytes() for frame in last.results[0].frames] == [frame.tobytes() for frame in wanted.frames]
    assert last.results[0].fps == 8.0


def test_frames_per_second_change_no_pixel_and_other_lengths_do(tiny: HunyuanVideoPipeline) -> None:
    (slow,), (fast,) = (run_plainly(tiny, ask(fps=fps)) for fps in (8, 30))
    assert [frame.tobytes() for frame in slow.frames] == [frame.tobytes() for frame in fast.frames]
    assert (slow.fps, fast.fps) == (8.0, 30.0)
    assert np.asarray(slow.frames[0]).std() > 5


def test_other_lengths_are_other_batches(tiny: HunyuanVideoPipeline) -> None:
    others: list[dict[str, Any]] = [{}, {"frames": 9}, {"true_guidance": 2.0}, {"fps": 9.0}]
    plans = [tiny.plan(ask(**fields)) for fields in others]
    states = [tiny.begin(plan, made, 0) for plan, made in zip(plans, tiny.encode(plans), strict=True)]
    assert len({state.batch_key for state in states}) == 3
    assert states[0].batch_key == states[3].batch_key


def test_decoding_keeps_no_tile_alive(tiny: HunyuanVideoPipeline) -> None:
    plan = tiny.plan(ask(height=48))
    state = tiny.begin(plan, tiny.encode([plan])[0], 0)
    while state.remaining:
        tiny.step([state])
    half = tiny.decode([copy.copy(state)])
    assert next(half) is None
    del half  # given up between tiles
    outputs = list(tiny.decode([state]))
    assert outputs.count(None) == 4  # pyright: ignore[reportArgumentType]
    assert outputs[-1] is not None and len(outputs[-1].frames) == 5


def test_one_video_is_saved_as_it_was_made(tiny: HunyuanVideoPipeline, tmp_path: Path) -> None:
    with Engine(device="cpu", load=lambda name, device, dtype: tiny) as engine:
        (result,) = engine.run(ask())
    assert result.save(tmp_path / "star.mp4").stat().st_size > 500
