"""Pictures that a request names: read when it is encoded, and from then on nobody asks whether they are still there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gesso.engine import Engine
from gesso.errors import FileError
from gesso.metadata import file_digest
from gesso.request import GenerationRequest
from tests.tiny_infinite_you import PERSON, tiny_pipeline_with_guest
from tests.tiny_sdxl import tiny_pipeline
from tests.unit.engine.numeric import NumericPipeline, ask, engine_of


def paint_and_spoil(pipeline: Any, request: GenerationRequest, *paths: Path, instead: bytes | None) -> list[Any]:
    """The records of the request's pictures; before the second is begun, the files are gone, or hold something else."""
    begin = pipeline.begin

    def begun(plan: Any, conditioning: Any, image: int) -> Any:
        for path in paths if image else ():
            path.unlink()
            if instead is not None:
                path.write_bytes(instead)
        return begin(plan, conditioning, image)

    pipeline.begin = begun
    with Engine(device="cpu", max_batch=1, load=lambda name, device, dtype: pipeline) as engine:
        return [result.metadata for result in engine.submit(request).result()]


@pytest.mark.parametrize("instead", [None, b"another one"])
def test_a_picture_and_its_mask_that_go_while_it_is_painted(tmp_path: Path, instead: bytes | None) -> None:
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), "orange").save(start)
    Image.linear_gradient("L").resize((64, 64)).save(mask)
    expected = {"init_image": file_digest(start), "mask": file_digest(mask)}
    request = GenerationRequest(
        prompt="a star", seed=7, num_images=2, steps=2, init_image=str(start), mask=str(mask), width=64, height=64
    )
    first, second = paint_and_spoil(tiny_pipeline(), request, start, mask, instead=instead)
    assert first.items() >= expected.items() and second.items() >= expected.items()
    assert (first["index"], second["index"]) == (0, 1)


@pytest.mark.parametrize("instead", [None, b"another one"])
def test_a_photograph_that_goes_while_it_is_painted(tmp_path: Path, instead: bytes | None) -> None:
    person = Path(shutil.copy(PERSON, tmp_path))
    expected = {"image": file_digest(person)}
    request = GenerationRequest.model_validate(
        {"prompt": "a man", "seed": 7, "num_images": 2, "width": 32, "height": 32, "steps": 1}
        | {"identity": {"image": str(person)}}
    )
    records = paint_and_spoil(tiny_pipeline_with_guest(), request, person, instead=instead)
    assert [record["identity"] for record in records] == [expected, expected]


def test_a_picture_that_goes_before_it_is_read(tmp_path: Path) -> None:
    """The request fails alone, on one line."""
    with engine_of(NumericPipeline()) as engine:  # which plans without looking
        jobs = [engine.submit(ask("gone", init_image=str(tmp_path / "gone.png"))), engine.submit(ask("fine"))]
        with pytest.raises(FileError, match=r"gone\.png: cannot be read \(no such file or directory\)"):
            jobs[0].result()
        assert len(jobs[1].result()) == 1
