"""Runs on the faces world: resumed bit for bit, exports that load, paint people and are told apart."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from gesso.engine import Engine
from gesso.engine.loading import flow_nano as loading
from gesso.engine.loading.build import Build
from gesso.errors import MissingError, RequestError, WeightsError
from gesso.evaluation import faces as evaluation
from gesso.models.resampler import ResamplerConfig
from gesso.pipelines.contract import Pipeline
from gesso.pipelines.flux_state import FluxState
from gesso.request import GenerationRequest
from gesso.training.card import main
from gesso.training.infinite_you import InfiniteYouSettings, InfiniteYouTask
from gesso.training.painting import paint, walk
from gesso.training.recipes.recipe import Recipe
from gesso.weights import catalogue, face_recogniser, infinite_you_nano
from gesso.worlds import faces
from tests.unit.cli.running import call
from tests.unit.training import tiny_faces
from tests.unit.training.tiny_recipes import exported, log_of, same, state_of, stop_at, train


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs, never interrupted; read them only."""
    room = tmp_path_factory.mktemp("faces")
    made = {name: room / name for name in ("recogniser", "autoencoder", "flux", "infinite-you")}
    train(tiny_faces.recogniser_recipe(), made["recogniser"])
    train(tiny_faces.autoencoder_recipe(), made["autoencoder"])
    train(tiny_faces.flux_recipe(made["autoencoder"] / "export"), made["flux"])
    train(_infinite_you(made), made["infinite-you"])
    return made


def _infinite_you(runs: dict[str, Path], **fields: object) -> Recipe:
    stored: dict[str, object] = {"precompute": 10}
    return tiny_faces.infinite_you_recipe(runs["flux"] / "export", runs["recogniser"] / "export", **(stored | fields))


def _task(runs: dict[str, Path], **fields: object) -> InfiniteYouTask:
    settings = _infinite_you(runs, **fields).settings
    assert isinstance(settings, InfiniteYouSettings)
    return InfiniteYouTask(settings, batch=2, seed=0)


def _recipe(runs: dict[str, Path], name: str) -> Recipe:
    if name == "recogniser":
        return tiny_faces.recogniser_recipe()
    return tiny_faces.flux_recipe(runs["autoencoder"] / "export") if name == "flux" else _infinite_you(runs)


@pytest.mark.parametrize("name", ["recogniser", "flux", "infinite-you"])
def test_a_stopped_run_goes_on_bit_for_bit(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    recipe, folder = _recipe(runs, name), tmp_path / "run"
    for number, step in enumerate((1, 5)):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder, resume=number > 0, report=stop_at(step))
    train(recipe, folder, resume=True)
    assert same(state_of(folder), state_of(runs[name]))
    assert log_of(folder) == log_of(runs[name])
    assert exported(folder) == exported(runs[name])


# ---- the recogniser -------------------------------------------------------------------------------------------------


def test_the_recogniser_learns_people(tmp_path: Path) -> None:
    """Beyond chance on people never seen, after a few steps of a tiny one."""
    recipe = tiny_faces.recogniser_recipe()
    loop = replace(recipe.loop, steps=60, batch=32, learning_rate=5e-3, log_every=60, evaluate_every=60)
    settings = replace(recipe.settings, people=32, pictures=4)  # type: ignore[type-var]
    figures = train(replace(recipe, settings=settings, loop=replace(loop, precision="fp32")), tmp_path / "run")
    assert figures["accuracy"] > 0.3  # chance is 0.05
    assert figures["same"] > figures["other"] + 0.1


