"""Files of tensors: every kind that is read, every way in which one can be unusable, and strict filling."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from gesso.errors import FileError, GessoError, WeightsError
from gesso.weights.files import check_shards, digest, fill, read_tensors

TENSORS = {"first.weight": torch.arange(6.0).view(2, 3), "second.bias": torch.ones(2, dtype=torch.bfloat16)}


def _same(found: dict[str, Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert _same(read_tensors(tmp_path / "model.safetensors"))
    assert _same(read_tensors(tmp_path))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickles(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    assert _same(read_tensors(path))
    assert _same(read_tensors(tmp_path))


def test_the_first_known_key_is_unwrapped(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"ema": TENSORS, "epoch": 3, "vae": {"other": torch.ones(1)}}, path)
    assert set(read_tensors(path, keys=("vae", "ema"))) == {"other"}
    assert _same(read_tensors(path, keys=("ema",)))
    with pytest.raises(WeightsError, match="not a dictionary of tensors"):
        read_tensors(path)


def _shards(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(TENSORS, 1):
        save_file({name: TENSORS[name]}, folder / f"model-{index}-of-2.safetensors")
    return folder


def test_a_folder_of_shards_with_and_without_its_index(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "model")
    assert _same(read_tensors(folder))
    weight_map = {name: f"model-{index}-of-2.safetensors" for index, name in enumerate(TENSORS, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"foreign": torch.ones(1)}, folder / "adapter.safetensors")  # in the folder, not in the index
    assert _same(read_tensors(folder))


def test_an_index_reads_nothing_outside_its_folder(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "model")
    save_file(TENSORS, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../secret.safetensors"}}')
    with pytest.raises(FileError, match="beside it"):
        read_tensors(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "..", "x.txt", "/x.safetensors"])
def test_an_index_names_files_beside_it_and_nothing_else(tmp_path: Path, name: str) -> None:
    folder = _shards(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    for refuse in (read_tensors, check_shards):
        with pytest.raises(FileError, match="beside it"):
            refuse(folder)


def test_two_files_that_hold_the_same_name_are_refused(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "model")
    save_file({"first.weight": torch.zeros(2, 3)}, folder / "other.safetensors")
    with pytest.raises(FileError, match=r"model-1-of-2\.safetensors and other\.safetensors both hold first\.weight"):
        read_tensors(folder)


def test_an_index_says_which_of_two_files_counts(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "model")
    save_file({"second.bias": torch.zeros(2)} | {"first.weight": TENSORS["first.weight"]}, folder / "a.safetensors")
    listed = {"first.weight": "a.safetensors", "second.bias": "model-2-of-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert _same(read_tensors(folder))


def test_a_variant_is_read_only_where_nothing_else_is_there(tmp_path: Path) -> None:
    folder, zeros = _shards(tmp_path / "model"), {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    save_file(zeros, folder / "model.fp16.safetensors")
    variant = folder / "model.fp16.safetensors.index.json"
    variant.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model.fp16.safetensors")}))
    assert _same(read_tensors(folder))
    plain = {name: f"model-{index}-of-2.safetensors" for index, name in enumerate(TENSORS, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": plain}))
    assert _same(read_tensors(folder))
    (folder / "model.safetensors.index.json").unlink()
    for path in folder.glob("model-*"):
        path.unlink()
    assert all(not value.any() for value in read_tensors(folder).values())


def test_without_pickles(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "model.bin")
    assert _same(read_tensors(tmp_path))
    with pytest.raises(FileError, match="other formats are not read"):
        read_tensors(tmp_path, pickles=False)
    with pytest.raises(FileError, match="not a file of weights"):
        read_tensors(tmp_path / "model.bin", pickles=False)


def test_numbers_are_cast_and_counts_are_not(tmp_path: Path) -> None:
    save_file({**TENSORS, "steps": torch.arange(3)}, tmp_path / "model.safetensors")
    found = read_tensors(tmp_path, dtype=torch.float16)
    assert [found[name].dtype for name in ("first.weight", "second.bias", "steps")] == [
        torch.float16,
        torch.float16,
        torch.int64,
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_what_is_no_index_is_named(tmp_path: Path, text: str) -> None:
    (_shards(tmp_path / "model") / "x.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FileError, match="not an index of shards") as caught:
        read_tensors(tmp_path / "model")
    assert caught.value.path.endswith("x.index.json")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "model")
    (folder / "x.index.json").write_text('{"weight_map": {"first.weight": "model-9-of-9.safetensors"}}')
    with pytest.raises(FileError, match="model-9-of-9"):
        read_tensors(folder)


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match="no such file"):
        read_tensors(tmp_path / name)


def test_files_and_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileError, match="not a file of weights"):
        read_tensors(tmp_path / "notes.txt")
    with pytest.raises(FileError, match="holds no weights"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02.", b"PK\x03\x04", b"{}" * 50, b"\0" * 300])
def test_foreign_contents(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises((FileError, WeightsError)) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(WeightsError):
        read_tensors(tmp_path / "model.pth")


def _written(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        torch.save(TENSORS, buffer)
    elif kind == "legacy":
        torch.save(TENSORS, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


WRITTEN = {kind: _written(kind) for kind in ("zip", "legacy")}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@settings(max_examples=60)
@given(share=st.floats(0, 0.999))
def test_truncated_pickles(tmp_path_factory: pytest.TempPathFactory, kind: str, share: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "model.pth"
    path.write_bytes(WRITTEN[kind][: int(len(WRITTEN[kind]) * share)])
    with pytest.raises(WeightsError):
        read_tensors(path)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@settings(max_examples=100)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_damage_is_an_error_of_ours_or_none(
    tmp_path_factory: pytest.TempPathFactory, kind: str, place: int, value: int
) -> None:
    content = bytearray(WRITTEN[kind])
    content[place % len(content)] = value
    path = tmp_path_factory.mktemp("damaged") / "model.pth"
    path.write_bytes(bytes(content))
    with suppress(GessoError):
        read_tensors(path)


@pytest.mark.parametrize("end", ["1e999", "NaN", "null", '"a"'])
def test_a_header_whose_places_are_no_numbers(tmp_path: Path, end: str) -> None:
    header = f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": [0, {end}]}}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WeightsError, match="its header is damaged"):
        read_tensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_truncated_safetensors(tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(WeightsError, match="truncated"):
        read_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, sprung = tmp_path / "model.pth", tmp_path / "sprung"
    torch.save({**TENSORS, "x": Trap(sprung)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="holds more than tensors"):
        read_tensors(path)
    assert not sprung.exists()
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(WeightsError):
        read_tensors(path)
    assert not sprung.exists()


def test_advice_to_execute_a_pickle_is_not_passed_on(tmp_path: Path) -> None:
    torch.save({**TENSORS, "x": Trap(tmp_path / "sprung")}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="holds more than tensors; nothing was executed") as caught:
        read_tensors(tmp_path / "model.pth")
    assert "weights_only" not in str(caught.value)


class Small(nn.Module):
    """Two layers to fill."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(2, 2)


