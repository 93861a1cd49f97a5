"""Memory that really runs out, under a limit that the system holds a process to: what is said then, and that it helps.

Linux only: other systems do not limit address space, or do not say how much of it is taken.
"""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from gesso.engine.device import free_bytes
from gesso.engine.engine import Engine
from gesso.errors import OutOfMemoryError
from gesso.models.flux_text import FluxText
from gesso.request import GenerationRequest
from tests import tiny_flux
from tests.unit.models.resident_bytes import in_fresh_process, measured

ROOM = 160 << 20  # beyond what a process has that holds the model and has painted a small picture
VOCABULARY = (128 << 20) // 4 // tiny_flux.TEXT_WIDTH  # words of T5: 128 MiB


def paint_under_a_limit(folder: Path) -> tuple[str, int, str]:
    """Paint a small picture and then, in little room, a large one, twice: in `full`, and as the error proposes.

    Returns the error, what was free then, and the mode in which the large picture was painted.
    """
    torch.set_num_threads(1)
    fields = {"prompt": "a red star", "model": str(folder), "steps": 1, "seed": 1}
    small, large = (GenerationRequest.model_validate({**fields, "width": edge, "height": edge}) for edge in (64, 1024))
    with Engine(device="cpu", dtype="float32", memory="full") as engine:
        engine.run(small)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, resource.RLIM_INFINITY))
        try:
            engine.run(large)
            raise AssertionError("there was room for it")
        except OutOfMemoryError as problem:
            error, proposed = str(problem), problem.modes[0].removeprefix("--memory ")
        free = free_bytes("cpu")
        assert free is not None
        engine.run(small)
    gc.collect()
    with Engine(device="cpu", dtype="float32", memory=proposed) as engine:
        return error, free, str(engine.run(large)[0].metadata["memory"])


@measured
@pytest.mark.slow
def test_what_is_proposed_fits(tmp_path: Path) -> None:
    """The text encoder takes 128 MiB, and decoding 168: more together than there is, and not one after the other."""
    pipeline = tiny_flux.tiny_pipeline()
    assert isinstance(pipeline.text, FluxText)
    width = tiny_flux.TEXT_WIDTH
    config = T5Config(vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipeline.text.t5 = T5EncoderModel(config)
    folder = tiny_flux.write_tiny_flux(tmp_path / "flux", pipeline)
    error, free, mode = in_fresh_process(paint_under_a_limit, folder)
    assert error.startswith("out of memory: needs 0.") and "\n" not in error
    assert free > 0.8 * ROOM  # what failed was given back
    assert mode == "offload"
