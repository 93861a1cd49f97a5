"""Parts that shipped models share: moved once, found again, checked, and nothing lost on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from gesso.errors import FileError, RunError, WeightsError
from gesso.weights import catalogue, manifest, shared
from gesso.weights.infinity import load_tokenizer, load_word_encoder

TEXT = "text.safetensors"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty shared room."""
    monkeypatch.setattr(manifest, "SHARED", tmp_path / "zoo" / "shared")
    return tmp_path / "zoo" / "shared"


@pytest.fixture
def model(tiny_infinity: Path, tmp_path: Path, room: Path) -> Path:
    return Path(shutil.copytree(tiny_infinity, tmp_path / "zoo" / "model"))


def _config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_with_all_of_its_parts(model: Path) -> None:
    assert shared.part(model, TEXT) == model / TEXT
    assert shared.listed(model) == {}


def test_parts_move_and_are_found(model: Path, room: Path) -> None:
    content = (model / TEXT).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    words = load_word_encoder(model).state_dict()
    names = tuple(path.name for path in model.iterdir() if path.name != manifest.NAME)
    before = manifest.verify(model, ("transformer.safetensors", TEXT))
    places = shared.share(model)
    assert places[TEXT] == room / f"{digest}.safetensors" == shared.part(model, TEXT)
    assert places[TEXT].read_bytes() == content
    assert set(places) == {TEXT, "tokenizer.safetensors"}
    assert _files(model) == {name for name in names if name not in places} | {manifest.NAME}
    assert _config(model)["shared"] == shared.listed(model)
    assert manifest.verify(model, ("transformer.safetensors", TEXT)) == before
    manifest.verify(model, names)
    moved = load_word_encoder(model).state_dict()
    assert all(moved[name].equal(value) for name, value in words.items())
    load_tokenizer(model)


def test_the_catalogue_knows_what_lies_in_the_room(model: Path) -> None:
    whole = catalogue.find(str(model)).size
    (place,) = shared.share(model, [TEXT]).values()
    entry = catalogue.find(str(model))
    assert entry.missing_files() == []
    assert entry.size is not None and whole is not None
    assert 0 <= entry.size - whole < 500  # what the configuration and the manifest now say besides
    place.unlink()
    assert catalogue.find(str(model)).missing_files() == [TEXT]


def test_models_with_the_same_part_have_one_file(model: Path, room: Path) -> None:
    other = Path(shutil.copytree(model, model.parent / "other"))
    first = shared.share(model, [TEXT])
    assert shared.share(other, [TEXT]) == first
    assert len(_files(room)) == 1


def test_sharing_again_changes_nothing(model: Path) -> None:
    places = shared.share(model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert shared.share(model) == places
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_nothing_is_lost_when_it_is_interrupted(model: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """After so many writes the disk is full; the part is still there, and a second try finishes."""
    done: list[Path] = []
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if len(done) == writes:
            raise OSError(28, "No space left on device")
        done.append(target)
        return real(self, target)

    content = (model / TEXT).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(RunError, match="no space left on device"):
            shared.share(model, [TEXT])
    assert (model / TEXT).read_bytes() == content
    shared.share(model, [TEXT])
    manifest.verify(model, (TEXT, "config.json"))
    assert shared.part(model, TEXT).read_bytes() == content


def test_an_altered_or_missing_shared_file(model: Path) -> None:
    path = shared.share(model, [TEXT])[TEXT]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match="was altered: its digest is not its name"):
        shared.part(model, TEXT)
    with pytest.raises(WeightsError, match=r"text\.safetensors \(shared: .*\) was altered"):
        manifest.verify(model, (TEXT,))
    path.unlink()
    with pytest.raises(FileError, match=r"is missing, which model shares as text\.safetensors; install gesso again"):
        load_word_encoder(model)
    with pytest.raises(WeightsError, match=r"text\.safetensors \(shared: .*\) is missing"):
        manifest.verify(model, (TEXT,))


def test_a_file_of_the_same_name_does_not_stand_in_for_a_shared_part(model: Path) -> None:
    """The manifest vouches for the shared one, so that is the one that is read."""
    place = shared.share(model, [TEXT])[TEXT]
    (model / TEXT).write_bytes(b"another")
    assert shared.part(model, TEXT) == place
    shared.share(model, ["tokenizer.safetensors"])
    place.unlink()
    with pytest.raises(FileError, match="is missing"):
        shared.share(model, ["tokenizer.safetensors"])


def test_a_part_that_is_nowhere(model: Path) -> None:
    (model / TEXT).unlink()
    with pytest.raises(FileError, match=r"lacks text\.safetensors"):
        shared.part(model, TEXT)
    with pytest.raises(FileError, match=r"transformer\.safetensors cannot be shared"):
        shared.share(model, ["transformer.safetensors"])


@pytest.mark.parametrize(
    "listed",
    [["text.safetensors"], {TEXT: "../../secret"}, {TEXT: 3}, {"transformer.safetensors": "0" * 64}, {TEXT: "F" * 64}],
    ids=str,
)
def test_lists_that_are_refused(model: Path, listed: object) -> None:
    (model / TEXT).unlink()
    (model / "config.json").write_text(json.dumps(_config(model) | {"shared": listed}))
    with pytest.raises(FileError, match="list of shared parts is unusable"):
        shared.part(model, TEXT)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_configurations_that_are_none(model: Path, content: str) -> None:
    (model / TEXT).unlink()
    (model / "config.json").write_text(content)
    with pytest.raises(FileError, match=r"config\.json: is not"):
        shared.part(model, TEXT)
