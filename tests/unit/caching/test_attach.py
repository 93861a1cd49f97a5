"""Caches on tiny networks of every class: what a run gets, alone and in company, and what is left when it is over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry, ModelHook
from peft import LoraConfig
from torch import Tensor, nn

from gesso.cache_settings import CacheSettings, Granularity, PolicyName
from gesso.caching.attach import Attached, attach
from gesso.caching.memory import expected_bytes
from gesso.caching.policy import Action
from gesso.caching.sites_layout import check, policy_for
from gesso.errors import GessoError, RequestError, RunError
from gesso.sampling.forecasts import output_is_forecast
from gesso.sampling.guidance import NEGATIVE, PROMPT, branch, branches
from tests.tiny_caches import FAMILIES, ROWS, TEXT, Call, call_flux, call_z_image, flux, hunyuan_video, z_image

STEPS = 8
POLICIES: dict[str, dict[str, Any]] = {
    "taylorseer": {"interval": 2, "order": 2, "warmup": 2},
    "lite": {"interval": 3, "warmup": 2, "order": 1},
    "residual": {"interval": 3, "warmup": 2},
    "first_block": {"warmup": 2, "threshold": 1e9, "max_skips": 2},
    "accumulated": {"warmup": 2, "threshold": 1e9, "max_skips": 2},
    "toca": {"interval": 3, "warmup": 2, "ratio": 0.25},
    "duca": {"interval": 3, "warmup": 2, "ratio": 0.25, "score": "norm"},
    "random": {"interval": 3, "warmup": 2, "ratio": 0.25},
    "clusca": {"interval": 3, "warmup": 2, "clusters": 4},
    "speca": {"warmup": 2, "threshold": 1e9, "min_skips": 1, "max_skips": 2, "order": 1},
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def time_of(step: int) -> float:
    return 1 - step / STEPS


def paint(attached: Attached, call: Call, seeds: Sequence[int], steps: Sequence[int] = range(STEPS)) -> list[Tensor]:
    """Outputs `[B,...]` of each step, of runs that step together."""
    outputs: list[Tensor] = []
    for step in steps:
        for seed in seeds:
            attached.begin_step(seed, step, STEPS, grid=(ROWS, ROWS))
        with attached.call(seeds):
            outputs.append(call(attached.network, seeds, time_of(step)))
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_runs_in_company_keep_their_own_features(policy: str, family: str) -> None:
    """Every policy on every class: full steps are the network's own, a run in company is as it is alone."""
    make, call = FAMILIES[family]
    network = make()
    settings = CacheSettings(policy=policy, **POLICIES[policy])  # pyright: ignore[reportArgumentType]
    plain = [call(network, [1, 2], time_of(step)) for step in range(STEPS)]
    attached = attach(network, settings)
    together = paint(attached, call, [1, 2])
    taken = attached.taken(1)
    assert taken == attached.taken(2) and taken.startswith("FF") and "T" in taken
    for step, kind in enumerate(taken):
        assert torch.isfinite(together[step]).all()
        if kind == "F":
            torch.testing.assert_close(together[step], plain[step], atol=1e-5, rtol=1e-4)
        else:
            assert not torch.allclose(together[step], plain[step], atol=1e-4)
    attached.detach()
    if policy not in (
        "first_block",
        "accumulated",
        "speca",
        "clusca",
    ):  # those decide for the company, or cluster by batch
        alone = attach(network, settings)
        for row, seed in enumerate((1, 2)):
            for step, output in enumerate(paint(alone, call, [seed])):
                torch.testing.assert_close(output[0], together[step][row], atol=1e-4, rtol=1e-3)
        alone.detach()
    assert torch.equal(call(network, [1, 2], time_of(0)), plain[0])
    assert not any(hasattr(module, "_diffusers_hook") or "forward" in vars(module) for module in network.modules())


def test_a_forecast_computes_no_block() -> None:
    network, called = flux(), []
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):  # pyright: ignore
        block.attn.register_forward_pre_hook(lambda *_: called.append(1))  # pyright: ignore
    cases: tuple[tuple[Granularity, int], ...] = (("trunk", 0), ("block", 0), ("module", 4))
    for granularity, per_step in cases:  # the hook runs before the wrapped forward
        attached = attach(network, CacheSettings(policy="taylorseer", granularity=granularity, interval=4, warmup=1))
        paint(attached, call_flux, [1], range(1))
        called.clear()
        paint(attached, call_flux, [1], range(1, 2))
        assert len(called) == per_step
        attached.detach()


