"""Model cards of every family, with and without a first stage, from files alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from gesso.errors import FileError, RequestError
from gesso.training.card import main, write_card
from gesso.weights import manifest, shared

pytest.importorskip("matplotlib")

SHARE = {"share": 0.5, "right": 1, "asked": 2, "interval": [0.1, 0.9]}
SCORE = {
    "score": "shapes",
    "overall": 0.5,
    "categories": {"one object": SHARE},
    "request": {"model": "mine", "deterministic": True, "guidance": 2.0},
    "answers": [{"prompt": "a red star"}],
}


@pytest.fixture
def score(tmp_path: Path) -> Path:
    path = tmp_path / "score.json"
    path.write_text(json.dumps(SCORE))
    return path


@pytest.fixture
def flux(flux_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(flux_run / "export", tmp_path / "flux"))


def test_a_flow_models_card(flux: Path, flux_run: Path, kl_autoencoder_run: Path, score: Path) -> None:
    card = write_card(flux, flux_run, [score], {"autoencoder": kl_autoencoder_run})
    text = card.read_text()
    assert text.startswith("# flux\n\nA small FLUX (rectified flow")
    assert "at 32 x 32 pixels" in text
    assert "| one object | 1 of 2 | 0.500 | 0.100 to 0.900 |" in text
    assert "Reproduce: `gesso eval shapes --model mine --deterministic --guidance 2.0`" in text
    assert re.search(r"Autoencoder on held-out scenes: -?\d+\.\d\d dB\.", text)
    assert re.search(r"Transformer on held-out scenes: loss \d\.\d{4}\.", text)
    assert "`gesso train tiny-kl-autoencoder`, then `gesso train tiny-flow`" in text
    assert "Its word encoder is that of words as it was then, unchanged." in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert {"README.md", "samples.png", "loss.png", "training-autoencoder.json"} <= {p.name for p in flux.iterdir()}
    assert "answers" not in json.loads((flux / "score.json").read_text())
    manifest.verify(flux, ("transformer.safetensors",))


def test_without_the_first_stage(flux: Path, flux_run: Path, score: Path) -> None:
    text = write_card(flux, flux_run, [score]).read_text()
    assert "Autoencoder on" not in text
    assert "`gesso train tiny-flow`; about" in text
    assert not (flux / "training-autoencoder.json").exists()


def test_what_an_earlier_card_was_told_stays(flux: Path, flux_run: Path, kl_autoencoder_run: Path, score: Path) -> None:
    told = write_card(flux, flux_run, [score], {"autoencoder": kl_autoencoder_run}).read_text()
    recorded = (flux / "training-autoencoder.json").read_bytes()
    text = write_card(flux, flux_run, [score]).read_text()
    (line,) = re.findall(r"Autoencoder on held-out scenes: .* dB\.", told)
    assert line in text
    assert "`gesso train tiny-flow`; about" in text
    assert "Its autoencoder is that of an earlier training, which is not counted." in text
    assert "`training-autoencoder.json`\nand `training.json` hold" in text
    assert (flux / "training-autoencoder.json").read_bytes() == recorded


def test_what_is_shared_is_counted_and_said(
    flux: Path, flux_run: Path, score: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "SHARED", tmp_path / "shared")
    shared.share(flux)
    assert "MB of them shared with other models" in write_card(flux, flux_run, [score]).read_text()


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_infinity_card(
    infinity_run: Path, tokenizer_run: Path, tmp_path: Path, score: Path, with_tokenizer: bool
) -> None:
    model = Path(shutil.copytree(infinity_run / "export", tmp_path / "model"))
    log = (infinity_run / "log.jsonl").read_text().splitlines()
    run = Path(shutil.copytree(infinity_run, tmp_path / "run"))
    again = [json.dumps({"step": 7, "loss": 0.5, "seconds": 0.1})]  # a second sitting: its clock begins anew
    (run / "log.jsonl").write_text("\n".join([*log, *again]) + "\n")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["settings"] |= {"start_from": "runs/earlier/export", "train_text": False}
    (run / "recipe.json").write_text(json.dumps(recipe))
    arguments = [str(model), "--run", str(run), "--score", str(score)]
    main([*arguments, "--tokenizer", str(tokenizer_run)] if with_tokenizer else arguments)
    text = (model / "README.md").read_text()
    assert "A small Infinity (bitwise visual autoregression)" in text
    assert "of bits right, loss" in text
    assert "Trained in more than one sitting: transformer in 2." in text
    assert "Its word encoder is that of the earlier one as it was then, unchanged." in text
    assert ("Tokenizer on held-out scenes" in text) == with_tokenizer
    assert (model / "training-tokenizer.json").exists() == with_tokenizer


def test_what_is_missing_is_named(flux: Path, flux_run: Path, score: Path, tmp_path: Path) -> None:
    before = {path.name for path in flux.iterdir()}
    with pytest.raises(FileError, match="holds no sample sheet"):
        write_card(flux, tmp_path, [score])
    with pytest.raises(FileError, match="cannot be read as JSON; make it with gesso eval shapes --output"):
        write_card(flux, flux_run, [tmp_path / "absent.json"])
    score.write_text("{}")
    with pytest.raises(FileError, match="is no shapes-score"):
        write_card(flux, flux_run, [score])
    with pytest.raises(RequestError, match=r"--tokenizer .* is not one of autoencoder"):
        write_card(flux, flux_run, [score], {"tokenizer": tmp_path})
    assert {path.name for path in flux.iterdir()} == before


def test_an_autoencoder_has_no_card(kl_autoencoder_run: Path, flux_run: Path, score: Path) -> None:
    with pytest.raises(FileError, match="family kl-autoencoder; one of infinity, flux, z-image"):
        write_card(kl_autoencoder_run / "export", flux_run, [score])
