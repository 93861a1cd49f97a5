"""The KL autoencoder: its loss against rules written out, what it exports, and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gesso.errors import FileError, RequestError, WeightsError
from gesso.models import kl_autoencoder
from gesso.training import recipes
from gesso.training.kl_autoencoder import KLAutoencoderSettings, KLAutoencoderTask, divergence_from_normal, edge_weights
from gesso.training.pictures import scenes_of_step
from gesso.weights.flow_nano import load_autoencoder
from tests.unit.training.tiny_recipes import (
    KL_AUTOENCODER,
    exported,
    kl_autoencoder_recipe,
    log_of,
    same,
    state_of,
    stop_at,
    train,
)


def test_what_is_exported_is_the_average_with_its_scale(kl_autoencoder_run: Path) -> None:
    loaded, config = load_autoencoder(kl_autoencoder_run / "export")
    averages = state_of(kl_autoencoder_run)["average"]
    assert isinstance(averages, dict)
    for name, value in loaded.named_parameters():
        assert torch.equal(value, averages[f"average.{name}"].bfloat16().float()), name
    image, _ = scenes_of_step(0, 100, 32, 0)
    latent = kl_autoencoder.encode(loaded, image)
    assert latent.shape == (100, 2, 8, 8)
    assert float(latent.mean()) == pytest.approx(0, abs=0.05)  # weights were rounded after the scale was measured
    assert float(latent.std()) == pytest.approx(1, abs=0.05)
    assert (config.shift_factor, config.scaling_factor) != (0.0, 1.0)
    assert loaded.config["scaling_factor"] == config.scaling_factor


def test_there_and_back_is_what_diffusers_does(kl_autoencoder_run: Path) -> None:
    loaded, config = load_autoencoder(kl_autoencoder_run / "export")
    image, _ = scenes_of_step(0, 2, 32, 0)
    mean = loaded.encode(image).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
    latent = kl_autoencoder.encode(loaded, image)
    torch.testing.assert_close(latent, (mean - config.shift_factor) * config.scaling_factor)
    decoded = loaded.decode(mean).sample  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(kl_autoencoder.decode(loaded, latent), decoded, rtol=1e-4, atol=1e-5)


def test_a_sample_is_of_the_posterior(kl_autoencoder_run: Path) -> None:
    loaded, config = load_autoencoder(kl_autoencoder_run / "export")
    image, _ = scenes_of_step(0, 2, 32, 0)
    posterior = loaded.encode(image).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    expected = posterior.sample(torch.Generator().manual_seed(3))
    made = kl_autoencoder.sample(loaded, kl_autoencoder.moments(loaded, image), torch.Generator().manual_seed(3))
    torch.testing.assert_close(made, (expected - config.shift_factor) * config.scaling_factor)


def test_a_run_begins_from_an_export(kl_autoencoder_run: Path) -> None:
    recipe, source = kl_autoencoder_recipe(), kl_autoencoder_run / "export"
    assert isinstance(recipe.settings, KLAutoencoderSettings)
    theirs, _ = load_autoencoder(source)
    network = KLAutoencoderTask(replace(recipe.settings, start_from=str(source)), batch=2, seed=0).network
    for name, value in network.named_parameters():
        assert value.requires_grad and torch.equal(value, theirs.get_parameter(name)), name
        assert value is not theirs.get_parameter(name)
    wider = replace(recipe.settings.network, widths=(8, 8, 8))
    with pytest.raises(WeightsError, match="is wanted"):
        KLAutoencoderTask(replace(recipe.settings, start_from=str(source), network=wider), batch=2, seed=0)


def test_a_stopped_run_goes_on_bit_for_bit(kl_autoencoder_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number, step in enumerate((3, 5)):
        with pytest.raises(KeyboardInterrupt):
            train(kl_autoencoder_recipe(), folder, resume=number > 0, report=stop_at(step))
    train(kl_autoencoder_recipe(), folder, resume=True)
    assert same(state_of(folder), state_of(kl_autoencoder_run))
    assert log_of(folder) == log_of(kl_autoencoder_run)
    assert exported(folder) == exported(kl_autoencoder_run)


def test_the_divergence_is_that_of_two_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 2, 3, 4, 4, generator=generator).unbind()
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(divergence_from_normal(mean, log_variance), expected)
    assert float(divergence_from_normal(torch.zeros(3), torch.zeros(3))) == 0


def test_edges_weigh_more_and_pictures_the_same() -> None:
    image = torch.full((2, 3, 8, 8), -1.0)
    image[0, :, :, 4:] = 1.0
    weights = edge_weights(image, 3.0)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3)), torch.ones(2))
    assert float(weights[0, 0, 0, 3]) == pytest.approx(4 * float(weights[0, 0, 0, 0]))
    assert torch.equal(weights[1], torch.ones(1, 8, 8))


def test_a_smaller_loss_after_some_steps() -> None:
    task = kl_autoencoder_recipe().task()
    optimizer = torch.optim.Adam(task.network.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss, _ = task.loss(0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"side": "36"}, "side", "a multiple of 8 pixels"),
        ({"side": "0"}, "side", "a multiple of 8 pixels"),
        ({"kl_weight": "-1"}, "kl_weight", "from 0"),
        ({"edge_weight": "NaN"}, "edge_weight", "from 0"),
        ({"held_out": "0"}, "held_out", "from 1 to"),
        ({"measured": "0"}, "measured", "from 1 to"),
        ({"widths": "[4, 6, 7]"}, "set", "a multiple of 2 groups"),
        ({"latent_channels": "0"}, "set", "latent_channels must be at least 1"),
        ({"scaling_factor": "0"}, "set", "scaling_factor 0.0 is not a finite number above 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used(values: dict[str, str], field: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        recipes.override(kl_autoencoder_recipe(), values)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_real_recipe_is_as_small_as_it_says() -> None:
    task = recipes.load("shapes-autoencoder").task()
    assert isinstance(task, KLAutoencoderTask)
    assert sum(parameter.numel() for parameter in task.network.parameters()) <= 1_200_000
    assert task.settings.network.stride == 4


def test_folders_that_hold_no_autoencoder(kl_autoencoder_run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder"):
        load_autoencoder(tmp_path / "absent")
    folder = tmp_path / "model"
    folder.mkdir()
    source = kl_autoencoder_run / "export"
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = (folder / "autoencoder.safetensors").read_bytes()
    (folder / "autoencoder.safetensors").write_bytes(content[:-1] + b"x")
    with pytest.raises(WeightsError, match=r"autoencoder\.safetensors was altered"):
        load_autoencoder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"network": config["network"] | {"depth": 3}}))
    with pytest.raises(FileError, match="unknown fields: depth"):
        load_autoencoder(folder)


def test_one_config_many_strides() -> None:
    assert KL_AUTOENCODER.stride == 4
    assert kl_autoencoder.KLAutoencoderConfig(latent_channels=1, widths=(8,)).stride == 1
