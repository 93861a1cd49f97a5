"""Tiny recipes on the shapes world, whole runs of which take about a second; and runs compared exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gesso.models.flux_network import FluxConfig
from gesso.models.kl_autoencoder import KLAutoencoderConfig
from gesso.models.s3dit.config import S3DiTConfig
from gesso.training import checkpoint
from gesso.training.autoencoder import AutoencoderSettings, AutoencoderTask
from gesso.training.flow import FlowSettings, FlowTask
from gesso.training.flow_networks import NetworkConfig
from gesso.training.infinity import InfinitySettings, InfinityTask
from gesso.training.kl_autoencoder import KLAutoencoderSettings, KLAutoencoderTask
from gesso.training.loop import LoopSettings, Report, Trainer
from gesso.training.recipes.recipe import Recipe
from gesso.worlds.shapes import VOCABULARY
from tests.tiny_infinity import NETWORK, SQUARE, TEXT, TOKENIZER

_CLOCKS = {"seconds", "seconds_per_step"}

KL_AUTOENCODER = KLAutoencoderConfig(latent_channels=2, widths=(4, 4, 8), groups=2)
FLUX = FluxConfig(
    in_channels=8,
    num_layers=1,
    num_single_layers=1,
    num_attention_heads=2,
    attention_head_dim=8,
    joint_attention_dim=TEXT.width,
    pooled_projection_dim=TEXT.width,
    axes_dims_rope=(4, 2, 2),
)
Z_IMAGE = S3DiTConfig(
    in_channels=2,
    dim=16,
    n_heads=2,
    n_kv_heads=2,
    n_refiner_layers=1,
    n_layers=1,
    cap_feat_dim=TEXT.width,
    axes_dims=(4, 2, 2),
    axes_lens=(128, 16, 16),
)
NETWORKS: dict[str, NetworkConfig] = {"flux": FLUX, "z-image": Z_IMAGE}


def tiny_loop(**fields: object) -> LoopSettings:
    settings: dict[str, object] = {"steps": 6, "batch": 2, "learning_rate": 1e-3, "warmup": 2, "log_every": 1}
    settings |= {"evaluate_every": 3, "checkpoint_every": 2}
    return LoopSettings(**(settings | fields))  # type: ignore[arg-type]


def tokenizer_recipe(**loop: object) -> Recipe:
    """Half of its batches decode partial sums; bf16 autocast, as the real recipe."""
    settings = AutoencoderSettings(network=TOKENIZER, grids=SQUARE.grids, side=32, partial_share=0.5, held_out=4)
    return Recipe(name="tiny-tokenizer", make=AutoencoderTask, settings=settings, loop=tiny_loop(**loop))


def infinity_recipe(tokenizer: Path, **loop: object) -> Recipe:
    """With everything that draws at random: flips, dropped and unknown words, drop path."""
    settings = InfinitySettings(
        network=replace(NETWORK, drop_path=0.3, text_length=32),
        text=replace(TEXT, vocabulary=VOCABULARY, length=32),
        tokenizer=str(tokenizer),
        schedule=SQUARE,
        side=32,
        held_out=4,
        condition_drop=0.3,
        generation=(("guidance", 2.0), ("temperature", (1.0, 0.9, 0.8, 0.7, 0.6))),
    )
    return Recipe(name="tiny-infinity", make=InfinityTask, settings=settings, loop=tiny_loop(**loop))


def kl_autoencoder_recipe(**loop: object) -> Recipe:
    settings = KLAutoencoderSettings(network=KL_AUTOENCODER, side=32, edge_weight=0.5, held_out=4, measured=100)
    return Recipe(name="tiny-kl-autoencoder", make=KLAutoencoderTask, settings=settings, loop=tiny_loop(**loop))


def flow_recipe(network: NetworkConfig, autoencoder: Path, text: Path, **fields: object) -> Recipe:
    """With everything that draws at random; `fields` are the task's settings. Two steps to a sample."""
    settings: dict[str, object] = {"network": network, "autoencoder": str(autoencoder), "text": str(text), "side": 32}
    settings |= {"condition_drop": 0.3, "unknown_share": 0.2, "held_out": 4}
    settings |= {"generation": (("steps", 2), ("guidance", 2.0))}
    made = FlowSettings(**(settings | fields))  # type: ignore[arg-type]
    return Recipe(name="tiny-flow", make=FlowTask, settings=made, loop=tiny_loop())


def train(recipe: Recipe, folder: Path, *, resume: bool = False, report: Report | None = None) -> dict[str, float]:
    """A run from its beginning or from its newest checkpoint, with everything made anew as in a process of its own."""
    torch.manual_seed(12345)  # whatever was drawn before must not matter
    return Trainer(recipe.task(), recipe.loop, folder, recipe=recipe.as_dict(), report=report).run(resume=resume)


def stop_at(step: int) -> Report:
    """A report that interrupts the run as soon as this step is logged."""

    def report(at: int, steps: int, figures: Mapping[str, float]) -> None:
        if at == step:
            raise KeyboardInterrupt

    return report


def state_of(folder: Path) -> dict[str, object]:
    """The newest checkpoint's state."""
    found = checkpoint.newest(folder)
    assert found is not None
    return found[1]


def same(one: object, other: object) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def log_of(folder: Path) -> list[dict[str, float]]:
    """The log without what clocks measured."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in _CLOCKS} for line in lines]


def exported(folder: Path) -> dict[str, bytes]:
    """Contents of every exported file."""
    return {path.name: path.read_bytes() for path in sorted((folder / "export").iterdir())}


def stopped_and_resumed(recipe: Recipe, folder: Path) -> Path:
    """A run that was stopped at step 3 and went on to the same bits as one that was not; its folder."""
    one, two = folder / "one", folder / "two"
    train(recipe, one)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, two, report=stop_at(3))
    train(recipe, two, resume=True)
    assert same(state_of(one), state_of(two)) and log_of(one) == log_of(two) and exported(one) == exported(two)
    return two
