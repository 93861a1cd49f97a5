"""Trained tiny models that several tests read, and torch left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.training.tiny_recipes import infinity_recipe, tokenizer_recipe, train


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """Threads and the random state belong to the process."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.fixture(scope="session")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny tokenizer, never interrupted; read it only."""
    folder = tmp_path_factory.mktemp("runs") / "tokenizer"
    train(tokenizer_recipe(), folder)
    return folder


@pytest.fixture(scope="session")
def infinity_run(tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny transformer, never interrupted; read it only."""
    folder = tmp_path_factory.mktemp("runs") / "infinity"
    train(infinity_recipe(tokenizer_run / "export"), folder)
    return folder
