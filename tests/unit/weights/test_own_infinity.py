"""A user's own Infinity in its authors' layout: named in `models.toml`, painted with, planned, and refused.

The published ones are in `test_published`, entries of other kinds in `test_catalogue`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gesso.engine import Engine, memory
from gesso.engine.budget import weights_bytes
from gesso.engine.loading import load_pipeline, load_planner, measure, memory_mode
from gesso.engine.memory import peaks
from gesso.errors import GessoError, OutOfMemoryError, RequestError
from gesso.request import GenerationRequest
from gesso.weights import catalogue
from tests.oracle import run_plainly
from tests.unit.cli.running import call
from tests.unit.weights.published import (
    published_tokenizer,
    published_transformer,
    write_published,
    write_text_encoder,
)

pytest.importorskip("transformers")

FILES = ("infinity_2b_reg.pth", "infinity_vae_d32_reg.pth", "flan-t5-xl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files in one folder; read it, never write to it."""
    folder = tmp_path_factory.mktemp("own") / "mine"
    write_published(folder)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def add(home: Path, path: Path | str, files: tuple[object, ...] = FILES, more: str = 'family = "infinity"') -> str:
    listed = ", ".join(f'"{file}"' for file in files)
    text = f'[models.mine]\npath = "{path}"\nlayout = "infinity"\nfiles = [{listed}]\n{more}\n'
    (home / "models.toml").write_text(text, encoding="utf-8")
    return "mine"


def _tokenizer() -> dict[str, Tensor]:
    """Tensors that lie apart, as safetensors want them."""
    return {name: value.clone() for name, value in published_tokenizer().items()}


def paint(model: str) -> bytes:
    request = GenerationRequest(prompt="a red star", model=model, width=256, height=256, seed=3, deterministic=True)
    with Engine(device="cpu", dtype="float32") as engine:
        return engine.run(request)[0].image.tobytes()