@pytest.mark.parametrize(("policy", "fresh"), [("taylorseer", 0), ("toca", 32)])
def test_what_only_a_slot_reads_is_left_out(policy: PolicyName, fresh: int) -> None:
    """Of forecast steps: norms before attention, and before feed-forwards unless some tokens go through these."""
    network, widths = z_image(), dict[str, list[int]]()
    for name, module in network.named_modules():
        if name.startswith("layers.") and name.endswith("norm1"):
            kind = name.rpartition(".")[2]
            module.register_forward_hook(lambda *seen, kind=kind: widths.setdefault(kind, []).append(seen[2].shape[-1]))
    attached = attach(network, CacheSettings(policy=policy, granularity="module", interval=4, warmup=1))
    paint(attached, call_z_image, [1, 2], range(1))
    assert widths == {"attention_norm1": [32] * 3, "ffn_norm1": [32] * 3}
    widths.clear()
    paint(attached, call_z_image, [1, 2], range(1, 2))
    assert widths == {"attention_norm1": [0] * 3, "ffn_norm1": [fresh] * 3}
    attached.detach()


def test_one_decision_serves_all_branches_with_features_of_their_own() -> None:
    network = flux()
    attached = attach(network, CacheSettings(policy="taylorseer", interval=3, warmup=1, order=0))
    plain = {name: call_flux(network, [seed], time_of(0)) for name, seed in (("prompt", 1), (NEGATIVE, 9))}
    outputs: dict[str, Tensor] = {}
    for step in range(2):
        decision = attached.begin_step("run", step, STEPS)
        assert attached.begin_step("run", step, STEPS) is decision
        with attached.call(["run"]):
            outputs = {"prompt": call_flux(network, [1], time_of(step))}
            with branch(NEGATIVE):
                outputs[NEGATIVE] = call_flux(network, [9], time_of(step))
    assert attached.taken("run") == "FT"
    held = [attached.store.ladder("run", name, "transformer_blocks.0.ff").factors[0] for name in ("prompt", NEGATIVE)]
    assert not torch.allclose(held[0], held[1])
    assert not any(torch.allclose(outputs[name], plain[name]) for name in plain)


def test_a_branch_that_begins_late_is_computed_first() -> None:
    network = flux()
    attached = attach(network, CacheSettings(policy="lite", interval=4, warmup=1))
    paint(attached, call_flux, [1], range(1))
    attached.begin_step(1, 1, STEPS)
    with attached.call([1]):
        call_flux(network, [1], time_of(1))
        with branch(NEGATIVE):
            late = call_flux(network, [1], time_of(1))
    torch.testing.assert_close(late, call_flux(network, [1], time_of(1)))
    assert attached.taken(1) == "FF"


def test_a_late_branch_is_no_full_step_to_a_policy_that_counts_them() -> None:
    settings = CacheSettings(policy="first_block", warmup=1, threshold=1e9, max_skips=2)
    attached = attach(flux(), settings)
    paint(attached, call_flux, [1], range(1))
    attached.begin_step(1, 1, STEPS)
    with attached.call([1]):
        call_flux(attached.network, [1], time_of(1))
        with branch(NEGATIVE):
            call_flux(attached.network, [1], time_of(1))
    paint(attached, call_flux, [1], range(2, 4))
    assert attached.taken(1) == "FFTF"  # the prompt was forecast twice in a row


