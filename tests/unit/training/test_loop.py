"""The loop with a task of one number: what ends it, what it writes, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gesso.errors import FileError, RequestError, RunError
from gesso.training import checkpoint
from gesso.training.loop import LoopSettings, Trainer
from tests.unit.training.tiny_recipes import tiny_loop

FULL = Path("/dev/full")  # every write to it fails as on a full disk
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


class OneNumber:
    """Pulls a number towards 1; at step `breaks` its loss, or its gradient, is no number."""

    def __init__(self, breaks: int | None = None, gradient_only: bool = False) -> None:
        self._network = nn.Linear(1, 1)
        nn.init.zeros_(self._network.weight)
        nn.init.zeros_(self._network.bias)
        self.breaks, self.gradient_only = breaks, gradient_only
        self.evaluated: list[float] = []
        self.exported: list[tuple[float, dict[str, object]]] = []

    @property
    def network(self) -> nn.Module:
        return self._network

    def heavy_modules(self) -> list[nn.Module]:
        return []

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        value = self._network(torch.ones(1, 1))
        loss = (value - 1).square().mean()
        if step == self.breaks:
            loss = (value * 0).sqrt().sum() if self.gradient_only else loss * math.nan
        return loss, {"value": value.detach().squeeze()}

    def evaluate(self) -> dict[str, float]:
        assert not self._network.training
        value = float(self._network(torch.ones(1, 1)))
        self.evaluated.append(value)
        return {"value": value}

    def samples(self) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def export(self, folder: Path, facts: Mapping[str, object]) -> None:
        self.exported.append((float(self._network.bias.detach()), dict(facts)))


def settings(**fields: object) -> LoopSettings:
    return tiny_loop(**({"precision": "fp32", "learning_rate": 0.1} | fields))


def trainer(task: OneNumber, folder: Path, **fields: object) -> Trainer:
    return Trainer(task, settings(**fields), folder, recipe={"recipe": "one number"})


def test_a_run_leaves_log_sheets_checkpoints_and_recipe(tmp_path: Path) -> None:
    task = OneNumber()
    figures = trainer(task, tmp_path / "deep/run", steps=7, log_every=3).run()
    folder = tmp_path / "deep/run"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        ".lock",
        "log.jsonl",
        "recipe.json",
        *(f"samples-0000000{step}.png" for step in (3, 6, 7)),
        *(f"step-0000000{step}.pt" for step in (6, 7)),
    ]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 7]
    assert [line["step"] for line in lines if "evaluation/value" in line] == [3, 6, 7]
    assert {"loss", "gradient_norm", "value", "seconds_per_step", "seconds", "step"} == set(lines[0])
    assert json.loads((folder / "recipe.json").read_text()) == {"recipe": "one number"}
    assert figures == {"value": task.evaluated[-1]}


def test_scores_and_export_are_the_averages(tmp_path: Path) -> None:
    """And the parameters themselves are back afterwards."""
    task = OneNumber()
    run = trainer(task, tmp_path)
    run.run()
    own = {name: float(value.detach()) for name, value in task.network.named_parameters()}
    averages = {name: float(value) for name, value in run.average.averages.items()}
    assert task.evaluated[-1] == pytest.approx(averages["weight"] + averages["bias"])
    (bias, facts) = task.exported[-1]
    assert bias == averages["bias"] != own["bias"]
    assert facts == {"recipe": {"recipe": "one number"}, "evaluation": {"value": task.evaluated[-1]}}


def test_the_report_sees_every_line(tmp_path: Path) -> None:
    seen: list[tuple[int, int, set[str]]] = []
    run = Trainer(
        OneNumber(),
        settings(steps=2),
        tmp_path,
        recipe={},
        report=lambda step, steps, figures: seen.append((step, steps, set(figures))),
    )
    run.run()
    assert [(step, steps) for step, steps, _ in seen] == [(1, 2), (2, 2), (2, 2)]
    assert seen[-1][2] == {"evaluation/value"}


@pytest.mark.parametrize(("gradient_only", "words"), [(False, "loss is nan"), (True, "gradient norm is nan")])
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_run_that_breaks_stops_and_can_be_resumed(
    tmp_path: Path, gradient_only: bool, words: str, log_every: int
) -> None:
    """However seldom it logs, no checkpoint is written that resuming could not mend."""
    task = OneNumber(breaks=3, gradient_only=gradient_only)
    with pytest.raises(RunError, match=f"{words} at step 4; lower learning_rate and resume"):
        trainer(task, tmp_path, log_every=log_every, checkpoint_every=1).run()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 3
    trainer(OneNumber(), tmp_path, log_every=log_every, checkpoint_every=1, learning_rate=0.01).run(resume=True)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    for folder in (tmp_path / "run", tmp_path / "run/below"):
        with pytest.raises(FileError, match="cannot be written to") as caught:
            trainer(OneNumber(), folder).run()
        assert "\n" not in str(caught.value)


@needs_full
def test_a_full_disk_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The run ends in one line, the older checkpoint stays, nothing half-written is left, and the run can go on."""
    (tmp_path / "step-00000004.partial").symlink_to(FULL)

    def put_back(step: int, steps: int, figures: Mapping[str, float]) -> None:
        if step == 4 and not (tmp_path / "step-00000004.partial").is_symlink():
            (tmp_path / "step-00000004.partial").symlink_to(FULL)

    run = Trainer(OneNumber(), settings(), tmp_path, recipe={}, report=put_back)
    with pytest.raises(RunError, match=r"checkpoint .*step-00000004\.pt could not be written") as caught:
        run.run()
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002.pt"]
    trainer(OneNumber(), tmp_path).run(resume=True)


def test_resuming_takes_the_optimizer_settings_of_the_run(tmp_path: Path) -> None:
    """What the recipe says now, and records, is what the optimizer does."""
    trainer(OneNumber(), tmp_path, steps=4).run()
    again = trainer(OneNumber(), tmp_path, steps=8, weight_decay=0.5, betas=(0.1, 0.2))
    again.run(resume=True)
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.5, 0.0]
    assert [group["betas"] for group in again.optimizer.param_groups] == [(0.1, 0.2)] * 2


@needs_full
def test_a_full_disk_while_the_log_is_written(tmp_path: Path) -> None:
    def fill(step: int, steps: int, figures: Mapping[str, float]) -> None:
        if step == 3:
            (tmp_path / "log.jsonl").unlink(missing_ok=True)
            (tmp_path / "log.jsonl").symlink_to(FULL)

    run = Trainer(OneNumber(), settings(), tmp_path, recipe={}, report=fill)
    with pytest.raises(RunError, match=r"log\.jsonl could not be written: No space left on device; make room"):
        run.run()


def test_a_full_disk_while_a_sheet_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(RunError, match="no space left on device"):
        trainer(OneNumber(), tmp_path).run()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("log_every", 0),
        ("evaluate_every", -1),
        ("checkpoint_every", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("clip", math.inf),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("final_rate", 2.0),
        ("average_decay", 1.5),
        ("betas", (0.9, 1.0)),
        ("precision", "fp8"),
        ("seed", -1),
        ("seed", 128),
        ("threads", 0),
        ("attention", ()),
        ("attention", ("FAST",)),
    ],
)
def test_settings_out_of_range(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        settings(**{field: value})
    assert caught.value.field == field
