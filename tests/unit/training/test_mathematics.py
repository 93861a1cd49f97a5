"""Averages, learning rates, weight decay and the loss, each against its rule written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gesso.models.infinity.scales import schedule
from gesso.models.infinity.transformer import InfinityTransformer
from gesso.training.ema import ExponentialAverage
from gesso.training.infinity_loss import bitwise_loss, scale_weights, token_losses
from gesso.training.loop import parameter_groups
from gesso.training.schedules import warmup_cosine
from tests.tiny_infinity import NETWORK, SQUARE, tiny_tokenizer, tiny_word_encoder

# ---- averages (the recorded ones are a golden of kind h) ------------------------------------------------------------


def _moved(network: nn.Linear, value: float) -> None:
    with torch.no_grad():
        network.weight.fill_(value)


@pytest.mark.parametrize("warm", [False, True])
def test_the_average_follows_its_rule(warm: bool) -> None:
    network = nn.Linear(1, 1, bias=False)
    _moved(network, 1.0)
    average, expected = ExponentialAverage(network, 0.9, warm=warm), 1.0
    for updates, value in enumerate((2.0, -1.0, 4.0, 4.0)):
        _moved(network, value)
        average.update()
        decay = min(0.9, (1 + updates) / (10 + updates)) if warm else 0.9
        expected = decay * expected + (1 - decay) * value
        assert float(average.averages["weight"]) == pytest.approx(expected)
    assert float(network.weight.detach()) == 4.0


def test_averages_are_swapped_in_and_out_even_on_failure() -> None:
    network = nn.Linear(1, 1, bias=False)
    _moved(network, 1.0)
    average = ExponentialAverage(network, 0.5, warm=False)
    _moved(network, 3.0)
    average.update()

    def fail_inside() -> None:
        with average.swapped_in():
            assert float(network.weight.detach()) == 2.0
            assert torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert float(network.weight.detach()) == 3.0
    assert float(average.averages["weight"]) == 2.0


def test_averages_come_back_from_their_state() -> None:
    network = nn.Linear(2, 2)
    average = ExponentialAverage(network, 0.5)
    average.update()
    copy = ExponentialAverage(nn.Linear(2, 2), 0.5)
    copy.load(average.state())
    assert copy.updates == 1
    assert all(torch.equal(copy.averages[name], value) for name, value in average.averages.items())


# ---- learning rates -------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 10_000), warmup=st.integers(0, 1000), final=st.floats(0, 1), data=st.data())
def test_rates_rise_then_fall(steps: int, warmup: int, final: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps - 1))
    here, after = (warmup_cosine(at, steps=steps, warmup=warmup, final=final) for at in (step, step + 1))
    assert 0 < here <= 1 or (final == 0 and here >= 0)
    if step + 1 < warmup:
        assert after > here
    elif step >= warmup:
        assert here >= after >= final - 1e-12
    if step < warmup:
        assert here == (step + 1) / warmup


def test_rates_at_the_turning_points() -> None:
    rates = [warmup_cosine(step, steps=10, warmup=2, final=0.1) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.55)
    assert rates[10] == rates[11] == pytest.approx(0.1)
    assert warmup_cosine(0, steps=1, warmup=0, final=0.5) == 1.0


# ---- weight decay ---------------------------------------------------------------------------------------------------


def _decayed(network: nn.Module) -> tuple[set[str], set[str]]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    found = [[names[id(parameter)] for parameter in group["params"]] for group in groups]  # type: ignore[attr-defined]
    assert len(found[0]) + len(found[1]) == len(names)
    return set(found[0]), set(found[1])


def test_only_matrices_of_layers_decay() -> None:
    """Every weight of a linear layer or convolution but the embedding of codes; nothing else."""
    parts = {"transformer": InfinityTransformer(NETWORK), "tokenizer": tiny_tokenizer(), "text": tiny_word_encoder()}
    network = nn.ModuleDict(parts)
    layers = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    decayed, others = _decayed(network)
    assert decayed == layers - {"transformer.code_embedding.weight"}
    named = ("null_text", "start", "pool.query", "blocks.0.modulation", "blocks.0.self_attention.log_scale")
    assert {f"transformer.{name}" for name in named} <= others
    assert {"text.word_embedding.weight", "text.position_embedding.weight", "text.norm.weight"} <= others


# ---- loss (the recorded one is a golden of kind d) ------------------------------------------------------------------


def test_the_loss_is_two_way_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 6, generator=generator)
    labels = torch.rand(2, 5, 3, generator=generator) > 0.5
    expected = nn.functional.cross_entropy(logits.view(-1, 2), labels.view(-1).long(), reduction="none").view(2, 5, 3)
    torch.testing.assert_close(token_losses(logits, labels), expected.mean(-1))
    torch.testing.assert_close(bitwise_loss(logits, labels), expected.mean())
    weights = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
    torch.testing.assert_close(bitwise_loss(logits, labels, weights), (expected.mean(-1) * weights).sum(-1).mean())


def test_knowing_nothing_costs_log_two() -> None:
    loss = bitwise_loss(torch.zeros(1, SQUARE.tokens, 16), torch.ones(1, SQUARE.tokens, 8, dtype=torch.bool))
    assert float(loss) == pytest.approx(math.log(2))


@pytest.mark.parametrize("scales", [SQUARE, schedule("1.000", "0.06M"), schedule("0.666", "0.06M")])
def test_scales_weigh_as_the_root_of_their_tokens(scales: object) -> None:
    assert isinstance(scales, type(SQUARE))
    weights = scale_weights(scales)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    sums = [float(part.sum()) for part in weights.split([height * width for height, width in scales.grids])]
    assert sums[1] / sums[0] == pytest.approx(math.sqrt(scales.grids[1][0] * scales.grids[1][1]), rel=1e-4)
    assert (weights > 0).all()