@pytest.mark.parametrize(("granularity", "expected"), [("trunk", [False, True, False]), ("module", [False] * 3)])
def test_it_is_foretold_where_nothing_of_a_branch_will_be_read(granularity: Granularity, expected: list[bool]) -> None:
    """Of a branch that was computed, in forecast steps, where the whole output is forecast; and it may be relied on."""
    network = flux()
    attached = attach(network, CacheSettings(policy="taylorseer", granularity=granularity, interval=2, warmup=1))
    told: list[bool] = []
    for step in range(3):
        attached.begin_step("run", step, STEPS)
        with attached.call(["run"]):
            told.append(output_is_forecast(PROMPT))
            assert not output_is_forecast(NEGATIVE)  # never computed
            call_flux(network, [1], time_of(step))
    assert told == expected and not output_is_forecast(PROMPT)
    if granularity == "trunk":
        attached.begin_step("run", 3, STEPS)
        with attached.call(["run"]):
            assert output_is_forecast(PROMPT)
            with pytest.raises(RunError, match="inputs of a step cache changed within a step"):
                call_flux(network, [1, 2], time_of(3))


def test_first_blocks_have_thresholds_of_their_family() -> None:
    found = [policy_for(make(), CacheSettings(policy="first_block")).settings for make in (flux, hunyuan_video)]
    assert [settings.threshold for settings in found] == [0.08, 0.06]


def test_packed_branches_of_one_call() -> None:
    """Prompts of all states, then negatives of some, as Z-Image packs them."""
    network = z_image()
    attached = attach(network, CacheSettings(policy="taylorseer", interval=3, warmup=1, order=0))
    for step in range(2):
        for run in "ab":
            attached.begin_step(run, step, STEPS)
        with attached.call(["a", "b"]), branches([(0, "prompt"), (1, "prompt"), (1, NEGATIVE)]):
            call_z_image(network, [1, 2, 3], time_of(step))
    assert attached.store.sites("a", NEGATIVE) == () and attached.store.sites("b", NEGATIVE) != ()
    with pytest.raises(RunError, match="3 samples where the pipeline names 2"), attached.call(["a", "b"]):
        call_z_image(network, [1, 2, 3], time_of(2))


def test_company_may_change_between_steps() -> None:
    """Two runs at different steps of their own share calls while their decisions agree."""
    network = flux()
    attached = attach(network, CacheSettings(policy="taylorseer", interval=3, warmup=2, order=1))
    alone = attach(network, CacheSettings(policy="taylorseer", interval=3, warmup=2, order=1))
    expected = {seed: paint(alone, call_flux, [seed]) for seed in (1, 2)}
    paint(attached, call_flux, [1], range(4))  # F F T T, and then F
    steps = {1: 4, 2: 0}
    while any(step < STEPS for step in steps.values()):
        running = [seed for seed, step in steps.items() if step < STEPS]
        decisions = {seed: attached.begin_step(seed, steps[seed], STEPS) for seed in running}
        group = [seed for seed in running if decisions[seed] == decisions[running[0]]]
        with attached.call(group):
            output = call_flux(network, group, [time_of(steps[seed]) for seed in group])
        for row, seed in enumerate(group):
            torch.testing.assert_close(output[row], expected[seed][steps[seed]][0], atol=1e-4, rtol=1e-3)
            steps[seed] += 1


def test_nothing_is_left_of_a_run_that_is_cancelled_or_fails() -> None:
    network = flux()
    attached = attach(network, CacheSettings(policy="toca", interval=3, warmup=1))
    paint(attached, call_flux, [1, 2], range(2))
    assert attached.store.bytes() > attached.store.bytes(1) > 0
    attached.begin_step(1, 2, STEPS)
    with pytest.raises(RuntimeError), attached.call([1]):
        network(hidden_states=torch.zeros(1, 3, 3))
    attached.free(1)
    attached.free(1)
    assert attached.runs == (2,) and attached.store.runs == (2,) and attached.store.bytes(1) == 0
    attached.free(2)
    assert attached.store.bytes() == 0 and attached.runs == ()
    torch.testing.assert_close(call_flux(network, [1], 1.0), call_flux(flux(), [1], 1.0), atol=0, rtol=0)


