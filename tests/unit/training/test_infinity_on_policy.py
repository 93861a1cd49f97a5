"""Training Infinity on its own way: the world's answers against sums written down, where ways lead, whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gesso.errors import RequestError
from gesso.models.infinity.correction import draw_flips, training_tokens, walk_scales
from gesso.models.infinity.quantizer import codes, enlarge, quantize, shrink, sum_of_codes, to_tokens
from gesso.pipelines.contract import State
from gesso.request import GenerationRequest
from gesso.training import recipes
from gesso.training.infinity_loss import divergence, token_losses
from gesso.training.infinity_on_policy import InfinityOnPolicySettings, InfinityOnPolicyTask
from gesso.training.painting import at_rest, walk
from gesso.training.pictures import captions_to_paint, to_tensor
from gesso.training.posterior import Answer, expected_bits
from gesso.training.recipes.recipe import Recipe
from gesso.training.world_latents import WorldLatents
from gesso.worlds import shapes
from gesso.worlds.shapes import Claim, every
from tests.tiny_infinity import SQUARE, TOKENIZER
from tests.unit.training.tiny_recipes import (
    infinity_recipe,
    log_of,
    stopped_and_resumed,
    tiny_loop,
    tokenizer_recipe,
    train,
)

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4), (4, 4))


def recipe_of(tokenizer: Path, model: Path, **changes: object) -> Recipe:
    base = infinity_recipe(tokenizer / "export")
    given = {field.name: getattr(base.settings, field.name) for field in fields(base.settings)}  # type: ignore[arg-type]
    given |= {"start_from": str(model / "export"), "train_text": False, "weigh_margins": True}
    given |= {"paint_every": 2, "guidances": (1.0, 2.0)} | changes
    loop = tiny_loop(steps=4, evaluate_every=4, checkpoint_every=2)
    return Recipe(
        name="tiny-on-policy", make=InfinityOnPolicyTask, settings=InfinityOnPolicySettings(**given), loop=loop
    )


def task_of(recipe: Recipe, folder: Path) -> InfinityOnPolicyTask:
    task = recipe.task()
    assert isinstance(task, InfinityOnPolicyTask)
    task.prepare(folder, lambda made: None)
    return task


# ---- answers --------------------------------------------------------------------------------------------------------


def world_of(count: int) -> tuple[WorldLatents, Tensor]:
    latents = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    return WorldLatents(latents), latents.float()


def test_answers_are_those_of_all_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition, one scene at a time in float64, on a way of wrong bits."""
    claim = Claim((("star", "red"),), background="blue")
    numbers, shares = every.allowed(claim)
    kept = numbers[::2]
    monkeypatch.setattr(every, "training_numbers", lambda: kept)
    world, latents = world_of(len(kept))
    flips = draw_flips(latents[3:4], GRIDS, strength=0.3, scales=5, generator=torch.Generator().manual_seed(1))
    way = list(walk_scales(latents[3:4], GRIDS, flips))
    sums, bits = [scale.sum_BKHW[0] for scale in way], [scale.bits_BKhw[0] for scale in way]
    weights = torch.from_numpy(shares[::2]).double()
    for index, answer in enumerate(expected_bits(world, sums, bits, GRIDS, claim)):
        ones, margins = torch.zeros_like(answer.chance_khw).double(), torch.zeros_like(answer.chance_khw).double()
        for weight, latent in zip(weights / weights.sum(), latents, strict=True):
            residual = shrink((latent - sums[index])[None], GRIDS[index])[0].double()
            ones += weight * residual.clamp(0, 1)
            margins += weight * residual.abs().clamp(max=1)
        torch.testing.assert_close(answer.margin_khw.double(), margins, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(answer.chance_khw.double(), ones / margins, atol=1e-4, rtol=1e-3)
        for scene, latent in enumerate(latents):
            residual = shrink((latent - sums[index])[None], GRIDS[index])[0].double()
            right = torch.sigmoid(torch.where(bits[index], residual, -residual) / 0.1)
            weights[scene] *= (0.03 + 0.94 * right).prod()


def test_what_can_be_one_scene_only_is_answered_by_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the answer is what self-correction teaches: labels and margins of `training_tokens`."""
    claim, _ = shapes.stated(every.scene_at(int(every.training_numbers()[0])), 0)
    numbers = every.allowed(claim)[0][:1]
    monkeypatch.setattr(every, "training_numbers", lambda: numbers)
    world, latents = world_of(1)
    flips = draw_flips(latents, GRIDS, strength=0.3, scales=4, generator=torch.Generator().manual_seed(1))
    way = list(walk_scales(latents, GRIDS, flips))
    answers = expected_bits(world, [s.sum_BKHW[0] for s in way], [s.bits_BKhw[0] for s in way], GRIDS, claim)
    tokens = training_tokens(latents, GRIDS, flips)
    chances = torch.cat([to_tokens(answer.chance_khw[None], False) for answer in answers], dim=1)
    margins = torch.cat([to_tokens(answer.margin_khw[None], False) for answer in answers], dim=1)
    assert torch.equal(chances, tokens.labels_BLK.float())
    torch.testing.assert_close(margins, tokens.margins_BLK.clamp(max=1))


def test_between_two_scenes_the_nearer_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bits by lot do not teach: scales that agree on a mixture are mended towards one scene."""
    claim = Claim((("star", "red"),), background="blue")
    numbers = every.allowed(claim)[0][:2]
    monkeypatch.setattr(every, "training_numbers", lambda: numbers)
    world, (one, other) = world_of(2)
    way = list(walk_scales((0.6 * one + 0.4 * other)[None], GRIDS))
    *_, last = expected_bits(world, [s.sum_BKHW[0] for s in way], [s.bits_BKhw[0] for s in way], GRIDS, claim)
    wanted = one - way[-1].sum_BKHW[0] > 0
    assert torch.equal(last.chance_khw > 0.5, wanted) and float((last.chance_khw - 0.5).abs().min()) > 0.49


def test_fine_scales_overrule_coarse_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first bits spoke against is not lost: a picture that settles on another scene is led there."""
    claim = Claim((("star", "red"),), background="blue")
    numbers = every.allowed(claim)[0][:2]
    monkeypatch.setattr(every, "training_numbers", lambda: numbers)
    world, (one, other) = world_of(2)
    sums, bits = [torch.zeros_like(one)], list[Tensor]()
    for index, grid in enumerate(GRIDS):
        latent = one if index < 2 else other
        bits.append(shrink((latent - sums[-1])[None], grid)[0] > 0)
        sums.append(sums[-1] + enlarge(codes(bits[-1][None]), GRIDS[-1])[0])
    answers = expected_bits(world, sums[:-1], bits, GRIDS, claim)
    towards = [one, one, one, other, other]  # the third scale's bits speak for the other one
    for index in (1, 2, 4):
        wanted = shrink((towards[index] - sums[index])[None], GRIDS[index])[0] > 0
        assert torch.equal(answers[index].chance_khw > 0.5, wanted), index


def test_divergence_is_none_where_chances_are_met() -> None:
    generator = torch.Generator().manual_seed(0)
    chances, weights = torch.rand(2, 7, 3, generator=generator), torch.rand(2, 7, 3, generator=generator)
    chances[0, 0], weights_L = torch.tensor([0.0, 1.0, 0.5]), torch.softmax(torch.arange(7.0), dim=0)
    logits = logits_of(chances)
    none = divergence(logits, chances, weights_L, weights)
    torch.testing.assert_close(none, torch.zeros(2), atol=1e-6, rtol=0)
    sure = chances.round()
    torch.testing.assert_close(
        divergence(logits, sure, weights_L, weights), (token_losses(logits, sure, weights) * weights_L).sum(-1)
    )


def logits_of(chances_BLK: Tensor) -> Tensor:
    """Logits `[B,L,2K]` of a network that answers with these chances."""
    one_BLK = torch.logit(chances_BLK.double(), eps=1e-12).float()
    return torch.stack([torch.zeros_like(one_BLK), one_BLK], dim=-1).flatten(-2)


# ---- ways -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_ways_are_those_of_the_pipeline(
    autocast: bool, tokenizer_run: Path, infinity_run: Path, tmp_path: Path, small_world: list[int]
) -> None:
    """Inputs are what each step saw, bits what it added; each with its caption and what that claims."""
    task = task_of(recipe_of(tokenizer_run, infinity_run), tmp_path)
    asked = captions_to_paint(1, 4, 0)  # round 1 is guided
    with torch.autocast("cpu", torch.bfloat16, autocast):
        ways = task._walk(2)
        requests = [GenerationRequest(prompt=caption, seed=seed, guidance=2.0) for _, caption, seed in asked]
        seen: list[list[Tensor]] = [[] for _ in asked]
        with at_rest(task.network):
            states: list[State] = []
            for scale, states in enumerate(walk(task._pipeline(), requests)):
                if 0 < scale < len(task.grids):
                    for inputs, state in zip(seen, states, strict=True):
                        inputs.append(state.inputs_nK)  # type: ignore[attr-defined]
    assert len(ways) == 4 and task.network.training
    for text, inputs, state, way in zip(asked, seen, states, ways, strict=True):
        (past,) = way.pasts
        assert (way.claim, way.caption) == text[:2] and len(way.sums) == len(past.bits) == len(task.grids)
        assert past.first == 0 and not any(part.is_inference() for part in way.sums)
        assert torch.equal(task._inputs(way), torch.cat(inputs))
        total = torch.zeros_like(way.sums[0])
        for sum_kHW, bits_khw in zip(way.sums, past.bits, strict=True):
            assert torch.equal(sum_kHW, total)
            total = total + enlarge(codes(bits_khw[None]), task.grids[-1])[0]
        assert torch.equal(total, state.sum_kHW)  # type: ignore[attr-defined]


def test_a_revised_picture_is_what_the_tokenizer_made_of_it(
    tokenizer_run: Path, infinity_run: Path, tmp_path: Path, small_world: list[int]
) -> None:
    """Its sums are those that were seen, and answers after a revision go by the bits that the tokenizer found."""
    task = task_of(recipe_of(tokenizer_run, infinity_run, generation=(("revisions", 2),)), tmp_path)
    assert task._world is not None
    for way in task._walk(2):
        assert [past.first for past in way.pasts] == [0, 3, 4] and [len(past.bits) for past in way.pasts] == [3, 4, 5]
        for past, after in pairwise(way.pasts):
            painted = sum_of_codes([bits_khw[None] for bits_khw in past.bits], task.grids[-1])
            seen = quantize(task.tokenizer.encode(task.tokenizer.decode(painted)), task.grids).bits[: after.first]
            assert [bits.tolist() for bits in after.bits[: after.first]] == [bits[0].tolist() for bits in seen]
            torch.testing.assert_close(way.sums[after.first], sum_of_codes(seen, task.grids[-1])[0])
        chances, margins = task._answers(way)
        by_past = [answers_by(task, task._world, past.bits, way.claim) for past in way.pasts]
        for scale, past in enumerate((0, 0, 0, 1, 2)):
            start, end = (task.settings.schedule.starts[scale + one] for one in (0, 1))
            assert torch.equal(chances[start:end], task._tokens(by_past[past][scale].chance_khw))
            assert torch.equal(margins[start:end], task._tokens(by_past[past][scale].margin_khw))


def answers_by(
    task: InfinityOnPolicyTask, world: WorldLatents, bits: Sequence[Tensor], claim: Claim
) -> Sequence[Answer]:
    sums = [torch.zeros(bits[0].shape[0], *task.grids[-1])]
    for bits_khw in bits[:-1]:
        sums.append(sums[-1] + enlarge(codes(bits_khw[None]), task.grids[-1])[0])
    return expected_bits(world, sums, bits, task.grids[: len(bits)], claim)


def test_true_ways_are_those_of_self_correction(
    tokenizer_run: Path, infinity_run: Path, tmp_path: Path, small_world: list[int]
) -> None:
    """Inputs with flipped bits, of latents that are those of the pictures but for how they are stored."""
    task = task_of(recipe_of(tokenizer_run, infinity_run), tmp_path)
    scenes = [shapes.training_scene(seed) for seed in range(2, 4)]
    assert task._world is not None
    latents = task._world.of(scenes)
    wanted = task.tokenizer.encode(to_tensor(shapes.draw(scenes, 32)))
    torch.testing.assert_close(latents, wanted, atol=0.1, rtol=0)  # bfloat16
    ways = task._true_ways(1, torch.Generator().manual_seed(3))
    flips = draw_flips(latents, task.grids, strength=0.2, scales=6, generator=torch.Generator().manual_seed(3))
    tokens = training_tokens(latents, task.grids, flips)
    assert torch.equal(torch.stack([task._inputs(way) for way in ways]), tokens.inputs_BLK)
    assert [(way.claim, way.caption) for way in ways] == [
        shapes.stated(scene, seed) for seed, scene in enumerate(scenes, 2)
    ]


def test_every_way_is_used_before_the_next_is_walked(
    tokenizer_run: Path, infinity_run: Path, tmp_path: Path, small_world: list[int]
) -> None:
    task = task_of(recipe_of(tokenizer_run, infinity_run), tmp_path)
    steps = [task._own_ways(step) for step in range(4)]
    assert [len(ways) for ways in steps] == [2, 2, 2, 2]
    first, second = ({id(way) for step in pair for way in step} for pair in (steps[:2], steps[2:]))
    assert len(first) == len(second) == 4 and not first & second


def test_a_network_that_answers_as_the_world_has_nothing_to_learn(
    tokenizer_run: Path, infinity_run: Path, tmp_path: Path, small_world: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is the world's answer, on true ways and own ones; only captions of true ways are spoilt."""
    recipe = recipe_of(tokenizer_run, infinity_run, unknown_share=1.0, condition_drop=1.0)
    task = task_of(recipe, tmp_path)
    task._own = task._walk(0)
    own = task._own[2:]
    seen: list[Tensor] = []

    def ideal(ids_BT: Tensor, dropped_B: Tensor, inputs_BLK: Tensor, layout: object) -> Tensor:
        ways = task._true_ways(1, torch.Generator().manual_seed(1)) + own
        assert dropped_B.tolist() == [True, True, False, False]
        assert torch.equal(ids_BT[2:], task._ids([way.caption for way in own], None))
        assert not torch.equal(ids_BT[:2], task._ids([way.caption for way in ways[:2]], None))
        assert torch.equal(inputs_BLK, torch.stack([task._inputs(way) for way in ways]))
        seen.append(inputs_BLK)
        return logits_of(torch.stack([task._answers(way)[0] for way in ways]))

    monkeypatch.setattr(task.network, "forward", ideal)
    loss, figures = task.loss(1)
    assert abs(float(loss)) + abs(float(figures["true"])) + abs(float(figures["own"])) < 1e-5 and len(seen) == 1


def test_what_is_taught_is_what_guidance_paints(
    tokenizer_run: Path, infinity_run: Path, tmp_path: Path, small_world: list[int]
) -> None:
    """Where little is left to chance, the likelier bits on the way are those that the guided model painted."""
    sure = (("guidance", 2.0), ("temperature", 1e-4))
    recipe = recipe_of(tokenizer_run, infinity_run, guidances=(2.0,), taught_guidance=(2.0,) * 5, generation=sure)
    task = task_of(recipe, tmp_path)
    ways = task._walk(0)
    inputs = torch.stack([task._inputs(way) for way in ways])
    assert task._teacher is not None
    taught = task._taught(task._teacher, task._ids([way.caption for way in ways], None), inputs)
    painted = torch.stack([torch.cat([task._tokens(bits) for bits in way.pasts[0].bits]) for way in ways])
    assert torch.equal(taught > 0.5, painted)


def test_every_scale_is_taught_by_its_own_guidance(
    tokenizer_run: Path, infinity_run: Path, tmp_path: Path, small_world: list[int]
) -> None:
    numbers = (3.0, 2.0, 1.0, 0.5, 4.0)
    task = task_of(recipe_of(tokenizer_run, infinity_run, taught_guidance=numbers), tmp_path)
    (way, *_), starts = task._walk(0), task.settings.schedule.starts
    asked = (task._ids([way.caption], None), task._inputs(way)[None])
    assert task._teacher is not None
    taught = task._taught(task._teacher, *asked)
    for scale, number in enumerate(numbers):
        even = task_of(recipe_of(tokenizer_run, infinity_run, taught_guidance=(number,) * 5), tmp_path)
        part = slice(starts[scale], starts[scale + 1])
        assert torch.equal(taught[:, part], even._taught(task._teacher, *asked)[:, part])


def test_half_of_an_own_answer_is_taught(
    tokenizer_run: Path, infinity_run: Path, tmp_path: Path, small_world: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model that it began from, which stays as it is; true ways are the world's alone."""
    task = task_of(recipe_of(tokenizer_run, infinity_run, taught_guidance=(3.0,) * 5), tmp_path)
    task._own = task._walk(0)
    own, true = task._own[2:], task._true_ways(1, torch.Generator().manual_seed(1))
    assert task._teacher is not None
    ids = task._ids([way.caption for way in own], None)
    before = task._taught(task._teacher, ids, torch.stack([task._inputs(way) for way in own]))
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.add_(1.0)
    world = torch.stack([task._answers(way)[0] for way in true + own])
    wanted = torch.cat((world[:2], (world[2:] + before) / 2))
    monkeypatch.setattr(task.network, "forward", lambda *_: logits_of(wanted))
    _, figures = task.loss(1)
    assert abs(float(figures["true"])) + abs(float(figures["own"])) < 1e-5


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_bit_for_bit(
    tokenizer_run: Path, infinity_run: Path, tmp_path: Path, small_world: list[int]
) -> None:
    recipe = recipe_of(tokenizer_run, infinity_run, score_prompts=2)
    one = stopped_and_resumed(recipe, tmp_path)
    assert {"true", "own"} <= set(log_of(one)[0]) and "evaluation/score" in log_of(one)[-1]
    words, transformer = (
        [load_file(run / "export" / f"{part}.safetensors") for run in (infinity_run, one)]
        for part in ("text", "transformer")
    )
    assert all(torch.equal(words[0][name], words[1][name]) for name in words[0])  # the word encoder stays
    assert any(not torch.equal(transformer[0][name], transformer[1][name]) for name in transformer[0])


def test_networks_of_two_by_two_cells_a_token(infinity_run: Path, tmp_path: Path, small_world: list[int]) -> None:
    tokenizer = tokenizer_recipe()
    grids = SQUARE.latent_grids(True)
    settings = replace(tokenizer.settings, network=replace(TOKENIZER, stride=4), grids=tuple(grids))  # type: ignore[type-var]
    train(replace(tokenizer, settings=settings), tmp_path / "tokenizer")
    recipe = recipe_of(tmp_path / "tokenizer", infinity_run, start_from="", train_text=True)
    network = replace(recipe.settings.network, patchify=True, bits=4 * TOKENIZER.bits)  # type: ignore[attr-defined]
    train(replace(recipe, settings=replace(recipe.settings, network=network)), tmp_path / "run")  # type: ignore[type-var]
    assert log_of(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"paint_every": "0"}, "paint_every"),
        ({"guidances": "[]"}, "guidances"),
        ({"score_prompts": "-1"}, "score_prompts"),
        ({"side": "256"}, "side"),
        ({"start_from": "", "train_text": "false"}, "train_text"),
        ({"weigh_margins": "false"}, "weigh_margins"),
        ({"taught_guidance": "[2.0]"}, "taught_guidance"),
        ({"taught_guidance": "[2, 2, 2, 2, 2, 2, 2, NaN]"}, "taught_guidance"),
        ({"taught_guidance": "[2, 2, 2, 2, 2, 2, 2, 2]", "start_from": ""}, "start_from"),
    ],
)
def test_values_that_cannot_be_used(values: dict[str, str], field: str) -> None:
    with pytest.raises(RequestError, match=field):
        recipes.override(recipes.load("infinity-nano-on-policy"), values)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"guidances": (1.0, -1.0)}, "guidance"),
        ({"guidances": (float("nan"),)}, "guidance"),
        ({"paint_every": 4096}, "at once"),
    ],
)
def test_what_cannot_be_painted_is_told_at_once(
    changes: dict[str, object], field: str, tokenizer_run: Path, infinity_run: Path
) -> None:
    with pytest.raises(RequestError, match=field):
        recipe_of(tokenizer_run, infinity_run, **changes).task()


@pytest.mark.parametrize("name", ["infinity-nano-on-policy", "infinity-nano-unguided"])
def test_the_recipes_resume_exactly(name: str) -> None:
    recipe = recipes.load(name)
    assert isinstance(recipe.settings, InfinityOnPolicySettings)
    for steps in (recipe.loop.checkpoint_every, recipe.loop.steps):
        assert steps % recipe.settings.paint_every == 0
