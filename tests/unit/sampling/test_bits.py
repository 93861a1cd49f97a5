"""The thresholds for two classes against the sorting oracle, and the draws."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gesso.sampling.bits import choose_bits, exponential_noise, is_certain
from tests.oracles import filtered_logits

logit = st.floats(-30, 30, width=32)


def _kept(logits_12: Tensor, top_k: int, top_p: float) -> list[bool]:
    """Which of the two values a draw can give."""
    kept = []
    for value in (0, 1):
        noise = torch.ones(1, 1, 2)
        noise[..., 1 - value] = 1e37
        kept.append(bool(choose_bits(logits_12[None], noise, top_k, top_p)) == bool(value))
    return kept


@given(
    zero=logit,
    one=logit,
    tied=st.booleans(),
    top_k=st.sampled_from([0, 1, 2, 3, 900]),
    top_p=st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.25, 0.97]), st.floats(1e-6, 1 - 1e-6)),
)
def test_thresholds_agree_with_sorting(zero: float, one: float, tied: bool, top_k: int, top_p: float) -> None:
    logits = torch.tensor([[zero, zero if tied else one]])
    rarer = float(torch.sigmoid(-(logits[0, 1] - logits[0, 0]).abs()))
    assume(tied or abs(rarer - (1 - top_p)) > 1e-6)  # within rounding of the threshold either answer is right
    assert _kept(logits, top_k, top_p) == filtered_logits(logits, top_k, top_p).isfinite()[0].tolist()


def test_draws_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([0.0, 1.0]).expand(1, 40_000, 2)
    noise = exponential_noise(40_000, 1, torch.Generator().manual_seed(0))[None]
    share = choose_bits(logits, noise, 0, 0.0).float().mean()
    assert abs(float(share) - float(torch.tensor(1.0).sigmoid())) < 0.01


def test_a_draw_is_what_multinomial_draws() -> None:
    """One draw of torch.multinomial is argmax(p/e) with Exp(1) noise from the same generator."""
    logits = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(1))
    noise = exponential_noise(50, 8, torch.Generator().manual_seed(2))[None]
    table = logits.view(-1, 2).softmax(-1)
    drawn = torch.multinomial(table, 1, generator=torch.Generator().manual_seed(2)).view(1, 50, 8).bool()
    assert torch.equal(choose_bits(logits, noise, 0, 0.0), drawn)


def test_every_picture_of_a_batch_may_have_its_own_filters() -> None:
    logits = torch.tensor([0.0, 1.0]).expand(3, 1, 2)
    noise = torch.tensor([1e-3, 1.0]).expand(3, 1, 2)  # draws zero wherever it may
    top_k, top_p = torch.tensor([0, 1, 0]).view(3, 1, 1), torch.tensor([0.0, 0.0, 0.5]).view(3, 1, 1)
    assert choose_bits(logits, noise, top_k, top_p).flatten().tolist() == [False, True, True]
    assert is_certain(torch.ones(3, 1, 1), top_k, top_p).flatten().tolist() == [False, True, True]


def test_without_noise_the_likelier_value_is_taken() -> None:
    logits = torch.tensor([[[0.0, 0.1, 0.1, 0.0]]])
    assert choose_bits(logits, None, 0, 0.0).flatten().tolist() == [True, False]
