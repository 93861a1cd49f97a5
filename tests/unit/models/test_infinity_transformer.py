"""The transformer against itself: all at once and step by step, alone and in company, with and without padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gesso.models.infinity.transformer import InfinityTransformer, LayerGuidance, text_mask
from gesso.sampling.guidance import guide
from tests.unit.models.small_infinity import BITS, SCHEDULE, TEXT_WIDTH, drawn, small_infinity, stepped

TOKENS = SCHEDULE.tokens - 1
SWITCHES: list[dict[str, object]] = [
    {},
    {"rotary": None},
    {"rotary": "grid"},
    {"rotary": "resized"},
    {"scale_embedding_every": 1},
    {"cross_attention_scale": 0.5},
    {"depth": 1},
]


@pytest.fixture
def network() -> InfinityTransformer:
    return small_infinity()


def _at_once(network: InfinityTransformer, inputs: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
    return network(inputs, network.read_text(features, mask), network.layout(SCHEDULE))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@torch.no_grad()
def test_stepping_over_the_cache_equals_all_at_once(switches: dict[str, object]) -> None:
    network = small_infinity(**switches)
    inputs, features = drawn(2, TOKENS, BITS), drawn(2, 5, TEXT_WIDTH, seed=1)
    text = network.read_text(features)
    torch.testing.assert_close(stepped(network, inputs, text), _at_once(network, inputs, features), atol=1e-5, rtol=0)


@torch.no_grad()
def test_switches_change_the_result() -> None:
    inputs, features = drawn(1, TOKENS, BITS), drawn(1, 5, TEXT_WIDTH, seed=1)
    plain = _at_once(small_infinity(), inputs, features)
    for switches in SWITCHES[1:]:
        assert (_at_once(small_infinity(**switches), inputs, features) - plain).abs().max() > 1e-3, switches


@torch.no_grad()
def test_padding_of_text_changes_nothing(network: InfinityTransformer) -> None:
    inputs, features = drawn(2, TOKENS, BITS), drawn(2, 5, TEXT_WIDTH, seed=1)
    features[1, 3:] = 1e3  # whatever lies behind the second prompt's end
    both = _at_once(network, inputs, features, text_mask([5, 3]))
    alone = [_at_once(network, inputs[i : i + 1], features[i : i + 1, :n]) for i, n in ((0, 5), (1, 3))]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_a_batch_know_nothing_of_each_other(network: InfinityTransformer) -> None:
    inputs, features = drawn(3, TOKENS, BITS), drawn(3, 5, TEXT_WIDTH, seed=1)
    before = stepped(network, inputs, network.read_text(features))
    inputs[1], features[1] = drawn(TOKENS, BITS, seed=2), drawn(5, TEXT_WIDTH, seed=3)
    after = stepped(network, inputs, network.read_text(features))
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], atol=1e-5, rtol=0)
    assert (after[1] - before[1]).abs().max() > 1e-2


@torch.no_grad()
def test_a_scale_sees_itself_and_what_came_before(network: InfinityTransformer) -> None:
    inputs, features = drawn(1, TOKENS, BITS), drawn(1, 5, TEXT_WIDTH, seed=1)
    before = _at_once(network, inputs, features)
    changed = inputs.clone()
    changed[:, -1] += 1  # the last token of the last scale
    last = SCHEDULE.starts[-2]
    difference = (_at_once(network, changed, features) - before).abs().amax(-1)[0]
    assert difference[:last].max() == 0
    assert difference[last:].min() > 0


@torch.no_grad()
def test_dropped_text_is_the_null_text_and_the_features_stay(network: InfinityTransformer) -> None:
    features = drawn(2, 5, TEXT_WIDTH)
    before = features.clone()
    dropped = network.drop_text(features, torch.tensor([False, True]))
    assert torch.equal(dropped[0], features[0])
    assert torch.equal(dropped[1], network.null_text[:5])
    assert torch.equal(features, before)


@torch.no_grad()
def test_guidance_inside_the_last_block_equals_mixing_there(network: InfinityTransformer) -> None:
    """One scale by hand: hidden states mixed after the last block, then the head."""
    text = network.read_text(drawn(2, 5, TEXT_WIDTH))
    hidden: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        hidden.append(output)

    network.blocks[-1].register_forward_hook(keep)
    network.step(None, text, SCHEDULE, 0, network.empty_cache(2, SCHEDULE))
    mixed = guide(*hidden[0].chunk(2), scale=3.0)
    expected = network.logits(torch.cat((mixed, mixed)), text)
    inside = LayerGuidance(network.config.depth - 1, torch.tensor([[[3.0]]]))
    measured = network.step(None, text, SCHEDULE, 0, network.empty_cache(2, SCHEDULE), inside)
    torch.testing.assert_close(measured, expected)


def test_every_parameter_is_trained(network: InfinityTransformer) -> None:
    """And the null text only where a prompt was dropped."""
    inputs, features = drawn(2, TOKENS, BITS), drawn(2, 5, TEXT_WIDTH, seed=1)
    dropped = network.drop_text(features, torch.tensor([False, True]))
    _at_once(network, inputs, dropped).square().mean().backward()
    idle = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert idle == []
    assert network.null_text.grad is not None
    assert network.null_text.grad[:5].norm() > 0
    assert network.null_text.grad[5:].norm() == 0


@torch.no_grad()
def test_drop_path_only_acts_in_training() -> None:
    network = small_infinity(drop_path=0.9)
    inputs, features = drawn(1, TOKENS, BITS), drawn(1, 5, TEXT_WIDTH, seed=1)
    assert torch.equal(_at_once(network, inputs, features), _at_once(network, inputs, features))
    network.train()
    outputs = [_at_once(network, inputs, features) for _ in range(8)]
    assert any(not torch.equal(outputs[0], output) for output in outputs[1:])


def test_text_mask() -> None:
    assert text_mask([4, 4]) is None
    mask = text_mask([1, 3])
    assert mask is not None
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        small_infinity(heads=3)
