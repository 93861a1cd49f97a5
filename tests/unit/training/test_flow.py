"""The flow task: times, conventions that trainer and pipeline share, what is learned and what is drawn at random."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gesso.engine.loading import flow_nano as loading
from gesso.engine.loading.build import Build
from gesso.errors import FileError, MissingError, RequestError, WeightsError
from gesso.models import flux_network
from gesso.models.word_encoder import PAD
from gesso.pipelines.flux_state import FluxState
from gesso.pipelines.z_image_state import ZImageState
from gesso.request import GenerationRequest
from gesso.training import recipes
from gesso.training.flow import FlowSettings, FlowTask, draw_sigmas
from gesso.training.flow_networks import FAMILIES
from gesso.training.recipes.recipe import Recipe
from gesso.weights import catalogue
from tests.unit.training.tiny_recipes import FLUX, NETWORKS, flow_recipe, state_of

PROMPT = "a red star"


@pytest.fixture(scope="module")
def recipe(kl_autoencoder_run: Path, words: Path) -> Recipe:
    return flow_recipe(FLUX, kl_autoencoder_run / "export", words)


def _task(recipe: Recipe, **fields: object) -> FlowTask:
    assert isinstance(recipe.settings, FlowSettings)
    return FlowTask(replace(recipe.settings, **fields), batch=4, seed=0)  # type: ignore[arg-type]


# ---- times ----------------------------------------------------------------------------------------------------------


def test_times_are_logit_normal() -> None:
    """One in each equal share of probability, so quantiles hold in every batch."""
    sigma_B = draw_sigmas(1000, mean=0.4, deviation=0.7, shift=1.0, generator=torch.Generator().manual_seed(0))
    assert bool(((sigma_B > 0) & (sigma_B < 1)).all())
    assert torch.equal(sigma_B, sigma_B.sort().values)
    logits = torch.logit(sigma_B.double())
    assert float(logits.median()) == pytest.approx(0.4, abs=0.01)
    assert float(logits.std()) == pytest.approx(0.7, abs=0.01)


def test_a_shift_bends_times_towards_noise() -> None:
    plain, bent = (
        draw_sigmas(64, mean=0.0, deviation=1.0, shift=shift, generator=torch.Generator().manual_seed(0))
        for shift in (1.0, 3.0)
    )
    torch.testing.assert_close(bent, 3 * plain / (1 + 2 * plain))


# ---- conventions ----------------------------------------------------------------------------------------------------


def _pipeline(folder: Path) -> Any:
    return loading.load_own(catalogue.find(str(folder)), Build(device="cpu", dtype=torch.float32))


@torch.no_grad()
@pytest.mark.parametrize("family", NETWORKS)
def test_the_adapter_says_what_the_pipeline_says(flow_runs: dict[str, Path], family: str) -> None:
    """Text, time, tokens and sign at every step of the real sampler; with random weights, so that all of them show."""
    pipeline = _pipeline(flow_runs[family] / "export")
    torch.manual_seed(0)
    for parameter in pipeline.transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    adapter = FAMILIES[type(NETWORKS[family])][1](NETWORKS[family])
    adapter.transformer = pipeline.transformer
    plan = pipeline.plan(GenerationRequest(prompt=PROMPT, seed=1, steps=3, guidance=0.0))
    state = pipeline.begin(plan, pipeline.encode([plan])[0], 0)
    encoder = pipeline.text.encoder
    ids_BT = encoder.token_ids([PROMPT], encoder.config.length)
    for _ in range(plan.steps):
        latent, sigma = _latent(state), _sigma(state)
        velocity = adapter(latent, sigma, encoder(ids_BT), ids_BT != PAD)
        pipeline.step([state])
        torch.testing.assert_close(latent - sigma * velocity, _clean(state), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", NETWORKS)
def test_what_is_learned_leads_from_noise_to_the_picture(flow_runs: dict[str, Path], family: str) -> None:
    """One whole step of the sampler along noise - clean ends at clean."""
    pipeline = _pipeline(flow_runs[family] / "export")
    plan = pipeline.plan(GenerationRequest(prompt=PROMPT, seed=1, steps=1, guidance=0.0))
    state = pipeline.begin(plan, pipeline.encode([plan])[0], 0)
    noise = state.tokens_1LD if isinstance(state, FluxState) else state.latent_C1hw
    clean = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    state.advance(noise - clean)
    torch.testing.assert_close(state.tokens_1LD if isinstance(state, FluxState) else state.latent_C1hw, clean)


def _latent(state: FluxState | ZImageState) -> Tensor:
    """`[1,C,h,w]`."""
    if isinstance(state, FluxState):
        return flux_network.unpack(state.tokens_1LD, *state.size)
    return state.latent_C1hw.transpose(0, 1)


def _sigma(state: FluxState | ZImageState) -> Tensor:
    if isinstance(state, FluxState):
        return state.timesteps_N[state.index][None] / 1000
    return torch.tensor([state.sigma])


def _clean(state: FluxState | ZImageState) -> Tensor:
    """Where the last step pointed, `[1,C,h,w]`."""
    if isinstance(state, FluxState):
        return flux_network.unpack(state.clean_tokens(), *state.size)
    return state.estimate().transpose(0, 1)


class _Told(nn.Module):
    """Answers with the truth, and remembers what it was asked."""

    def __init__(self, truth: Tensor) -> None:
        super().__init__()
        self.truth = truth
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, latent: Tensor, sigma_B: Tensor, features_BTE: Tensor, real_BT: Tensor) -> Tensor:
        self.asked.append((latent, sigma_B))
        return self.truth


def test_the_loss_is_of_noise_less_clean_on_the_straight_line(recipe: Recipe) -> None:
    task = _task(recipe)
    clean, noise = torch.randn(2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    told = _Told(noise - clean)
    task.network.velocity = told  # pyright: ignore[reportAttributeAccessIssue]
    errors_B = task._errors(clean, noise, torch.tensor([0.0, 0.25, 1.0]), task.encoding.token_ids([PROMPT] * 3))
    assert torch.equal(errors_B, torch.zeros(3))
    latent, _ = told.asked[0]
    torch.testing.assert_close(latent[0], clean[0])
    torch.testing.assert_close(latent[1], 0.75 * clean[1] + 0.25 * noise[1])
    torch.testing.assert_close(latent[2], noise[2])


@pytest.mark.parametrize("family", NETWORKS)
def test_it_begins_by_saying_nothing(recipe: Recipe, family: str) -> None:
    """Output zero, so the first loss is the velocity's own size."""
    task = _task(recipe, network=NETWORKS[family])
    latent = torch.randn(2, 2, 8, 8)
    ids_BT = task.encoding.token_ids([PROMPT, ""])
    velocity = task.network.velocity(latent, torch.tensor([0.1, 0.9]), task.text(ids_BT), ids_BT != PAD)
    assert torch.equal(velocity, torch.zeros_like(latent))


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_prompts_are_dropped_and_words_hidden(recipe: Recipe) -> None:
    task = _task(recipe, condition_drop=0.5, unknown_share=0.5)
    ids_BT = task.encoding.token_ids(["two large red stars on a white background"] * 400)
    spoilt_BT = task._spoilt(ids_BT, torch.Generator().manual_seed(0))
    empty_B = (spoilt_BT == task.encoding.token_ids([""])).all(dim=1)
    assert 140 <= int(empty_B.sum()) <= 260
    kept_BT = spoilt_BT[~empty_B]
    unknown = (kept_BT == 1).float().mean(dim=0)
    assert bool(((unknown[:8] > 0.3) & (unknown[:8] < 0.7)).all())
    assert torch.equal(kept_BT[:, 8:], ids_BT[: len(kept_BT), 8:])  # the end mark and the padding


