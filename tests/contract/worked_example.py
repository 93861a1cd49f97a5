"""The code of `docs/add-a-model.md`, taken from the page: each block that names itself in its first line.

Its modules are made under the names that they would have in the house, so that they find one another.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from gesso.pipelines.contract import Pipeline

PAGE = Path(__file__).parents[2] / "docs" / "add-a-model.md"


@cache
def blocks() -> dict[str, str]:
    """Blocks of code and of data by what their first line says they are."""
    page = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^```(?:python|toml)\n# (.+?)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return dict(found)


@cache
def module(path: str) -> ModuleType:
    """The block of that path as the module it would be."""
    name = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
    made = ModuleType(name)
    sys.modules[name] = made
    exec(compile(blocks()[path], f"{PAGE}: {path}", "exec"), made.__dict__)
    return made


def example_pipeline() -> Pipeline:
    """The page's family with random weights, strong enough that text and time show in the picture."""
    ink = module("src/gesso/pipelines/ink.py")
    torch.manual_seed(3)
    network = ink.InkNetwork(ink.InkConfig())
    return ink.InkPipeline(network=network.eval().requires_grad_(False), name="ink", digest="none")
