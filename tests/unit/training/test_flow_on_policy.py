"""Training flow models on their own way: the world's answers against sums written down, where ways lead, whole runs."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gesso.errors import RequestError
from gesso.models import flux_network
from gesso.models.kl_autoencoder import encode
from gesso.pipelines.flux_state import FluxState
from gesso.pipelines.z_image_state import ZImageState
from gesso.request import GenerationRequest
from gesso.sampling.flow import linear_sigmas, static_shift
from gesso.training import recipes
from gesso.training.flow import quiet_norms
from gesso.training.flow_on_policy import FlowOnPolicySettings, FlowOnPolicyTask
from gesso.training.painting import walk
from gesso.training.pictures import captions_to_paint, first_seed, stated_scenes
from gesso.training.posterior import expected_latents
from gesso.training.recipes.recipe import Recipe
from gesso.training.world_latents import WorldLatents
from gesso.worlds import shapes
from gesso.worlds.shapes import Claim, every
from tests.unit.training.tiny_recipes import (
    NETWORKS,
    flow_recipe,
    log_of,
    stopped_and_resumed,
    tiny_loop,
    train,
)

RED_STAR = Claim((("star", "red"),), size="large", background="blue")


def recipe_of(family: str, autoencoder: Path, words: Path, **changes: object) -> Recipe:
    base = flow_recipe(NETWORKS[family], autoencoder, words)
    given = {field.name: getattr(base.settings, field.name) for field in fields(base.settings)}  # type: ignore[arg-type]
    generation = (("steps", 4), ("guidance", 2.0), ("scheduler", "euler-stochastic"))
    given |= {"paint_prompts": 3, "paint_every": 2, "guidances": (0.0, 2.0), "generation": generation} | changes
    loop = tiny_loop(steps=4, evaluate_every=4, checkpoint_every=2)
    return Recipe(name="tiny-on-policy", make=FlowOnPolicyTask, settings=FlowOnPolicySettings(**given), loop=loop)


# ---- answers --------------------------------------------------------------------------------------------------------


def world_of(numbers: list[int], side: int = 3) -> tuple[WorldLatents, Tensor]:
    latents = torch.randn(len(numbers), 2, side, side, generator=torch.Generator().manual_seed(0)).half()
    return WorldLatents(latents), latents.double()


def test_an_answer_is_the_mean_of_all_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the sum over scenes in float64, densities of the normal and all."""
    numbers, shares = every.allowed(Claim((("star", "red"),), background="blue"))
    kept = numbers[::2]
    monkeypatch.setattr(every, "training_numbers", lambda: kept)
    world, latents = world_of(kept.tolist())
    noise = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    for sigma in (0.3, 0.6, 0.9, 0.99):
        noisy = (1 - sigma) * latents[4] + sigma * noise
        density = torch.distributions.Normal((1 - sigma) * latents, sigma).log_prob(noisy).sum(dim=(1, 2, 3))
        weight = torch.softmax(torch.from_numpy(shares[::2]).log() + density, dim=0)
        wanted = (weight[:, None, None, None] * latents).sum(0)
        claims = [Claim((("star", "red"),), background="blue")]
        (answer,) = expected_latents(world, noisy[None].float(), torch.tensor([sigma]), claims)
        torch.testing.assert_close(answer.double(), wanted, atol=1e-4, rtol=1e-4)


def test_all_noise_says_nothing_and_little_noise_says_all(small_world: list[int]) -> None:
    world, latents = world_of(small_world)
    claim, _ = shapes.stated(every.scene_at(small_world[7]), 3)
    everything = replace(claim, size=None)
    noise = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    numbers, shares = every.allowed(everything)
    trained = [index for index, number in enumerate(numbers.tolist()) if number in small_world]
    weight = torch.from_numpy(shares[trained] / shares[trained].sum())
    rows = [small_world.index(int(numbers[index])) for index in trained]
    prior = (weight[:, None, None, None] * latents[rows]).sum(0)
    blind = expected_latents(world, noise, torch.tensor([1.0]), [everything])[0]
    torch.testing.assert_close(blind.double(), prior, atol=1e-5, rtol=1e-5)
    clean = world.of([every.scene_at(small_world[7])])
    seen = expected_latents(world, torch.lerp(clean, noise, 0.02), torch.tensor([0.02]), [everything])
    torch.testing.assert_close(seen, clean)


