"""Adapters on networks: what is added, that nothing of it stays, and that rows of one batch have each their own."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gesso.adapters.apply import Adapted, Use, checked, mixing_key
from gesso.adapters.formats.deltas import Delta
from gesso.adapters.formats.places import Shape, shape_of
from gesso.adapters.formats.reading import Adapter, read_adapter
from gesso.errors import RequestError, RunError
from gesso.models.infinity.scales import ScaleSchedule
from gesso.models.s3dit.transformer import Prompt, S3DiT
from gesso.sampling.guidance import NEGATIVE, PROMPT, branches
from gesso.weights.quantize import quantize_layers
from tests import tiny_caches, tiny_infinity, tiny_sdxl
from tests.adapter_files import WORDS, AdapterFile, draw, lora, random_adapter

ROLE = "transformer"


@torch.no_grad()
def merged(network: nn.Module, uses: Sequence[Use]) -> dict[str, Tensor]:
    """The slow, obvious way: weights with everything added; call what is returned by `restore` afterwards."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for use in uses:
        for name, delta in use.adapter.parts[ROLE].items():
            weight = network.get_submodule(name).weight
            plain = before[f"{name}.weight"]
            assert isinstance(weight, Tensor)
            weight += use.strength * delta.added(plain).to(weight.dtype)
    return before