def test_a_run_that_goes_back_begins_anew() -> None:
    attached = attach(flux(), CacheSettings(policy="lite", interval=3, warmup=1))
    first = paint(attached, call_flux, [1])
    second = paint(attached, call_flux, [1])
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_inputs_of_another_shape_are_computed() -> None:
    network = flux()
    attached = attach(network, CacheSettings(policy="taylorseer", interval=3, warmup=1))
    strict = attach(network, CacheSettings(policy="taylorseer", interval=3, warmup=1, strict_shapes=True))
    for cache in (attached, strict):
        cache.begin_step("run", 0, STEPS)
        with cache.call(["run"]):
            call_flux(network, [1], time_of(0))
        cache.begin_step("run", 1, STEPS)
    with attached.call(["run"]):
        output = call_flux(network, [1, 2], time_of(1))  # two rows of one run
    assert attached.taken("run") == "FF"
    torch.testing.assert_close(output, call_flux(network, [1, 2], time_of(1)))
    assert attached.store.restarts > 0
    with pytest.raises(RunError, match="strict_shapes"), strict.call(["run"]):
        call_flux(network, [1, 2], time_of(1))


def test_speculation_computes_a_refused_step_at_once() -> None:
    network = flux()
    settings = CacheSettings(policy="speca", warmup=1, threshold=1e-6, floor=0, min_skips=1, order=0)
    attached = attach(network, settings)
    outputs = paint(attached, call_flux, [1], range(4))
    assert attached.taken(1) == "FTFT"  # the check comes after one forecast, and fails
    assert set(attached.measured(1)) == {2}
    torch.testing.assert_close(outputs[2], call_flux(network, [1], time_of(2)))


def test_a_probe_decides_within_the_step() -> None:
    attached = attach(flux(), CacheSettings(policy="first_block", warmup=1, threshold=1e9, max_skips=2))
    assert attached.begin_step(1, 0, STEPS).action is Action.COMPUTE
    paint(attached, call_flux, [1])
    assert attached.taken(1) == "FTTFTTFT"
    attached.detach()
    attached = attach(flux(), CacheSettings(policy="first_block", warmup=1, threshold=1e-9))
    paint(attached, call_flux, [1])
    assert attached.taken(1) == "F" * STEPS


@pytest.mark.parametrize("granularity", ["module", "block", "trunk"])
def test_bytes_are_known_beforehand(granularity: Granularity) -> None:
    for make, call, output in (
        (flux, call_flux, (ROWS * ROWS, 8)),
        (z_image, call_z_image, (4, 1, 2 * ROWS, 2 * ROWS)),
    ):
        network = make()
        settings = CacheSettings(policy="taylorseer", granularity=granularity, order=1, interval=2, warmup=2)
        attached = attach(network, settings)
        paint(attached, call, [1], range(4))
        tokens = {"image_tokens": 16, "text_tokens": TEXT} if make is flux else {"image_tokens": 32, "text_tokens": 32}
        known = expected_bytes(network, settings, **tokens, output=output, branches=1, dtype=torch.float32)
        assert attached.store.bytes(1) == known
        attached.detach()


def test_what_is_kept_may_be_rounded_and_put_elsewhere() -> None:
    settings = CacheSettings(policy="taylorseer", interval=3, warmup=1, store_dtype="bfloat16", offload=True)
    network = flux()
    rounded, exact = attach(network, settings), attach(network, settings.model_copy(update={"store_dtype": None}))
    outputs = [paint(cache, call_flux, [1], range(2))[1] for cache in (rounded, exact)]
    assert 2 * rounded.store.bytes() == exact.store.bytes()
    assert outputs[0].dtype == torch.float32
    torch.testing.assert_close(*outputs, atol=0.05, rtol=0.05)


def test_several_caches_and_other_hooks_on_one_network_come_off_in_any_order() -> None:
    """diffusers 0.42.1 loses a later hook's forward where an earlier one is taken off first."""

    class Doubling(ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return 2 * self.fn_ref.original_forward(*args, **kwargs)  # pyright: ignore

    network = flux()
    plain = call_flux(network, [1], 0.5)
    first = attach(network, CacheSettings(policy="taylorseer"))
    module = network.get_submodule("transformer_blocks.0.ff")
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Doubling(), "doubling")
    second = attach(network, CacheSettings(policy="taylorseer", interval=2, warmup=1))
    doubled = call_flux(network, [1], 0.5)
    assert not torch.allclose(plain, doubled)
    first.detach()
    assert torch.equal(call_flux(network, [1], 0.5), doubled)
    paint(second, call_flux, [1])
    assert second.taken(1) == "FTFTFTFT"
    second.detach()
    assert torch.equal(call_flux(network, [1], 0.5), doubled)
    HookRegistry.check_if_exists_or_initialize(module).remove_hook("doubling")
    assert torch.equal(call_flux(network, [1], 0.5), plain)


