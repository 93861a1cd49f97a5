"""Names of devices: written in one module alone, and read with one clear line where they are wrong."""

import ast
import re
from pathlib import Path

import pytest

import gesso
from gesso.devices import check_dtype, check_name, kind_of
from gesso.errors import RequestError

SOURCES = Path(gesso.__file__).parent
NAME = re.compile(r"(cpu|cuda|mps|meta|xpu)(:\d*)?")


def names_in(path: Path) -> list[str]:
    """Strings that are a device's name, with their lines; docstrings are longer, and comments are no strings."""
    constants = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    return [
        f"{path.relative_to(SOURCES)}:{node.lineno} {node.value!r}"
        for node in constants
        if isinstance(node.value, str) and NAME.fullmatch(node.value)
    ]


def test_no_module_but_one_names_a_device() -> None:
    assert names_in(SOURCES / "devices.py")
    found = [name for path in sorted(SOURCES.rglob("*.py")) for name in names_in(path)]
    assert not [name for name in found if not name.startswith("devices.py:")], "take it from gesso.devices"


def test_generators_of_random_numbers_are_on_the_cpu() -> None:
    for path in SOURCES.rglob("*.py"):
        found = [line for line in path.read_text().splitlines() if re.search(r"torch\.Generator\([^)]", line)]
        assert not found, f"{path}: a picture depends on its seed, never on the device"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "", "CUDA"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="one of: cpu, cuda, cuda:1, mps"):
        check_name(name)
    with pytest.raises(RequestError, match="one of: float32"):
        check_dtype(name)


def test_kinds() -> None:
    assert [kind_of(check_name(name)) for name in ("cpu", "cuda", "cuda:12", "mps")] == ["cpu", "cuda", "cuda", "mps"]