NETWORKS = {"flux": tiny_caches.flux, "qwen": tiny_caches.qwen, "hunyuan": tiny_caches.hunyuan_video}
CALLS = {"flux": tiny_caches.call_flux, "qwen": tiny_caches.call_qwen, "hunyuan": tiny_caches.call_hunyuan_video}
NETWORKS["z-image"], CALLS["z-image"] = tiny_caches.z_image, tiny_caches.call_z_image
TIMES = (0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def call(family: str, network: nn.Module, seeds: Sequence[int], times: Sequence[float]) -> Tensor:
    return CALLS[family](network, seeds, times)


@pytest.mark.parametrize("family", NETWORKS)
def test_an_adapter_equals_merged_weights_and_leaves_no_trace(family: str) -> None:
    network = NETWORKS[family]()
    adapted = Adapted({ROLE: network})
    first, second = random_adapter(network, 1), random_adapter(network, 2, rank=3)
    uses = checked([Use(first, 0.7), Use(second, -0.4)])
    plain = call(family, network, [3], [0.3])
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with adapted.using([uses]):
        found = call(family, network, [3], [0.3])
    before = merged(network, uses)
    expected = call(family, network, [3], [0.3])
    network.load_state_dict(before)
    assert not torch.allclose(plain, expected, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(call(family, network, [3], [0.3]), plain)
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("family", ["flux", "qwen", "hunyuan"])
def test_rows_of_a_batch_have_each_their_own(family: str) -> None:
    """None, one, two, and two again with other strengths; each as if it were alone."""
    network = NETWORKS[family]()
    first, second, third = (random_adapter(network, seed, rank) for seed, rank in ((1, 2), (2, 3), (3, 1)))
    company = [(), (Use(first, 0.8),), (Use(second), Use(third, 0.5)), (Use(third, -1.0), Use(first, 0.2))]
    seeds = [3, 4, 5, 6]
    adapted = Adapted({ROLE: network})
    with adapted.using(company):
        together = call(family, network, seeds, TIMES)
    for row, uses in enumerate(company):
        with adapted.using([uses]):
            alone = call(family, network, seeds[row : row + 1], TIMES[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_packed_rows_of_s3dit_and_its_negatives_have_each_their_own() -> None:
    """Every layer that a step calls: embedders, refiners, time, modulation, ends; prompts of different lengths."""
    network = tiny_caches.z_image()
    assert isinstance(network, S3DiT)
    stepping = {name: part for name, part in random_adapter(network, 1).parts[ROLE].items() if not _reads(name)}
    parts = [{name: lora(delta.shape, seed, 2) for name, delta in stepping.items()} for seed in (40, 80)]
    first, second = (Adapter("one", WORDS, {ROLE: part}) for part in parts)
    company = [(Use(first),), (Use(second, 0.5), Use(first, -0.3)), ()]
    latents = [draw(seed, 4, 1, 8, 8) for seed in (1, 2, 3)]
    contexts = network.read([_prompt(seed) for seed in (5, 6, 7, 8)])
    times, image_of = torch.tensor([0.2, 0.5, 0.8]), [0, 1, 2, 1]
    adapted = Adapted({ROLE: network})
    with torch.no_grad(), adapted.using(company):
        joined = network.join([(1, 8, 8)] * 3, contexts, image_of)
        together = network(latents, times, joined)
    for sample, image in enumerate(image_of):
        with torch.no_grad(), adapted.using([company[image]]):
            joined = network.join([(1, 8, 8)], [contexts[sample]], [0])
            (alone,) = network([latents[image]], times[image : image + 1], joined)
        torch.testing.assert_close(together[sample], alone, rtol=1e-4, atol=1e-4)
    reading = random_adapter(network, 1, only="context_refiner")
    with pytest.raises(RunError, match=r"cap_embedder|context_refiner"), adapted.using([(Use(reading),), ()]):
        network.read([_prompt(1)])


def _reads(name: str) -> bool:
    return name.startswith(("context_refiner", "cap_embedder", "siglip"))


def _prompt(seed: int) -> Prompt:
    return Prompt([draw(seed, 70 - 40 * (seed % 2), 12)])


def test_convolutions_and_doubled_rows_of_sdxl() -> None:
    """All negatives, then all prompts: rows come as often over as the pipeline has them."""
    network = tiny_sdxl.tiny_unet()
    adapted = Adapted({"unet": network})
    made = [random_adapter(network, seed) for seed in (1, 2)]
    first, second = (Adapter(each.name, WORDS, {"unet": each.parts[ROLE]}) for each in made)
    company = [(Use(first, 0.6),), (Use(second, 0.5), Use(first, 0.1))]
    rows = [0, 1, 0, 1]

    def run(which: Sequence[int]) -> Tensor:
        latent, text = draw(1, 4, 4, 8, 8)[list(which)], draw(2, 4, 5, 40)[list(which)]
        added = {"text_embeds": draw(3, 4, 20)[list(which)], "time_ids": torch.zeros(len(which), 6)}
        with torch.no_grad():
            return network(latent, torch.tensor(5.0), text, added_cond_kwargs=added, return_dict=False)[0]

    with adapted.using(company):
        together = run(range(4))
    for row, state in enumerate(rows):
        with adapted.using([company[state]]):
            torch.testing.assert_close(together[row : row + 1], run([row]), rtol=1e-4, atol=1e-4)
    with adapted.using([company[0]] * 2):
        uniform = run(range(4))
    torch.testing.assert_close(uniform[2:3], together[2:3], rtol=1e-4, atol=1e-4)
    with pytest.raises(RunError, match="3 rows by a pipeline that names 2 samples"), adapted.using(company):
        run(range(3))


def test_infinity_attends_with_its_adapters_and_names_its_rows() -> None:
    network = tiny_infinity.tiny_transformer()
    adapted = Adapted({ROLE: network})
    first, second = random_adapter(network, 1, only="self_attention"), random_adapter(network, 2, only="feed_forward")
    company = [(Use(first),), (Use(second, 0.5),)]
    schedule = ScaleSchedule(((1, 1), (2, 2)), (2, 2))

    @torch.no_grad()
    def run(rows: Sequence[int]) -> Tensor:
        text = network.read_text(draw(9, 3, 5, 16)[list(rows)])
        return network.step(None, text, schedule, 0, network.empty_cache(len(rows), schedule))

    plain = run([0])
    samples = [(0, PROMPT), (1, PROMPT), (1, NEGATIVE)]
    with adapted.using(company), branches(samples):
        together = run([0, 1, 2])
    for row, (state, _) in enumerate(samples):
        with adapted.using([company[state]]):
            torch.testing.assert_close(together[row : row + 1], run([row]), rtol=1e-4, atol=1e-4)
    before = merged(network, company[0])
    expected = run([0])
    network.load_state_dict(before)
    with adapted.using([company[0]]):
        torch.testing.assert_close(run([0]), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run([0]), plain)
    assert not torch.allclose(expected, plain)
    for only in ("key_value", "modulation"):
        reading = random_adapter(network, 3, only=only)
        with pytest.raises(RunError, match="reads prompts"), adapted.using([(Use(reading),), ()]):
            run([0, 1])


class Layers(nn.Module):
    """A linear layer and two convolutions, one of which only makes bigger steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 12)
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_the_scale_counts_once_and_a_strength_of_zero_is_none() -> None:
    network = Layers()
    delta = lora(Shape(12, 8), 1, 3, scale=0.25)
    one = Adapter("one", WORDS, {ROLE: {"linear": delta}})
    x = draw(5, 2, 8)
    with Adapted({ROLE: network}).using([[Use(one, 0.5)]]):
        found = network(x)
    up, down = delta.tensors["up"], delta.tensors["down"]
    torch.testing.assert_close(found - network(x), 0.5 * 0.25 * x @ down.T @ up.T, rtol=1e-4, atol=1e-5)
    assert checked([Use(one, 0.0)]) == ()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_and_full_differences_equal_merged_weights(strength: float) -> None:
    network = Layers()
    dora = Delta("lora", Shape(12, 8), lora(Shape(12, 8), 1, 3).tensors, 0.5, magnitude=torch.rand(12, 1) + 0.5)
    bias_O = draw(8, 5)
    conv = Delta("full", Shape(5, 3, (3, 3)), {"diff": draw(4, 5, 3, 3, 3)}, bias_O=bias_O)
    one = Adapter("one", WORDS, {ROLE: {"linear": dora, "conv": conv}})
    uses = checked([Use(one, strength)])
    x, y = draw(5, 2, 8), draw(6, 2, 3, 7, 7)
    plain = network.conv(y)
    with Adapted({ROLE: network}).using([uses]):
        found, convolved = network(x), network.conv(y)
    before = merged(network, uses)
    torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(convolved, network.conv(y) + strength * bias_O[:, None, None], rtol=1e-4, atol=1e-5)
    network.load_state_dict(before)
    assert torch.equal(network.conv(y), plain)
    assert mixing_key(uses) != ()
    with pytest.raises(RunError, match="share no batch"), Adapted({ROLE: network}).using([uses, ()]):
        pass


def test_weights_are_not_read_and_may_be_of_eight_bits_or_sixteen() -> None:
    network = Layers().to(torch.bfloat16)
    one, x = Adapter("one", WORDS, {ROLE: {"linear": lora(Shape(12, 8), 1, 3)}}), draw(5, 2, 8).to(torch.bfloat16)
    adapted = Adapted({ROLE: network})
    gain = one.parts[ROLE]["linear"].product()
    with adapted.using([[Use(one)]]):
        found = network(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), network(x).float() + x.float() @ gain.T, rtol=2e-2, atol=2e-2)
    quantize_layers(network, "8bit")
    assert shape_of(network.linear) == Shape(12, 8)
    plain = network(x)
    with Adapted({ROLE: network}).using([[Use(one)], []]):
        mixed = network(x)
    torch.testing.assert_close(mixed[0].float(), (plain[0].float() + x[0].float() @ gain.T), rtol=2e-2, atol=2e-2)
    assert torch.equal(mixed[1], plain[1])


def test_dora_on_eight_bits_measures_the_weight_that_is_multiplied_by() -> None:
    network, x = Layers(), draw(5, 2, 8)
    quantize_layers(network, "8bit")
    delta = Delta("lora", Shape(12, 8), lora(Shape(12, 8), 1, 3).tensors, magnitude=torch.rand(12, 1) + 0.5)
    one = Adapter("one", WORDS, {ROLE: {"linear": delta}})
    with Adapted({ROLE: network}).using([[Use(one)]]):
        found = network(x)
    weight = network.linear.weight
    torch.testing.assert_close(found, network(x) + x @ delta.added(weight).T, rtol=1e-4, atol=1e-5)


def test_what_overflows_for_one_does_not_reach_another() -> None:
    network = Layers().to(torch.float16)
    tensors = {"down": torch.full((1, 8), 60000.0), "up": torch.ones(12, 1)}
    loud = Adapter("loud", WORDS, {ROLE: {"linear": Delta("lora", Shape(12, 8), tensors)}})
    x = torch.ones(2, 8, dtype=torch.float16)
    plain = network(x)
    with Adapted({ROLE: network}).using([[Use(loud)], []]):
        mixed = network(x)
    assert not mixed[0].isfinite().any()
    assert torch.equal(mixed[1], plain[1])


def test_compiled_networks_have_their_adapters_too() -> None:
    network = Layers()
    network.compile(backend="eager")
    x = draw(5, 2, 8)
    one, two = (Adapter(str(seed), WORDS, {ROLE: {"linear": lora(Shape(12, 8), seed, 3)}}) for seed in (1, 2))
    plain = network(x)
    adapted = Adapted({ROLE: network})
    for each in (one, two, one):
        with adapted.using([[Use(each)]]):
            found = network(x)
        torch.testing.assert_close(found - plain, x @ each.parts[ROLE]["linear"].product().T, rtol=1e-4, atol=1e-5)
        assert torch.equal(network(x), plain)


def test_uses_are_checked_in_one_line() -> None:
    one = Adapter("one", WORDS, {})
    for strength in (float("nan"), 20.5, float("-inf")):
        with pytest.raises(RequestError, match="is not between -20 and 20; one was trained for 1"):
            checked([Use(one, strength)])
    with pytest.raises(RequestError, match='lora "one" is not named once'):
        checked([Use(one), Use(one, 0.5)])


def test_what_is_kept_for_the_next_step_can_be_let_go() -> None:
    network = Layers()
    one, two = (Adapter(str(seed), WORDS, {ROLE: {"linear": lora(Shape(12, 8), seed, 3)}}) for seed in (1, 2))
    adapted = Adapted({ROLE: network})
    for uses in ([Use(one)], [Use(two)], [Use(one)]):
        with adapted.using([uses]):
            network(draw(1, 1, 8))
    assert len(adapted._companies) == 2
    adapted.forget(one)
    assert len(adapted._companies) == 1
    with adapted.using([[Use(two)]]), pytest.raises(RunError, match="in use already"), adapted.using([[Use(one)]]):
        pass
    assert not network.linear._forward_hooks


def _bytes_of_tensors() -> int:
    """Of all tensors that there are, each storage once."""
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("form", ["samples", "several at once", "convolutions", "another dtype"])
def test_companies_keep_no_copies_of_adapters(form: str) -> None:
    """Eight adapters, one of a far larger rank, in four orders: what the setting bounds is all that they take."""
    network = nn.Conv2d(512, 512, 1) if form == "convolutions" else nn.Linear(512, 512)
    shape = shape_of(network)
    assert shape is not None
    deltas = [lora(shape, seed, 64 if seed == 0 else 4) for seed in range(8)]
    uses = [Use(Adapter(str(seed), WORDS, {ROLE: {"": delta}})) for seed, delta in enumerate(deltas)]
    own = sum(use.adapter.nbytes for use in uses)
    x = draw(1, 8, 512, 1, 1) if form == "convolutions" else draw(1, 8, 512)
    if form == "another dtype":
        network, x = network.to(torch.bfloat16), x.to(torch.bfloat16)
    adapted, before = Adapted({ROLE: network}), _bytes_of_tensors()
    for turn in range(4):
        order = uses[turn:] + uses[:turn]
        with torch.no_grad(), adapted.using([order] if form == "several at once" else [[use] for use in order]):
            network(x)
    assert _bytes_of_tensors() - before < 0.2 * own


def test_a_file_paints_as_its_weights_say(tmp_path: Path) -> None:
    """From a kohya file with fused layers to the network's output."""
    network = tiny_caches.flux()
    heads = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    file = AdapterFile(network).lora("lora_unet_double_blocks_0_img_attn_qkv", heads, alpha=1.0)
    read = read_adapter(file.write(tmp_path / "a.safetensors"), {ROLE: network})
    with Adapted({ROLE: network}).using([[Use(read, 0.5)]]):
        found = call("flux", network, [3], [0.3])
    with torch.no_grad():
        for name, gain in file.gains.items():
            file.weight(name).add_(0.5 * gain)
    torch.testing.assert_close(found, call("flux", network, [3], [0.3]), rtol=1e-4, atol=1e-4)
