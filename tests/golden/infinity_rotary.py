"""Infinity goldens of kind f: rotary positions, tables and their use."""

from __future__ import annotations

import re

from torch import Tensor

from gesso.models.infinity.rotary import RotaryMode, positions, rotary_table, rotate, turns
from gesso.models.infinity.scales import TEMPLATES, ScaleSchedule, schedule
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar, view

MODES: dict[int, RotaryMode] = {0: "grid", 1: "resized", 2: "normalized"}
_LARGEST = "1M"  # lower resolutions are a prefix of it, and positions are measured on its final grid whatever is made


class Template(SideCar):
    seq_len_1M: int
    final_grid: tuple[int, int]


class PaddedLength(SideCar):
    h: float
    pad: int
    length: int


def check_rotary(golden: Golden, comparison: Comparison) -> None:
    """Kind f: every index table, every cosine and sine table of any mode, every application."""
    atol = golden.tolerances.get("floats", default=1e-5)
    for name, recorded in golden.tensors.items():
        if found := re.fullmatch(r"index\.h([\d.]+)", name):
            comparison.equal(name, positions(_schedule(found[1]))[: len(recorded)], recorded)
        elif found := re.fullmatch(r"table\.dim(\d+)\.h([\d.]+?)\.mode(\d)(\..+)?", name):
            table = rotary_table(_schedule(found[2]), int(found[1]), mode(int(found[3])))
            comparison.close(name, table[:, : recorded.shape[1]], recorded, atol)
        elif found := re.fullmatch(r"apply\.h([\d.]+)\.scale(\d+)\.(\w+)_rot", name):
            before = golden.tensor(name.removesuffix("_rot"))
            comparison.close(name, _applied(before, _schedule(found[1]), int(found[2])), recorded, atol)
    templates = golden.data.get("templates")
    for name, stated in templates.items() if isinstance(templates, dict) else ():
        _check_template(comparison, str(name), stated)


def mode(flag: int) -> RotaryMode:
    """The product's name of a published rotary flag."""
    if flag not in MODES:
        raise NotYetError(f"rotary mode {flag}")
    return MODES[flag]


def _applied(before: Tensor, scales: ScaleSchedule, scale: int) -> Tensor:
    table = rotary_table(scales, before.shape[-1])
    turned = rotate(
        before.transpose(1, 2)[:, :, None], turns(table[:, scales.starts[scale] : scales.starts[scale + 1]])
    )
    return turned[:, :, 0].transpose(1, 2)


def _schedule(template: str) -> ScaleSchedule:
    if template not in TEMPLATES:
        raise BrokenGoldenError(f"there is no template {template}")
    return schedule(template, _LARGEST)


def _check_template(comparison: Comparison, name: str, stated: object) -> None:
    if name in TEMPLATES:
        template = view(stated, Template, f"templates.{name}.")
        scales = schedule(name, _LARGEST)
        comparison.true(f"{name} final grid", scales.final_grid == template.final_grid, f"{scales.final_grid}")
        comparison.true(f"{name} tokens", scales.tokens == template.seq_len_1M, f"{scales.tokens}")
        return
    padded = view(stated, PaddedLength, f"templates.{name}.")  # the product never pads; its length is what is padded
    tokens = _schedule(f"{padded.h:.3f}").tokens
    comparison.true(name, -(-tokens // padded.pad) * padded.pad == padded.length, f"{tokens} tokens")
