"""One prompt with several seeds is read once, and paints what it does when it is read each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gesso.engine import Engine
from gesso.engine.readings import _MOST
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


@pytest.mark.parametrize(("between", "read"), [(_MOST - 1, 0), (_MOST, 1)])
def test_few_are_remembered(between: int, read: int) -> None:
    others = [request(f"a star number {number}") for number in range(between)]
    assert reads([request(seed=1), *others, request(seed=2)])[0] == 1 + between + read
