"""Schedules of published flow models: what is read of a configuration, and what is refused by name and value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gesso.errors import FileError
from gesso.sampling.flow import FlowSchedule
from gesso.weights.flow_schedule import StretchedSchedule, read_schedule

CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.36.0"}


def _folder(folder: Path, values: dict[str, object]) -> Path:
    (folder / "scheduler_config.json").write_text(json.dumps(CLASS | values), encoding="utf-8")
    return folder


def test_what_diffusers_writes_is_read(tmp_path: Path) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=0.9).save_pretrained(tmp_path)
    assert read_schedule(tmp_path) == FlowSchedule(shift=3.0, use_dynamic_shifting=True, max_shift=0.9)


def test_what_is_absent_is_as_in_diffusers(tmp_path: Path) -> None:
    assert read_schedule(_folder(tmp_path, {})) == FlowSchedule()


def test_an_end_above_zero_where_a_family_has_one(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"shift_terminal": 0.02})
    assert read_schedule(folder, StretchedSchedule) == StretchedSchedule(shift_terminal=0.02)
    assert read_schedule(_folder(tmp_path, {}), StretchedSchedule) == StretchedSchedule(shift_terminal=None)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"shift": "x"}, 'shift "x" is not a number from 0.001 to 1000'),
        ({"shift": 0}, "shift 0 is not"),
        ({"shift": True}, "shift true is not"),
        ({"shift": float("nan")}, "shift NaN is not"),
        ({"base_shift": "x"}, 'base_shift "x" is not'),
        ({"max_shift": None}, "max_shift null is not a number"),
        ({"max_shift": float("inf")}, "max_shift Infinity is not"),
        ({"base_image_seq_len": 256.5}, "base_image_seq_len 256.5 is not a whole number"),
        ({"max_image_seq_len": 256}, "max_image_seq_len 256 is not above base_image_seq_len 256"),
        ({"max_image_seq_len": 257}, "max_shift 1.15 at 257 are too steep for pictures of 1 to 65536 tokens"),
        ({"use_dynamic_shifting": "yes"}, 'use_dynamic_shifting "yes" is not true or false'),
        ({"num_train_timesteps": "x"}, 'num_train_timesteps "x" is not 1000'),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500 is not 1000"),
        ({"shift_terminal": 0.1}, "shift_terminal 0.1 is not null"),
        ({"time_shift_type": "linear"}, 'time_shift_type "linear" is not "exponential"'),
        ({"invert_sigmas": True}, "invert_sigmas true is not false"),
        ({"invert_sigmas": 0}, "invert_sigmas 0 is not false"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas true"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas true"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas true"),
        ({"stochastic_sampling": True}, "stochastic_sampling true"),
        ({"colour": 3}, "unknown fields: colour"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, values: dict[str, object], problem: str) -> None:
    with pytest.raises(FileError) as caught:
        read_schedule(_folder(tmp_path, values))
    assert problem in str(caught.value)
    assert "scheduler_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
