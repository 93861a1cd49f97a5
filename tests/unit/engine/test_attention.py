"""Which attention there is: what is refused, before weights are read, and what the refusal says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gesso
from gesso.engine import attention
from gesso.engine.acceleration import Acceleration, check_compiler
from gesso.engine.attention import BACKENDS, NAMES, Package
from gesso.engine.device import check_device
from gesso.engine.loading import load_pipeline
from gesso.errors import MissingError, RequestError


@pytest.fixture
def any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this device were a GPU that every kernel runs on."""
    monkeypatch.setattr(attention, "_hardware", lambda backend, device: "")


def test_an_unknown_one_lists_those_that_there_are() -> None:
    listed = r"is not an attention kernel; cpu has sdpa, math, flex \(with --compile\); cudnn, flash, sage need an"
    with pytest.raises(RequestError, match=listed):
        attention.check_name("fash", "cpu")
    with pytest.raises(RequestError, match=listed):
        attention.check("native", "cpu")
    with pytest.raises(RequestError, match=r"is not an attention kernel; (cpu|cuda) has sdpa, math"):
        gesso.Engine(attention="fash")


@pytest.mark.parametrize("name", ["cudnn", "flash", "flash3", "sage"])
def test_what_needs_a_gpu_is_refused_on_the_cpu(name: str) -> None:
    with pytest.raises(RequestError, match=rf'"{name}" is not usable on cpu; it needs an NVIDIA GPU.*; cpu has sdpa,'):
        attention.check(name, "cpu")
    with pytest.raises(RequestError, match="usable on mps"):
        attention.check(name, "mps")


def test_what_is_refused_is_refused_before_weights_are_read(tiny_infinity: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_infinity, tmp_path / "model")
    for weights in model.glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    with pytest.raises(RequestError, match="usable on cpu"):
        load_pipeline(str(model), "cpu", acceleration=Acceleration(attention="flash"))


def test_flex_is_for_what_is_compiled() -> None:
    with pytest.raises(RequestError, match=r"usable without compiling; .* give --compile"):
        attention.check("flex", "cpu")
    assert attention.check("flex", "cpu", compiled=True).name == "flex"
    with pytest.raises(RequestError, match="it needs the CPU or an NVIDIA GPU"):
        attention.check("flex", "mps", compiled=True)


@pytest.mark.usefixtures("any_gpu")
def test_halves_are_not_given_float32() -> None:
    with pytest.raises(RequestError, match=r"usable in float32; give --dtype bfloat16"):
        attention.check("cudnn", "cpu", torch.float32)
    assert attention.check("cudnn", "cpu", torch.bfloat16).name == "cudnn"
    assert attention.check("cudnn", "cpu").name == "cudnn"  # the dtype is the model's, and known later


@pytest.mark.usefixtures("any_gpu")
@pytest.mark.parametrize("name", ["flash", "flash3", "sage"])
def test_what_can_be_installed_says_how(name: str) -> None:
    with pytest.raises(MissingError, match=rf'which attention "{name}" needs \(cpu has .*get it with: pip install'):
        attention.check(name, "cpu", torch.bfloat16)


def test_versions_count() -> None:
    def package(least: tuple[int, ...]) -> Package:
        return Package(module="torch", name="torch", least=least, command="")

    assert package((2, 0, 1)).is_installed()
    assert not package((99,)).is_installed()
    assert not Package(module="torch", name="no-such-distribution", least=(1,), command="").is_installed()


def test_the_report_names_each_once() -> None:
    report = dict(attention.report("cpu"))
    assert tuple(report) == NAMES == tuple(backend.name for backend in BACKENDS)
    assert report["sdpa"].endswith("the default")
    assert "pip install flash-attn" in report["flash"]


def test_without_a_compiler_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingError, match=r"CXX=no-such-compiler, a C\+\+ compiler, which --compile needs"):
        check_compiler("cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingError, match=r"get it with: (apt install g|xcode-select)"):
        Acceleration(compile=True).check("cpu")


@pytest.mark.parametrize("device", ["cuda:77", "mps"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    with pytest.raises(RequestError, match=rf'"{device}" is not a device of this machine; there (is|are) cpu'):
        check_device(device)
    with pytest.raises(RequestError, match="a device of this machine"):
        load_pipeline("infinity-nano", device)
    assert check_device("cpu") == "cpu"


def test_looking_up_names_loads_nothing_heavy() -> None:
    code = "import sys, gesso.engine.attention, gesso.engine.acceleration as a; a.Acceleration(attention='flash')"
    code += "; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
