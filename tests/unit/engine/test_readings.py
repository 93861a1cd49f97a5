"""One prompt with several seeds is read once, and paints what it does when it is read each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gesso.engine import Engine
from gesso.request import GenerationRequest
from tests.oracle import run_plainly
from tests.tiny_flux import tiny_pipeline


def request(prompt: str = "a red star", **values: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": prompt, "deterministic": True, "steps": 2, **values})


def reads(requests: Sequence[GenerationRequest]) -> tuple[int, list[bytes]]:
    """How many requests the model read, and the pictures."""
    pipeline: Any = tiny_pipeline()
    encode, count = pipeline.encode, 0

    def counted(plans: Sequence[Any]) -> Any:
        nonlocal count
        count += len(plans)
        return encode(plans)

    pipeline.encode = counted
    with Engine(device="cpu", load=lambda name, device, dtype: pipeline) as engine:
        jobs = [engine.submit(each) for each in requests]
        pictures = [result.image.tobytes() for job in jobs for result in job.result()]
    return count, pictures


def test_seeds_of_one_prompt_share_what_is_read() -> None:
    asked = [request(seed=seed) for seed in (1, 2, 3)]
    count, pictures = reads([*asked, request(seed=1, num_images=2)])
    assert count == 1
    plain = [run_plainly(tiny_pipeline(), each)[0].image.tobytes() for each in asked]
    assert pictures[:3] == plain and pictures[3:] == plain[:2] and len(set(plain)) == 3


def test_whatever_else_is_asked_is_read_for_itself(tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    Image.new("RGB", (32, 32), "red").save(start)
    asked = [request(), request("a blue ring"), request(guidance=2.0), request(steps=3), request(width=48)]
    assert reads(asked)[0] == len(asked)
    assert reads([request(seed=seed, deterministic=False) for seed in (1, 2)])[0] == 2
    assert reads([request(seed=seed, init_image=str(start)) for seed in (1, 2)])[0] == 2


def test_only_the_last_is_remembered() -> None:
    assert reads([request(seed=1), request("another"), request(seed=2)])[0] == 3


def test_what_is_remembered_makes_room() -> None:
    """A picture that runs out of memory while something is kept is begun again without it."""
    pipeline: Any = tiny_pipeline()
    step, failing = pipeline.step, True

    def stepped(states: Sequence[Any]) -> None:
        nonlocal failing
        if failing:
            failing = False
            raise torch.OutOfMemoryError("no room")
        step(states)

    with Engine(device="cpu", load=lambda name, device, dtype: pipeline) as engine:
        pipeline.step = stepped
        assert engine.run(request())
