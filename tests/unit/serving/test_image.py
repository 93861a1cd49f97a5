"""Files that images are built from agree with each other, the catalogue and the package. Nothing is built here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gesso import __version__
from gesso.weights.catalogue import find

yaml = pytest.importorskip("yaml", reason="comes with gesso[diffusion]")

PREDICTOR = Path(__file__).parents[3] / "docker" / "sdxl"
CATALOGUE = ("illustrious-xl", "sdxl", "sdxl-refiner", "stable-diffusion-safety-checker")


def pulls(text: str) -> dict[str, list[str]]:
    """Models that are pulled, and at which revisions."""
    return {
        name: re.findall(r"--revision (\S+)", words)
        for name, words in re.findall(r"gesso models pull (\S+)((?: --revision \S+)*)", re.sub(r"[\\\s]+", " ", text))
    }


def test_both_ways_to_an_image_pull_the_same() -> None:
    dockerfile = (PREDICTOR / "Dockerfile").read_text(encoding="utf-8")
    for name, value in re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.MULTILINE):
        dockerfile = re.sub(rf"\${name}\b", value, dockerfile)
    cog: dict[str, Any] = yaml.safe_load((PREDICTOR / "cog.yaml").read_text(encoding="utf-8"))
    wanted = pulls(dockerfile)
    assert pulls("\n".join(cog["build"]["run"])) == wanted
    assert tuple(wanted) == CATALOGUE
    for name, revisions in wanted.items():
        repositories = {source.repository for source in find(name).sources}
        assert {each.partition("=")[0] for each in revisions if "=" in each} in (repositories, set())
        assert all(re.fullmatch(r"[0-9a-f]{40}|refs/pr/\d+", each.rpartition("=")[2]) for each in revisions)
        assert len(revisions) == len(repositories)
    (digest,) = set(re.findall(r"\b[0-9a-f]{64}\b", dockerfile))  # of what is at no commit
    assert digest in cog["build"]["run"][-1]
    assert cog["run"] == "predict.py:Predictor"
    assert cog["build"]["python_packages"] == [f"gesso[cog,diffusion]=={__version__}"]


def test_every_copied_file_is_there() -> None:
    dockerfile = (PREDICTOR / "Dockerfile").read_text(encoding="utf-8")
    sources = [word for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]]
    assert len(sources) == 8
    assert all((PREDICTOR.parents[1] / source).exists() for source in sources)
