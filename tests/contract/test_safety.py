"""Whatever paints: a flagged picture is blurred or kept back, and the other pictures of the request arrive.

The engine looks at all families' pictures in one place, so that a few stand for all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from gesso.engine import Engine
from gesso.events import Done, Preview
from gesso.metadata import frames_digest, pixels_digest
from gesso.request import GenerationRequest
from gesso.safety.hiding import hidden
from tests.contract.subjects import SUBJECTS
from tests.tiny_safety import write_checker


def painted(engine: Engine, request: GenerationRequest) -> tuple[Done, dict[tuple[int, int], list[bytes]]]:
    """How it ended, and the pixels of every preview by picture and step."""
    job = engine.submit(request, preview_every=1)
    seen = {(event.image, event.step): event for event in job.events() if isinstance(event, Preview)}
    last = job.wait()
    assert isinstance(last, Done)
    return last, {place: pixels(event.frames or [event.picture]) for place, event in seen.items()}


def pixels(pictures: tuple[Image.Image, ...] | list[Image.Image]) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


@pytest.mark.parametrize("name", ["infinity", "flux", "hunyuan-video"])
def test_only_the_flagged_picture_is_kept_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SUBJECTS[name]()
    with subject.engine() as engine:
        plain = engine.run(subject.ask(num_images=2, deterministic=True, safety="off"))
    others = list(plain[1].frames or [plain[1].image])
    monkeypatch.setenv("GESSO_SAFETY_MODEL", str(write_checker(tmp_path, [plain[0].image], others)))
    with subject.engine() as engine:
        blurring, _ = painted(engine, subject.ask(num_images=2, deterministic=True, safety="blur"))
        rejecting, _ = painted(engine, subject.ask(num_images=2, deterministic=True, safety="reject"))
        assert engine.counters()["safety"] == {"off": 0, "passed": 2, "blurred": 1, "rejected": 1}
    blurred, passed = blurring.results
    assert pixels([blurred.image, *blurred.frames]) == pixels(
        [hidden(picture) for picture in (plain[0].image, *plain[0].frames)]
    )
    digest = frames_digest(blurred.frames) if blurred.frames else pixels_digest(blurred.image)
    assert blurred.metadata["pixels"] == digest
    assert passed.metadata["pixels"] == plain[1].metadata["pixels"]
    [arrived], [kept] = rejecting.results, rejecting.rejected
    assert (arrived.seed, arrived.metadata["pixels"]) == (plain[1].seed, plain[1].metadata["pixels"])
    assert kept.seed == plain[0].seed and "pixels" not in kept.metadata
    for each, decision in ((plain[0], "off"), (blurred, "blurred"), (passed, "passed"), (kept, "rejected")):
        said = each.metadata["safety"]
        assert isinstance(said, dict) and said["decision"] == decision
        assert ("model" in said) == (decision != "off") and ("reason" in said) == (decision in ("blurred", "rejected"))


def test_previews_are_blurred_until_the_picture_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_SAFETY_MODEL", str(write_checker(tmp_path)))
    subject = SUBJECTS["infinity"]()
    with subject.engine() as engine:
        sharp = [event for event in engine.stream(subject.ask(), preview_every=1) if isinstance(event, Preview)]
        _, seen = painted(engine, subject.ask(safety="reject"))
    expected = {(0, preview.step): [hidden(preview.picture).tobytes()] for preview in sharp}
    common = seen.keys() & expected.keys()  # a slow reader misses some
    assert common and all(seen[place] == expected[place] for place in common)
