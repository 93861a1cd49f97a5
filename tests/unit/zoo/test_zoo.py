"""What ships: sizes, digests, and that the cards state what their commands measure."""

import json
import re
from pathlib import Path

import pytest

from gesso.engine import Engine
from gesso.evaluation import faces
from gesso.evaluation.shapes import evaluate
from gesso.weights import manifest, shared
from gesso.weights.catalogue import ZOO, find, names

SHIPPED = sorted(path.name for path in ZOO.iterdir() if (path / "config.json").is_file())
MEGABYTE = 1_000_000


def test_the_catalogue_lists_what_ships() -> None:
    assert SHIPPED
    assert set(SHIPPED) <= set(names())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_nano_model_is_small_and_unaltered(name: str) -> None:
    folder = ZOO / name
    weights = tuple(name for name in find(name).files if name.endswith(".safetensors"))
    assert sum(shared.part(folder, part).stat().st_size for part in weights) <= 8 * MEGABYTE
    manifest.verify(folder, (*weights, "config.json"))
    assert find(name).missing_files() == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_shows_pictures_that_are_there(name: str) -> None:
    card = (ZOO / name / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card)
    assert {"samples.png", "loss.png"} <= set(pictures)
    assert all((ZOO / name / picture).is_file() for picture in pictures)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SHIPPED)
def test_the_score_on_the_card_is_what_its_command_measures(name: str) -> None:
    stated = json.loads((ZOO / name / "score.json").read_text(encoding="utf-8"))
    asked = stated["request"]
    fields = {key: value for key, value in asked.items() if key not in ("prompts", "trials", "seed", "identity")}
    how = {"seed": asked["seed"]}
    with Engine(device="cpu") as engine:
        if stated["score"] == "faces":
            judge, identity = faces.recogniser_of(ZOO / name), asked.get("identity")
            known = faces.evaluate(engine, judge, fields, trials=asked["trials"], identity=identity, **how)
            share, measured = stated["painted"]["share"], known.painted.value
        else:
            share, measured = stated["overall"], evaluate(engine, fields, prompts=asked["prompts"], **how).overall
    # Another processor rounds otherwise, and a bit that lies on the edge may fall to the other side.
    assert measured == pytest.approx(share, abs=0.02)
    assert f"{share:.3f}" in Path(ZOO / name / "README.md").read_text(encoding="utf-8")
