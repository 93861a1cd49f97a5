"""Branches held as one ladder while their run steps alone, and refiners: the same numbers as one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gesso.cache_settings import CacheSettings, Granularity, PolicyName
from gesso.caching.attach import Attached, attach
from gesso.caching.parts import Part, SpanDivision
from gesso.caching.predictor import Rule, Smoothing
from gesso.caching.store import TOGETHER, Store
from gesso.errors import RunError
from gesso.models.s3dit.transformer import Prompt, S3DiT, size_of
from gesso.sampling.guidance import NEGATIVE, PROMPT, branches
from tests.tiny_caches import ROWS, noise, z_image

Company = Sequence[tuple[str, tuple[str, ...]]]
BRANCHES = (PROMPT, NEGATIVE)
STEPS = 9
SETTINGS = CacheSettings(policy="taylorseer", granularity="module", interval=3, warmup=2, order=2)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def paint(
    attached: Attached, calls: Sequence[Company], length: int = 40, sides: Sequence[int] = (2 * ROWS,) * STEPS
) -> list[list[Tensor]]:
    """Outputs of each step's calls; a call is of these runs, each with these branches, whose captions are so long."""
    network, outputs = attached.network, list[list[Tensor]]()
    assert isinstance(network, S3DiT)
    for step, company in enumerate(calls):
        for run, _ in company:
            attached.begin_step(run, step, STEPS)
        names = [(index, name) for index, (_, each) in enumerate(company) for name in each]
        names.sort(key=lambda sample: BRANCHES.index(sample[1]))
        latents = [noise(ord(run), 4, 1, sides[step], sides[step]) + step / STEPS for run, _ in company]
        prompts = [
            Prompt([noise(ord(company[index][0]) + 100 * BRANCHES.index(name), length if name == PROMPT else 1, 12)])
            for index, name in names
        ]
        joined = network.join(list(map(size_of, latents)), network.read(prompts), [index for index, _ in names])
        with attached.call([run for run, _ in company]), branches(names):
            outputs.append(network(latents, torch.full((len(latents),), 1 - step / STEPS), joined))
    return outputs


@pytest.mark.parametrize("length", [5, 40])  # one picture for both branches, and one each
def test_company_that_comes_and_goes_changes_nothing(length: int) -> None:
    network = z_image()
    alone, company = [("a", BRANCHES)], [("a", BRANCHES), ("b", BRANCHES)]
    expected = paint(attach(network, SETTINGS), [alone] * STEPS, length)
    attached = attach(network, SETTINGS)
    mixed = [alone, company, company, alone, company, alone, alone, company, alone]
    for step, (ours, theirs) in enumerate(zip(paint(attached, mixed, length), expected, strict=True)):
        samples = (ours[0], ours[len(mixed[step])])
        for sample, wanted in zip(samples, theirs, strict=True):
            torch.testing.assert_close(sample, wanted, atol=1e-5, rtol=1e-4)
    assert attached.taken("a") == "FFTTFTTFT"


def test_a_branch_that_ends_leaves_the_other_its_ladders() -> None:
    network = z_image()
    lonely = paint(attach(network, SETTINGS), [[("a", (PROMPT,))]] * STEPS)
    attached = attach(network, SETTINGS)
    guided = paint(attached, [[("a", BRANCHES)]] * 4 + [[("a", BRANCHES[:1])]] * (STEPS - 4))
    assert attached.taken("a") == "FFTTFTTFT"
    for ours, theirs in zip(guided, lonely, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("policy", "refined"), [("taylorseer", False), ("speca", False), ("toca", True)])
def test_refiners_are_forecast_but_beside_single_tokens(policy: PolicyName, refined: bool) -> None:
    network, computed = z_image(), list[int]()
    network.get_submodule("noise_refiner.0.attention.to_q").register_forward_hook(lambda *_: computed.append(1))
    settings = {"threshold": 1e9} if policy == "speca" else {"interval": 4}
    attached = attach(network, CacheSettings.model_validate({"policy": policy, "warmup": 1, **settings}))
    paint(attached, [[("a", BRANCHES)]] * 2)
    assert attached.taken("a") == "FT" and len(computed) == 1 + refined
    attached.detach()
    original = attach(network, SETTINGS.model_copy(update={"original": True}))
    assert not any("refiner" in site for site in _painted(original).store.sites("a", PROMPT))


