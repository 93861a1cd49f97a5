"""The public names, and that they cost nothing until they are used."""

import subprocess
import sys

import pytest

import gesso

NAMES = ["Engine", "GenerationRequest", "Result", "__version__", "errors", "events", "generate"]
LIBRARIES = ("diffusers", "transformers", "accelerate", "peft")
HEAVY = ("torch", "numpy", "PIL", "pydantic", "safetensors", *LIBRARIES)


def test_the_list_of_names_is_frozen() -> None:
    assert sorted(gesso.__all__) == sorted(NAMES)
    assert sorted(dir(gesso)) == sorted(NAMES)


def test_every_name_is_there() -> None:
    for name in NAMES:
        assert getattr(gesso, name) is not None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'paint'"):
        gesso.paint  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def loaded_after(code: str) -> set[str]:
    code += f"\nimport sys; print(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_gesso_loads_nothing_heavy() -> None:
    assert loaded_after("import gesso; gesso.errors") == set()


def test_the_schema_loads_pydantic_and_nothing_more() -> None:
    assert loaded_after("import gesso; gesso.GenerationRequest, gesso.Result") == {"pydantic"}


def test_models_of_our_own_load_no_library_of_models() -> None:
    code = "from gesso.engine.loading import load_planner; load_planner('infinity-nano')"
    assert not loaded_after(code) & set(LIBRARIES)
