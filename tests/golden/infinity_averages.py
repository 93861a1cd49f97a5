"""Infinity goldens of kind h: the moving average. The learning-rate schedules of the same kind are not yet here."""

from __future__ import annotations

import re

import torch
from torch import nn

from gesso.training.ema import ExponentialAverage
from tests.golden.comparison import Comparison
from tests.golden.side_car import Golden, NotYetError, SideCar


class AverageSideCar(SideCar):
    decay: float


def check_averages(golden: Golden, comparison: Comparison) -> None:
    """Kind h: from the parameters of each step, the averages after it. `w0` is the start of parameter `w`."""
    if "EMA" not in golden.kind:
        raise NotYetError("schedules of learning rate and weight decay")
    names = [found[1] for name in golden.tensors if (found := re.fullmatch(r"(\D+)0", name))]
    network = nn.ParameterDict({name: golden.tensor(f"{name}0").clone() for name in names})
    average = ExponentialAverage(network, golden.view(AverageSideCar).decay, warm=False)
    step = 1
    while f"ema_{names[0]}{step}" in golden.tensors:
        with torch.no_grad():
            for name in names:
                network[name].copy_(golden.tensor(f"{name}{step}"))
        average.update()
        for name in names:
            recorded = golden.tensor(f"ema_{name}{step}")
            atol = golden.tolerances.get("floats", default=0.0)
            comparison.close(f"ema_{name}{step}", average.averages[name], recorded, atol)
        step += 1