def test_an_exported_recogniser_gives_unit_vectors_whatever_the_company(runs: dict[str, Path]) -> None:
    network = face_recogniser.load_recogniser(runs["recogniser"] / "export")
    image = torch.rand(3, 3, tiny_faces.SIDE, tiny_faces.SIDE) * 2 - 1
    vector_BV, points_B52 = network.vectors_and_points(image)
    torch.testing.assert_close(vector_BV.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(network(image[:1]), vector_BV[:1])
    assert points_B52.shape == (3, 5, 2)


# ---- InfiniteYou ----------------------------------------------------------------------------------------------------


def _portrait(folder: Path, seed: int) -> str:
    path = folder / f"{seed}.png"
    Image.fromarray(faces.draw([faces.held_out_portrait(seed)])[0]).save(path)
    return str(path)


def _request(folder: Path, seed: int = 1, **identity: object) -> GenerationRequest:
    person = {"image": _portrait(folder, seed), **identity}
    return GenerationRequest(prompt="a person smiling", seed=1, identity=person)  # type: ignore[arg-type]


def _painted(pipeline: Pipeline, request: GenerationRequest) -> torch.Tensor:
    """The latent that a picture is decoded from: after so short a training people differ by less than a shade of it."""
    *_, (state,) = walk(pipeline, [request])
    assert isinstance(state, FluxState)
    return state.tokens_1LD


@torch.no_grad()
def test_it_begins_as_flux_alone_and_then_hears_the_person(runs: dict[str, Path]) -> None:
    task = _task(runs)
    figures = task.evaluate()
    assert figures["validation_loss"] == figures["validation_loss_stranger"]
    for parameter in task.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    figures = task.evaluate()
    assert figures["validation_loss"] != figures["validation_loss_stranger"]


def test_only_what_paints_people_is_trained(runs: dict[str, Path]) -> None:
    flux, whole = exported(runs["flux"]), exported(runs["infinite-you"])
    for name in ("transformer.safetensors", "text.safetensors", "autoencoder.safetensors"):
        assert whole[name] == flux[name]
    assert whole["recogniser.safetensors"] == exported(runs["recogniser"])["recogniser.safetensors"]
    assert set(infinite_you_nano.FILES) <= whole.keys()
    assert set(infinite_you_nano.FILES) <= set(catalogue.find(str(runs["infinite-you"] / "export")).files)
    assert not set(infinite_you_nano.FILES) & set(catalogue.find(str(runs["flux"] / "export")).files)


def test_an_export_paints_people_and_is_flux_without_one(runs: dict[str, Path], tmp_path: Path) -> None:
    entry = catalogue.find(str(runs["infinite-you"] / "export"))
    pipeline = loading.load_own(entry, Build(device="cpu"))
    request = _request(tmp_path, pose=_portrait(tmp_path, 3))
    assert pipeline.plan(request) == loading.load_own(entry, Build(device="meta")).plan(request)
    (picture,) = paint(pipeline, [request])
    assert picture.size == (tiny_faces.SIDE, tiny_faces.SIDE)
    assert not torch.equal(_painted(pipeline, request), _painted(pipeline, _request(tmp_path, 2)))
    plain = GenerationRequest(prompt="a person smiling", seed=1)
    flux = loading.load_own(catalogue.find(str(runs["flux"] / "export")), Build(device="cpu"))
    assert paint(pipeline, [plain])[0].tobytes() == paint(flux, [plain])[0].tobytes()
    with pytest.raises(RequestError, match="is not aes_stage2; this model has one variant"):
        pipeline.plan(_request(tmp_path, variant="sim_stage1"))


def test_what_does_not_fit_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="in_channels"):
        _task(runs, network=replace(tiny_faces.FLUX, in_channels=16))
    with pytest.raises(MissingError, match="gesso train faces-recogniser"):
        _task({**runs, "recogniser": tmp_path / "nowhere"})
    with pytest.raises(RequestError, match="num_queries"):
        _infinite_you(runs, resampler=replace(_resampler(runs), num_queries=4))
    damaged = Path(shutil.copytree(runs["infinite-you"] / "export", tmp_path / "model"))
    (damaged / "resampler.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"resampler\.safetensors"):
        loading.load_own(catalogue.find(str(damaged)), Build(device="cpu"))


def _resampler(runs: dict[str, Path]) -> ResamplerConfig:
    settings = _infinite_you(runs).settings
    assert isinstance(settings, InfiniteYouSettings)
    return settings.resampler


# ---- the score ------------------------------------------------------------------------------------------------------


def test_people_are_counted(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs["infinite-you"] / "export"
    with Engine(device="cpu") as engine:
        judge = evaluation.recogniser_of(folder)
        score = evaluation.evaluate(engine, judge, {"model": str(folder)}, trials=20, identity={"strength": 0.5})
    assert score.painted.asked == score.drawn.asked == len(score.answers) == 20
    assert score.painted.right == sum(answer.right for answer in score.answers)
    assert -1 <= score.others <= 1 and score.request["identity"] == {"strength": 0.5}
    assert json.loads(json.dumps(score.as_dict()))["chance"] == 0.05


def test_a_card_says_how_like_people_are(runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = Path(shutil.copytree(runs["infinite-you"] / "export", tmp_path / "nano"))
    share = {"share": 0.95, "right": 19, "asked": 20, "interval": [0.76, 0.99]}
    score = {"score": "faces", "painted": share, "drawn": share, "chance": 0.05, "own": 0.7, "others": 0.01}
    said = {"request": {"model": "nano", "trials": 20, "seed": 0, "identity": {"strength": 0.9}}, "answers": []}
    (tmp_path / "score.json").write_text(json.dumps(score | said))
    (tmp_path / "other.json").write_text(json.dumps(score | said | {"painted": share | {"right": 18, "share": 0.9}}))
    arguments = [str(model), "--run", str(runs["infinite-you"]), "--score", str(tmp_path / "score.json")]
    stages = [f"--{name}={runs[name]}" for name in ("autoencoder", "recogniser", "flux")]
    main([*arguments, str(tmp_path / "other.json"), *stages])
    text = (model / "README.md").read_text()
    assert "| painted, by the model's own recogniser, which flatters | 19 of 20 | 0.950 | 0.760 to 0.990 |" in text
    assert "| painted, by a recogniser that the model never met | 18 of 20 |" in text
    assert "`gesso eval faces --model nano --trials 20 --seed 0 --identity-strength 0.9`" in text
    assert "Recogniser on held-out people: 0." in text and "Flux on held-out people: loss" in text
    assert "`gesso train tiny-recogniser`, then `gesso train tiny-faces-flux`, then `gesso train tiny-infinite" in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("`gesso train"))
    kept = {"score.json", "score-other-judge.json", "samples.png", "loss.png", "training-flux.json"}
    assert kept <= {path.name for path in model.iterdir()}
    (tmp_path / "score.json").write_text(json.dumps({"score": "shapes"}))
    with pytest.raises(SystemExit, match="is no likeness-score; make it with gesso eval faces --output"):
        main(arguments)


def test_the_command_prints_a_table_and_refuses_what_it_cannot_score(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(runs["infinite-you"] / "export")
    ended = call(capsys, "eval", "faces", "--model", model, "--trials", "20", "-o", tmp_path / "score.json")
    assert ended.status == 0 and "in painted pictures" in ended.out and "by chance" in ended.out
    assert json.loads((tmp_path / "score.json").read_text())["painted"]["asked"] == 20
    assert "from 20 to" in call(capsys, "eval", "faces", "--model", model, "--trials", "3").error
    nobody = call(capsys, "eval", "faces", "--model", runs["flux"] / "export", "--trials", "20")
    assert "holds no recogniser" in nobody.error