def test_a_picture_that_branches_see_alike_is_kept_once() -> None:
    network = z_image()
    kept = [_painted(attach(network, SETTINGS), length).store.sites("a", NEGATIVE) for length in (5, 40)]
    assert [sum("refiner" in site for site in sites) for sites in kept] == [0, 2]


def _painted(attached: Attached, length: int = 5) -> Attached:
    paint(attached, [[("a", BRANCHES)]], length)
    return attached


@given(
    st.lists(st.tuples(st.sampled_from(["together", "apart", "late"]), st.booleans()), min_size=1, max_size=9),
    st.sampled_from([None, Smoothing(method="moving_average")]),
)
def test_ladders_are_the_same_however_they_are_held(steps: list[tuple[str, bool]], smoothing: Smoothing | None) -> None:
    rule, store, oracle = Rule(order=2, smoothing=smoothing), Store(), Store()
    for step, (how, computed) in enumerate(steps):
        parts = tuple(Part("run", name, step, 9) for name in BRANCHES)
        division = SpanDivision(parts, ((3, 2), (0, 3)), (1, 5))
        feature = noise(step, 1, 5, 2)
        pieces = division.split(feature)
        if how == "late":  # the first branch steps by itself
            parts, pieces = parts[:1], pieces[:1]
        if computed or step == 0:
            for part, piece in zip(parts, pieces, strict=True):
                oracle.extend(part.run, part.branch, "site", piece, step, rule)
            if how == "together" and store.together("run", "site", division):
                store.extend("run", TOGETHER, "site", feature, step, rule, division)
                continue
            store.apart("run", "site")
            for part, piece in zip(parts, pieces, strict=True):
                store.extend(part.run, part.branch, "site", piece, step, rule)
        elif how == "together" and "site" in oracle.sites("run", NEGATIVE) and store.together("run", "site", division):
            found = store.predict("run", TOGETHER, "site", step, rule)
            wanted = [oracle.predict("run", name, "site", step, rule) for name in BRANCHES]
            assert torch.equal(found, division.join(wanted))
    assert store.bytes() == oracle.bytes()
    for name in BRANCHES:
        assert store.sites("run", name) == oracle.sites("run", name)
        for site in oracle.sites("run", name):
            ours, theirs = (each.ladder("run", name, site) for each in (store, oracle))
            assert ours.steps == theirs.steps and all(map(torch.equal, ours.tensors, theirs.tensors))
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in ours.tensors)


@pytest.mark.parametrize("strict", [False, True])
def test_ladders_begin_anew_where_branches_change_their_lengths(strict: bool) -> None:
    """Even where all of them together are as long as before."""
    rule, store = Rule(order=1), Store(strict=strict)
    for step, spans in enumerate([((0, 2), (2, 3)), ((0, 3), (3, 2))]):
        parts = tuple(Part("run", name, step, 9) for name in BRANCHES)
        division, feature = SpanDivision(parts, spans, (1, 5)), noise(step, 1, 5, 2)
        assert store.together("run", "site", division) == (step == 0)
        if step == 0:
            store.extend("run", TOGETHER, "site", feature, step, rule, division)
            continue
        for part, piece in zip(parts, division.split(feature), strict=True):
            if strict:
                with pytest.raises(RunError, match="strict_shapes: site was"):
                    store.extend(part.run, part.branch, "site", piece, step, rule)
                continue
            store.extend(part.run, part.branch, "site", piece, step, rule)
            assert store.ladder("run", part.branch, "site").steps == (step,)
    assert store.restarts == (0 if strict else 2)


@pytest.mark.parametrize("granularity", ["module", "block"])
def test_a_run_may_change_its_size(granularity: Granularity) -> None:
    attached = attach(z_image(), SETTINGS.model_copy(update={"granularity": granularity}))
    paint(attached, [[("a", BRANCHES)]] * STEPS, sides=[2 * ROWS] * 3 + [4 * ROWS] * (STEPS - 3))
    assert attached.taken("a") == "FFTFFTTFT"


def test_branches_have_one_order_alone_and_in_company() -> None:
    """By it pictures are told apart that may share a forecast step."""
    network = z_image()
    for length in (5, 40):
        alone, company = attach(network, SETTINGS), attach(network, SETTINGS)
        paint(alone, [[("a", BRANCHES)]], length)
        paint(company, [[("a", BRANCHES), ("b", BRANCHES)]], length)
        assert alone.store.branches("a") == company.store.branches("a") == company.store.branches("b")
