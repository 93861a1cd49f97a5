"""Tensors in files: headers, reading and mapping them, stand-ins, and digests that are remembered."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gesso import stored
from gesso.errors import FileError, WeightsError
from gesso.weights import digests
from gesso.weights.files import fill, read_tensors

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "half": torch.linspace(-1, 1, 7).to(torch.bfloat16),
    "number": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    "counts": torch.arange(5),
    "flags": torch.tensor([True, False, True]),
    "eighths": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.float(), other.float())


def test_every_way_of_reading_gives_the_tensors(file: Path) -> None:
    header = stored.read_header(file)
    assert header.keys() == TENSORS.keys()
    for get in (stored.read, stored.mapped, lambda wanted: [stored.read_apart(each) for each in wanted]):
        found = get(header.values())
        assert all(_same(tensor, TENSORS[name]) for name, tensor in zip(header, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_are_cast_as_they_are_read(file: Path, dtype: torch.dtype) -> None:
    wanted = {name: each.cast_to(dtype) for name, each in stored.read_header(file).items()}
    for get in (stored.read, stored.mapped):
        for (name, each), tensor in zip(wanted.items(), get(wanted.values()), strict=True):
            plain = TENSORS[name]
            assert _same(tensor, plain.to(dtype) if plain.is_floating_point() else plain)
            assert tensor.nbytes == each.nbytes


def test_arenas_align_as_pytorch_does_and_go_as_a_whole(file: Path) -> None:
    found = stored.read(each.cast_to(torch.float64) for each in stored.read_header(file).values())
    assert all(tensor.data_ptr() % stored.ALIGNMENT == 0 for tensor in found if tensor.numel())
    found[0].add_(1)  # own memory


def test_a_mapped_tensor_may_be_written_to_and_the_file_stays(file: Path) -> None:
    before = file.read_bytes()
    for tensor in stored.mapped(stored.read_header(file).values()):
        if tensor.dtype == torch.float32 and tensor.numel():
            tensor.add_(1)
    assert file.read_bytes() == before


def test_a_file_that_is_cut_or_changed_after_its_header_was_read(file: Path) -> None:
    whole = stored.read_header(file)
    os.truncate(file, file.stat().st_size - 4)
    for get in (stored.read, stored.mapped):
        with pytest.raises(WeightsError, match="altered while it was in use"):
            get(whole.values())


def test_kinds_of_numbers_that_are_not_read_are_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(WeightsError, match=r"odd\.safetensors"):
        stored.read_header(tmp_path / "odd.safetensors")


def test_stand_ins_are_known_again_and_only_where_reading_is_deferred(tmp_path: Path) -> None:
    source = nn.Linear(4, 3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(read_tensors(tmp_path, later=True)["weight"], source.weight)
    with torch.device("meta"):
        network = nn.Linear(4, 3)
    with stored.deferred():
        fill(network, read_tensors(tmp_path, dtype=torch.bfloat16, pickles=False, later=True), tmp_path)
        found = stored.stored_of(network.weight)
        assert found is not None and (found.dtype, found.wanted) == (torch.float32, torch.bfloat16)
        assert torch.equal(stored.read_apart(found), source.weight.bfloat16())
        assert (network.weight.dtype, network.weight.nbytes) == (torch.bfloat16, 24)
        assert network.weight.isnan().all()
        assert stored.stored_of(source.weight) is None
        with stored.at_once():
            assert torch.equal(read_tensors(tmp_path, later=True)["weight"], source.weight)
    assert stored.stored_of(network.weight) is None


def test_digests_are_computed_once_for_as_long_as_a_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "_known", {})
    file = tmp_path / "file"
    file.write_bytes(b"one")
    monkeypatch.setattr(time, "time_ns", lambda: file.stat().st_mtime_ns + 10**11)
    first = digests.sha256(file)
    monkeypatch.setattr(digests, "_known", {})
    with monkeypatch.context() as patched:
        patched.setattr(digests.hashlib, "file_digest", None)  # would break if it were asked
        assert digests.sha256(file) == first
    time.sleep(0.02)
    file.write_bytes(b"two")
    second = digests.sha256(file)
    assert second != first
    (tmp_path / "home" / digests.NAME).write_text("no JSON")
    monkeypatch.setattr(digests, "_known", {})
    digests.begin([file, tmp_path / "absent"])
    assert digests.sha256(file) == second
    with pytest.raises(FileError, match="cannot be read"):
        digests.sha256(tmp_path / "absent")


def test_digests_that_were_begun_are_those_of_the_files_as_they_are_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    files = [tmp_path / name for name in "abcdefg"]
    for content in ("one", "another"):
        for file in files:
            file.write_text(content + file.name)
        digests.begin(files)  # and nobody asks, as after a loading that failed
    assert digests.sha256(files[0]) == hashlib.sha256(b"anothera").hexdigest()
    files[1].write_text("changed since")
    wanted = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert [digests.sha256(file) for file in files] == wanted


def test_a_file_that_was_only_just_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    file = tmp_path / "file"
    file.write_bytes(b"one")
    digests.sha256(file)
    assert not (tmp_path / "home").exists()
