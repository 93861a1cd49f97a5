"""diffusers' networks where diffusers, or the transformers that it imports, is not installed; and scales of latents."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gesso.models.kl_autoencoder import KLAutoencoderConfig

# What is asked for is really looked up and not found, in a process of its own.
_WITHOUT = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec.__func__
absent = sys.argv[1]
PathFinder.find_spec = classmethod(
    lambda kind, name, *rest: None if name.partition(".")[0] == absent else find(kind, name, *rest)
)

from gesso.errors import MissingError
from gesso.models.diffusers_parts import autoencoder_kl, flux_transformer

for make in (autoencoder_kl, flux_transformer):
    try:
        make()
    except MissingError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ("diffusers", "diffusers, which holds FLUX's network, is missing"),
        ("transformers", "transformers, which diffusers needs for FLUX's network, is missing"),
    ],
)
def test_what_is_missing_is_named(absent: str, said: str) -> None:
    run = subprocess.run([sys.executable, "-c", _WITHOUT, absent], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 2
    assert lines[1] == f"{said}; get it with: pip install 'gesso[diffusion]'"


@pytest.mark.parametrize(("scale", "shift"), [(float("inf"), 0.0), (0.0, 0.0), (1.0, float("nan"))])
def test_latents_are_scaled_by_numbers(scale: float, shift: float) -> None:
    with pytest.raises(ValueError, match=r"factor .* is not a finite number"):
        KLAutoencoderConfig(latent_channels=4, widths=(8,), scaling_factor=scale, shift_factor=shift)