def test_a_step_is_a_function_of_its_number(recipe: Recipe) -> None:
    task = _task(recipe)
    nn.init.normal_(task.transformer.proj_out.weight)  # type: ignore[union-attr]
    torch.manual_seed(5)
    first, again, other = (float(task.loss(step)[0].detach()) for step in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("family", NETWORKS)
def test_the_loss_falls(recipe: Recipe, family: str) -> None:
    task = _task(recipe, network=NETWORKS[family])
    optimizer = torch.optim.Adam(task.network.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss, _ = task.loss(0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_evaluation_by_bucket_of_time(recipe: Recipe) -> None:
    task = _task(recipe, score_prompts=2)
    task.network.eval()
    figures = task.evaluate()
    assert figures == task.evaluate()
    buckets = [figures[f"validation_loss_{bucket:02d}"] for bucket in range(8)]
    assert figures["validation_loss"] == pytest.approx(sum(buckets) / 8)
    assert figures["score"] in (0, 0.5, 1)
    assert all(math.isfinite(value) for value in figures.values())


# ---- the word encoder -----------------------------------------------------------------------------------------------


def test_a_frozen_word_encoder_is_not_in_the_checkpoint(flux_run: Path) -> None:
    state = state_of(flux_run)
    assert isinstance(state["network"], dict)
    assert all(name.startswith("velocity.transformer.") for name in state["network"])


def test_a_word_encoder_that_is_trained_along(recipe: Recipe) -> None:
    task = _task(recipe, train_text=True)
    nn.init.normal_(task.transformer.proj_out.weight)  # type: ignore[union-attr]
    task.loss(0)[0].backward()
    assert task.network.text is task.text
    assert task.text.word_embedding.weight.grad is not None
    frozen = _task(recipe)
    nn.init.normal_(frozen.transformer.proj_out.weight)  # type: ignore[union-attr]
    frozen.loss(0)[0].backward()
    assert frozen.text.word_embedding.weight.grad is None


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field", "words_said"),
    [
        ({"precompute": "-1"}, "precompute", "a number of scenes"),
        ({"time_std": "0"}, "time_std", "above 0"),
        ({"time_mean": "NaN"}, "time_mean", "a number"),
        ({"time_shift": "-1"}, "time_shift", "above 0"),
        ({"sampling_shift": "1000"}, "sampling_shift", "at most 100"),
        ({"condition_drop": "1.5"}, "condition_drop", "from 0 to 1"),
        ({"unknown_share": "-0.1"}, "unknown_share", "from 0 to 1"),
        ({"held_out": "0"}, "held_out", "from 1 to"),
        ({"score_prompts": "-1"}, "score_prompts", "a number of questions"),
        ({"generation": '[["steps", 0]]'}, "steps", "1 to 1000"),
        ({"generation": '[["speed", 2]]'}, "field", "a field of a request"),
        ({"side": "4"}, "width", "8 to 16384"),
        ({"num_layers": "-1"}, "set", "at least one layer"),
        ({"axes_dims_rope": "[4, 4, 4]"}, "set", "not the sum of axes_dims_rope, 12"),
        ({"axes_dims_rope": "[5, 2, 1]"}, "set", "even"),
        ({"in_channels": "6"}, "set", "four times"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used(recipe: Recipe, values: dict[str, str], field: str, words_said: str) -> None:
    with pytest.raises(RequestError) as caught:
        recipes.override(recipe, values)
    assert caught.value.field == field
    assert words_said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field", "words_said"),
    [
        ({"side": "36"}, "side", "a multiple of 8 pixels"),
        ({"in_channels": "12"}, "network", "the autoencoder has 2 channels where the network has 3"),
        ({"joint_attention_dim": "8"}, "network", "text features are 16 wide where the network reads 8"),
        ({"generation": '[["temperature", 2.0]]'}, "generation", "temperature"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit(recipe: Recipe, values: dict[str, str], field: str, words_said: str) -> None:
    with pytest.raises(RequestError) as caught:
        recipes.override(recipe, values).task()
    assert caught.value.field == field
    assert words_said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_that_are_not_there(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="get it with: gesso train shapes-autoencoder"):
        _task(recipe, autoencoder=str(tmp_path / "absent"))
    with pytest.raises(MissingError, match="get it with: gesso train infinity-nano"):
        _task(recipe, text=str(tmp_path / "absent"))
    with pytest.raises(FileError, match=r"no model \(no config\.json\)"):
        _task(recipe, autoencoder=str(tmp_path))


def test_going_on_from_an_exported_model(recipe: Recipe, flux_run: Path) -> None:
    """Training begins with the exported weights; a model of other sizes is refused, naming tensors."""
    source = str(flux_run / "export")
    task = _task(recipe, start_from=source)
    exported = _pipeline(flux_run / "export").transformer.state_dict()
    assert all(torch.equal(task.transformer.state_dict()[name], value) for name, value in exported.items())
    assert all(parameter.requires_grad for parameter in task.network.parameters())
    with pytest.raises(WeightsError, match=r"single_transformer_blocks\.1"):
        _task(recipe, start_from=source, network=replace(FLUX, num_single_layers=2))


def test_going_on_keeps_the_words_that_were_read(recipe: Recipe, flux_run: Path, words: Path, tmp_path: Path) -> None:
    """A network that learned by one encoder makes nothing of another's features, and would not say so."""
    source, other = flux_run / "export", shutil.copytree(words, tmp_path / "words")
    tensors = load_file(other / "text.safetensors")
    save_file({name: -value for name, value in tensors.items()}, other / "text.safetensors")
    assert _task(recipe, start_from=str(source), text=str(source))
    with pytest.raises(RequestError, match=f"the word encoder of start_from; set text={source}"):
        _task(recipe, start_from=str(source), text=str(other))