def test_between_two_pictures_the_answer_is_one_of_them(small_world: list[int]) -> None:
    """What no true picture leads to: the mixture of two, with little noise, is answered by the nearer."""
    world, latents = world_of(small_world)
    claim = replace(shapes.stated(every.scene_at(small_world[0]), 0)[0], size=None)
    numbers = [number for number in every.allowed(claim)[0].tolist() if number in small_world]
    one, other = (latents[small_world.index(number)].float() for number in numbers[:2])
    answer = expected_latents(world, (0.6 * one + 0.4 * other)[None] * 0.9, torch.tensor([0.1]), [claim])
    torch.testing.assert_close(answer[0], one, atol=1e-3, rtol=0)


# ---- ways -----------------------------------------------------------------------------------------------------------


def task_of(recipe: Recipe, folder: Path) -> FlowOnPolicyTask:
    task = recipe.task()
    assert isinstance(task, FlowOnPolicyTask)
    task.prepare(folder, lambda made: None)
    return task


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", NETWORKS)
def test_ways_are_those_of_the_pipeline(
    family: str, autocast: bool, kl_autoencoder_run: Path, words: Path, tmp_path: Path, small_world: list[int]
) -> None:
    """Latents and sigmas are what its states hold before each step, each with its caption and what that claims."""
    task = task_of(recipe_of(family, kl_autoencoder_run / "export", words, least_sigma=0.3), tmp_path)
    asked = captions_to_paint(1, 3, 0)  # round 1 is guided
    with torch.autocast("cpu", torch.bfloat16, autocast), quiet_norms():
        places = task._walk(2)
        pipeline = task._pipeline()
        requests = [GenerationRequest(prompt=caption, seed=seed, guidance=2.0) for _, caption, seed in asked]
        wanted: list[tuple[object, ...]] = []
        for step, states in enumerate(walk(pipeline, requests)):
            if step in (1, 2):  # of four steps one begins with pure noise, and one below
                wanted += [(*text[:2], latent_of(state)) for text, state in zip(asked, states, strict=True)]
    assert sorted({round(place.sigma, 3) for place in places}) == [0.5, 0.75]
    assert all(place.latent_Chw.dtype == torch.float32 and not place.latent_Chw.is_inference() for place in places)
    assert len(places) == len(wanted) == 6
    for claim, caption, latent_Chw in wanted:
        assert isinstance(latent_Chw, Tensor)
        assert any(
            (place.claim, place.caption) == (claim, caption)
            and torch.allclose(place.latent_Chw, latent_Chw.float(), atol=1e-2 if autocast else 1e-6)
            for place in places
        )


def test_what_is_painted_is_the_runs_own_and_nothing_it_learns_from() -> None:
    one, other = captions_to_paint(3, 4, 0), captions_to_paint(3, 4, 1)
    assert [(claim, caption) for claim, caption, _ in one] == stated_scenes(first_seed(3, 4, 0) + 2**32, 4)[1]
    assert len({seed % 2**32 for _, _, seed in one + other}) == 8  # PyTorch heeds no more of a seed


def latent_of(state: object) -> Tensor:
    if isinstance(state, ZImageState):
        return state.latent_C1hw[:, 0].clone()
    assert isinstance(state, FluxState)
    assert state.tokens_1LD.dtype == torch.float32  # else times would be cast to bfloat16 as well
    return flux_network.unpack(state.tokens_1LD, *state.size)[0].clone()


def test_every_scheduler_meets_every_guidance(kl_autoencoder_run: Path, words: Path) -> None:
    recipe = recipe_of("z-image", kl_autoencoder_run / "export", words, schedulers=("euler", "euler-stochastic"))
    task = recipe.task()
    assert isinstance(task, FlowOnPolicyTask)
    asked = [task._request("-", 0, round_) for round_ in range(5)]
    assert [(one.scheduler, one.guidance) for one in asked] == [
        ("euler", 0.0),
        ("euler", 2.0),
        ("euler-stochastic", 0.0),
        ("euler-stochastic", 2.0),
        ("euler", 0.0),
    ]