def test_what_does_not_fit_is_refused_before_the_first_step() -> None:
    with pytest.raises(RequestError, match="network that step caches know"):
        attach(nn.Linear(2, 2), CacheSettings(policy="lite"))
    network = flux()
    del network.transformer_blocks[0].ff_context, network.transformer_blocks[1].ff_context  # pyright: ignore
    with pytest.raises(RequestError, match=r"ff_context.* is not the name of a module"):
        attach(network, CacheSettings(policy="taylorseer"))
    assert not any(hasattr(module, "_diffusers_hook") for module in network.modules())
    with pytest.raises(RequestError, match=r"cache\.mask 3 is not one value for each of 8 steps"):
        check(flux(), CacheSettings(policy="lite", mask=(True, False, True)), STEPS)
    with pytest.raises(RequestError, match=r"cache\.order 3 is not at most 1"):
        check(flux(), CacheSettings(policy="taylorseer", order=3, interval=6, warmup=1), STEPS)
    with pytest.raises(RequestError, match=r"cache\.front_blocks 4 is not below the 4 blocks"):
        check(flux(), CacheSettings(policy="residual", front_blocks=4), STEPS)
    attached = attach(flux(), CacheSettings(policy="taylorseer", interval=2, warmup=1))
    attached.begin_step(1, 0, STEPS)
    attached.begin_step(2, 1, STEPS)
    with pytest.raises(GessoError, match="one decision"), attached.call([1, 2]):
        pass


def test_video_forecasts_the_trunk_unless_told_otherwise() -> None:
    make, _ = FAMILIES["hunyuan_video"]
    assert check(make(), CacheSettings(policy="taylorseer"), STEPS).settings.granularity == "trunk"
    assert check(flux(), CacheSettings(policy="taylorseer"), STEPS).settings.granularity == "module"


def _same_as_plain(network: nn.Module, settings: CacheSettings) -> None:
    expected = paint(attach(flux(), settings), call_flux, [1], range(5))
    attached = attach(network, settings)
    for output, wanted in zip(paint(attached, call_flux, [1], range(5)), expected, strict=True):
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-4)
    attached.detach()


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_blocks_paint_the_same(policy: PolicyName) -> None:
    torch.compiler.reset()  # else what earlier tests compiled counts towards its limit
    network = flux()
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):  # pyright: ignore
        block.compile(backend="eager")  # pyright: ignore
    _same_as_plain(network, CacheSettings(policy=policy, **POLICIES[policy]))


def test_scores_are_seen_in_compiled_blocks() -> None:
    torch.compiler.reset()
    network = flux()
    network.transformer_blocks[0].compile(backend="eager")  # pyright: ignore
    attached = attach(network, CacheSettings(policy="toca", interval=2, warmup=1))
    paint(attached, call_flux, [1], range(1))
    score = attached.store.get(1, PROMPT, "transformer_blocks.0:score:image")
    assert score is not None and score.shape == (1, ROWS * ROWS)


def test_offloaded_modules_come_when_they_are_called() -> None:
    network, device = flux(), torch.device("cpu")
    apply_group_offloading(network, onload_device=device, offload_device=device, offload_type="leaf_level")
    settings = CacheSettings(policy="taylorseer", granularity="block", interval=3, warmup=1, order=0)
    _same_as_plain(network, settings)


def test_over_an_adapter_the_adapters_outputs_are_kept() -> None:
    network = flux()
    plain = call_flux(network, [1], time_of(0))
    with torch.inference_mode(False):
        adapter = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["proj_out", "to_q"])
        network.add_adapter(adapter)  # pyright: ignore[reportCallIssue]
    attached = attach(network, CacheSettings(policy="taylorseer", interval=3, warmup=1, order=0))
    first, second = paint(attached, call_flux, [1], range(2))
    assert not torch.allclose(first, plain)
    assert torch.equal(first, call_flux(network, [1], time_of(0))) and not torch.equal(first, second)
