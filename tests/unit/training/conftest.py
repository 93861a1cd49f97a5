"""Trained tiny models that several tests read, a world of few scenes, and torch left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gesso.models.word_encoder import WordEncoder
from gesso.training.export import save_model
from gesso.worlds import shapes
from gesso.worlds.shapes import VOCABULARY, every
from tests.tiny_infinity import TEXT
from tests.unit.training.tiny_recipes import (
    NETWORKS,
    flow_recipe,
    infinity_recipe,
    kl_autoencoder_recipe,
    tokenizer_recipe,
    train,
)


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


@pytest.fixture(scope="session")
def kl_autoencoder_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny KL autoencoder, never interrupted; read it only."""
    folder = tmp_path_factory.mktemp("runs") / "kl-autoencoder"
    train(kl_autoencoder_recipe(), folder)
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny word encoder of random weights that knows the shapes world's words; read it only."""
    folder = tmp_path_factory.mktemp("models") / "words"
    config = replace(TEXT, vocabulary=VOCABULARY, length=32)
    torch.manual_seed(0)
    save_model(folder, {"text": WordEncoder(config).state_dict()}, {"family": "words", "text": asdict(config)}, {})
    return folder


@pytest.fixture(scope="session")
def flow_runs(kl_autoencoder_run: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by family, on stored latents and never interrupted; read them only."""
    runs = {family: tmp_path_factory.mktemp("runs") / family for family in NETWORKS}
    for family, folder in runs.items():
        train(flow_recipe(NETWORKS[family], kl_autoencoder_run / "export", words, precompute=10), folder)
    return runs


@pytest.fixture(scope="session")
def flux_run(flow_runs: dict[str, Path]) -> Path:
    return flow_runs["flux"]


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A training world of a few scenes, so that all of them are encoded in no time."""
    numbers = every.training_numbers()[:60]
    monkeypatch.setattr(every, "training_numbers", lambda: numbers)
    monkeypatch.setattr(shapes, "training_scene", lambda seed: every.scene_at(int(numbers[seed % len(numbers)])))
    return numbers.tolist()