def refusal(name: object) -> str:
    with pytest.raises(GessoError) as caught:
        load_pipeline(str(name), "cpu", "float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_is_painted_with_by_name(home: Path, whole: Path, tmp_path: Path) -> None:
    """As `.pth`, as safetensors and shards of them, and with files that lie elsewhere: the same picture."""
    picture = paint(add(home, whole))
    assert len(set(picture)) > 2
    other = tmp_path / "other"
    (other / "shards").mkdir(parents=True)
    state = published_transformer(None)
    save_file(state, other / "transformer.safetensors")
    for shard in range(2):
        save_file(dict(list(state.items())[shard::2]), other / f"shards/{shard}.safetensors")
    save_file(_tokenizer(), other / "tokenizer.safetensors")
    assert paint(add(home, other, ("transformer.safetensors", "tokenizer.safetensors", whole / FILES[2]))) == picture
    shutil.copytree(other / "shards", home / "here/shards")
    assert paint(add(home, "here", ("shards", whole / FILES[1], whole / FILES[2]), "")) == picture


def test_what_is_known_of_it(home: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = catalogue.find(add(home, whole, more='licence = "CC0"\ndefaults = { temperature = 0.7, width = 512 }'))
    assert (entry.family, entry.layout, entry.folder, entry.files) == ("infinity", "infinity", whole, FILES)
    assert (entry.licence, entry.missing_files(), entry.sources) == ("CC0", [], ())
    assert entry.defaults == {"width": 512, "height": 1024, "temperature": 0.7}
    assert entry.memory() == {}, "only a part of it could be counted"
    assert "its parts do not fit: the default size has no schedule" in refusal("mine")
    assert call(capsys, "models").out.splitlines()[-1].split()[:3] == ["mine", "ready", "infinity"]
    assert call(capsys, "models", "show", "mine").status == 0


def test_what_is_wrong_with_it_is_named(home: Path, whole: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(whole, tmp_path / "spoilt"))
    state = published_transformer()
    state["colour"] = state.pop("head.bias")
    torch.save(state, spoilt / FILES[0])
    assert "1 missing (head.bias); 1 unexpected (colour)" in refusal(add(home, spoilt))
    assert "not an Infinity tokenizer" in refusal(add(home, whole, (FILES[0], FILES[0], FILES[2])))
    assert "holds more than tensors; nothing was executed" in refusal(_with_code(home, spoilt))
    (spoilt / FILES[1]).unlink()
    assert f"lacks {FILES[1]}" in refusal(add(home, spoilt))
    assert "no such folder; models.mine.path in" in refusal(add(home, "nowhere"))
    assert "models.mine.files" in refusal(add(home, whole, FILES[:2]))
    assert "is not one that flux is read from" in refusal(add(home, whole, more='family = "flux"'))


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def _with_code(home: Path, folder: Path) -> str:
    torch.save({"gpt_fsdp": _Code()}, folder / "code.pth")
    return add(home, folder, ("code.pth", *FILES[1:]))


def test_without_a_name_the_way_to_one_is_said(whole: Path, tmp_path: Path) -> None:
    """By folder and by file, in both formats."""
    way = 'name it in models.toml: path, layout = "infinity", files = [transformer, tokenizer, text encoder]'
    save_file(published_transformer(None), tmp_path / "transformer.safetensors")
    save_file(_tokenizer(), tmp_path / "tokenizer.safetensors")
    torch.save(published_transformer(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    files = (whole / FILES[0], whole / FILES[1], *tmp_path.glob("*.safetensors"), tmp_path / "old.pth")
    for path in (whole, tmp_path, *files):
        assert refusal(path).endswith(f"; {way}")
    assert "holds parts of an Infinity (infinity_2b_reg.pth)" in refusal(whole)
    assert "holds transformers' T5EncoderModel alone" in refusal(write_text_encoder(tmp_path / "t5"))


# Planning.


def test_a_planner_plans_the_same_and_reads_no_weights(home: Path, whole: Path, tmp_path: Path) -> None:
    """Of pickles and of safetensors in shards; what is there of the weights may as well be nothing."""
    request = GenerationRequest(prompt="a red star", seed=3, width=256, height=256)
    pipeline = load_pipeline(add(home, whole), "cpu", "bfloat16")
    planner = load_planner("mine", "cpu", "bfloat16")
    assert planner.plan(request) == pipeline.plan(request)
    assert peaks(planner, planner.plan(request)) == peaks(pipeline, pipeline.plan(request))
    assert all(each.is_meta for each in planner.build.networks["transformer"].parameters())  # type: ignore[attr-defined]

    other = Path(shutil.copytree(whole, tmp_path / "other"))
    (other / "shards").mkdir()
    state = published_transformer()
    for shard in range(2):
        path = other / f"shards/{shard}.safetensors"
        save_file(dict(list(state.items())[shard::2]), path)
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:length] + bytes(len(content) - length))
    (other / "flan-t5-xl/model.safetensors").write_bytes(b"")
    planner = load_planner(add(home, other, ("shards", *FILES[1:])), "cpu", "bfloat16")
    assert planner.plan(request) == pipeline.plan(request)


def test_every_placement_paints_the_same_bits(home: Path, whole: Path) -> None:
    request = GenerationRequest(prompt="a red star", seed=3, width=256, height=256, num_images=2)
    plain = run_plainly(load_pipeline(add(home, whole), "cpu", "float32", memory="full"), request)
    for mode in ("offload", "model-offload", "group-offload"):
        placed = run_plainly(load_pipeline("mine", "cpu", "float32", memory=mode), request)
        assert [one.image.tobytes() for one in placed] == [one.image.tobytes() for one in plain], mode


def test_eight_bits_are_another_picture_of_the_same_size(home: Path, whole: Path) -> None:
    request = GenerationRequest(prompt="a red star", seed=3, width=256, height=256)
    plain = run_plainly(load_pipeline(add(home, whole), "cpu", "float32"), request)[0]
    pipeline = load_pipeline("mine", "cpu", "float32", memory="offload+8bit")
    assert run_plainly(pipeline, request)[0].image.tobytes() != plain.image.tobytes()
    with pytest.raises(RequestError, match="leave tiling out"):
        load_pipeline("mine", "cpu", memory="tiling")


def test_memory_is_foreseen_and_a_mode_taken(
    home: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(home, whole)
    pipeline = load_pipeline("mine", "cpu", "float32", memory="full")
    assert measure("mine", "cpu", "float32") == weights_bytes([pipeline])
    asked = GenerationRequest(prompt="a red star", model="mine", seed=3, width=256, height=256)
    plan = pipeline.plan(asked)
    assert plan.peak_bytes > sum(part.whole for part in pipeline.build.footprint.plain.values())  # type: ignore[attr-defined]
    foreseen = {str(mode): size for mode, size in peaks(pipeline, plan).items()}
    assert foreseen["full"] == plan.peak_bytes > foreseen["offload"] > foreseen["group-offload"]

    monkeypatch.setattr("gesso.engine.loading.is_small", lambda size: False)
    for room, mode in ((2 * foreseen["full"], "full"), (int(1.12 * foreseen["group-offload"]), "group-offload")):
        monkeypatch.setattr(memory, "free_bytes", lambda device, room=room: room)
        assert str(memory_mode("mine", "cpu", "float32", requests=[asked])) == mode
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    with pytest.raises(OutOfMemoryError):
        memory_mode("mine", "cpu", "float32", requests=[asked])
    monkeypatch.setattr("gesso.weights.infinity.filled", None)  # whatever is filled is not planned
    outcome = call(capsys, "plan", "a red star", "--model", "mine", "--width", "256", "--height", "256", "--json")
    assert outcome.status == 0 and '"offload"' in outcome.out