def test_a_network_that_answers_as_the_world_has_nothing_to_learn(
    kl_autoencoder_run: Path, words: Path, tmp_path: Path, small_world: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is the velocity towards the answer, of true latents and of own ones."""
    task = task_of(recipe_of("z-image", kl_autoencoder_run / "export", words, paint_prompts=4), tmp_path)
    world = task._world
    assert world is not None
    seen: list[Tensor] = []

    def ideal(noisy: Tensor, sigma_B: Tensor, features: Tensor, real: Tensor) -> Tensor:
        places = task._true_places(1, torch.Generator().manual_seed(1)) if not seen else task._own_places(1)
        assert torch.equal(noisy, torch.stack([place.latent_Chw for place in places]))
        claims = [place.claim for place in places]
        seen.append(noisy)
        return (noisy - expected_latents(world, noisy, sigma_B, claims)) / sigma_B[:, None, None, None]

    task._own = task._walk(0)
    monkeypatch.setattr(task.network.velocity, "forward", ideal)
    loss, figures = task.loss(1)
    assert float(loss) == float(figures["true"]) == float(figures["own"]) == 0.0 and len(seen) == 2


def test_every_way_is_used_before_the_next_is_walked(
    kl_autoencoder_run: Path, words: Path, tmp_path: Path, small_world: list[int]
) -> None:
    task = task_of(recipe_of("z-image", kl_autoencoder_run / "export", words), tmp_path)
    steps = [task._own_places(step) for step in range(4)]
    assert [len(places) for places in steps] == [2, 2, 2, 2]
    first, second = ({id(place.latent_Chw) for step in pair for place in step} for pair in (steps[:2], steps[2:]))
    assert len(first) == len(second) == 4 and not first & second


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NETWORKS)
def test_a_stopped_run_goes_on_bit_for_bit(
    family: str, kl_autoencoder_run: Path, words: Path, tmp_path: Path, small_world: list[int]
) -> None:
    recipe = recipe_of(family, kl_autoencoder_run / "export", words)
    one = stopped_and_resumed(recipe, tmp_path)
    assert {"true", "own"} <= set(log_of(one)[0])


def test_latents_are_those_of_the_pictures(
    kl_autoencoder_run: Path, words: Path, tmp_path: Path, small_world: list[int]
) -> None:
    task = task_of(recipe_of("flux", kl_autoencoder_run / "export", words), tmp_path)
    scenes = [every.scene_at(small_world[index]) for index in (0, 31, 59)]
    assert task._world is not None
    pixels = torch.from_numpy(shapes.draw(scenes, 32)).movedim(-1, 1).float() / 127.5 - 1
    wanted = encode(task.autoencoder, pixels)
    torch.testing.assert_close(task._world.of(scenes), wanted, atol=0.1, rtol=0)  # bfloat16


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"paint_prompts": "0"}, "paint_prompts"),
        ({"paint_every": "0"}, "paint_every"),
        ({"guidances": "[]"}, "guidances"),
        ({"least_sigma": "1"}, "least_sigma"),
        ({"precompute": "8"}, "precompute"),
        ({"side": "256"}, "side"),
        ({"world": "faces", "score_prompts": "0"}, "world"),
    ],
)
def test_values_that_cannot_be_used(values: dict[str, str], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        recipes.override(recipes.load("z-image-nano-on-policy"), values)
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"schedulers": ("clairvoyance",)}, "clairvoyance"),
        ({"guidances": (0.0, float("nan"))}, "guidance"),
        ({"guidances": (-1.0,)}, "guidance"),
        ({"least_sigma": 0.999}, r"least_sigma 0.999 .* they begin at 1.00, 0.75, 0.50, 0.25"),
    ],
)
def test_what_the_model_cannot_paint_is_told_at_once(
    kl_autoencoder_run: Path, words: Path, fields: dict[str, object], named: str
) -> None:
    recipe = recipe_of("z-image", kl_autoencoder_run / "export", words, **fields)
    with pytest.raises(RequestError, match=named):
        recipe.task()


def test_checkpoints_lie_where_it_resumes_exactly(
    kl_autoencoder_run: Path, words: Path, tmp_path: Path, small_world: list[int]
) -> None:
    recipe = recipe_of("z-image", kl_autoencoder_run / "export", words)
    with pytest.raises(RequestError, match="checkpoint_every 3 is not a multiple of 2"):
        train(replace(recipe, loop=replace(recipe.loop, checkpoint_every=3)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["flux-nano-on-policy", "z-image-nano-on-policy"])
def test_the_recipes_resume_exactly_and_learn_at_each_place_once(name: str) -> None:
    recipe = recipes.load(name)
    settings = recipe.settings
    assert isinstance(settings, FlowOnPolicySettings)
    assert recipe.loop.checkpoint_every % settings.paint_every == 0
    sigmas_N = static_shift(linear_sigmas(dict(settings.generation)["steps"]), settings.sampling_shift)  # type: ignore[arg-type]
    learned = int(((sigmas_N >= settings.least_sigma) & (sigmas_N < 1)).sum())
    assert recipe.loop.batch * settings.paint_every <= settings.paint_prompts * learned