def test_filling_from_meta_takes_the_tensors_themselves() -> None:
    state = Small().state_dict()
    with torch.device("meta"):
        network = Small()
    fill(network, state, "file")
    assert network.first.weight.data_ptr() == state["first.weight"].data_ptr()


def test_filling_names_all_that_is_wrong_in_one_line() -> None:
    state = Small().state_dict() | {"third.weight": torch.ones(1), "first.weight": torch.ones(3, 2)}
    del state["second.bias"]
    network = Small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        fill(network, state, "file.pth")
    error = caught.value
    assert (error.missing, error.unexpected) == (("second.bias",), ("third.weight",))
    assert error.mismatched == ("first.weight: (3, 2) where (2, 3) is wanted",)
    assert str(error) == (
        "file.pth: weights do not fit: 1 missing (second.bias); 1 unexpected (third.weight); "
        "1 wrong shape (first.weight: (3, 2) where (2, 3) is wanted)"
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_other_numbers_of_the_right_shape_are_refused() -> None:
    state = Small().state_dict()
    state["first.weight"] = state["first.weight"].to(torch.int32)
    with pytest.raises(WeightsError, match=r"first\.weight: int32 where float32 is wanted"):
        fill(Small(), state, "file")


def test_the_digest_goes_by_contents_and_order(tmp_path: Path) -> None:
    one, two, copy = (tmp_path / name for name in ("one", "two", "copy"))
    one.write_bytes(b"1" * 3_000_000)
    two.write_bytes(b"2")
    shutil.copy(one, copy)
    assert digest([one, two]) == digest([copy, two]) != digest([two, one])
