"""LoRA training: every family learns, what is written does what was trained, and runs go on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gesso.adapters.apply import Adapted, Use
from gesso.adapters.formats.classification import classify
from gesso.adapters.formats.reading import read_adapter
from gesso.devices import CPU
from gesso.engine.loading import load_pipeline
from gesso.errors import FileError, RequestError, RunError
from gesso.training.lora.task import LoraTask
from tests import tiny_flux, tiny_hunyuan_video, tiny_infinity, tiny_qwen_image, tiny_sdxl, tiny_z_image
from tests.tiny_lora import lora_recipe, write_pictures
from tests.unit.training.tiny_recipes import exported, log_of, same, state_of, stop_at, train

WRITERS: dict[str, Callable[[Path], Path]] = {
    "flux": tiny_flux.write_tiny_flux,
    "z-image": tiny_z_image.write_published,
    "qwen-image": tiny_qwen_image.write_tiny_qwen_image,
    "hunyuan-video": tiny_hunyuan_video.write_tiny_hunyuan_video,
    "sdxl": tiny_sdxl.write_tiny_sdxl,
    "infinity": tiny_infinity.write_tiny_infinity,
}
SIDES = {"hunyuan-video": 32, "infinity": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_tiny_flux(tmp_path_factory.mktemp("models") / "flux")


def _task(model: Path, data: Path, family: str, **fields: object) -> LoraTask:
    side = SIDES.get(family, 64)
    task = lora_recipe(model, data, {"width": side, "height": side, **fields}).task()
    assert isinstance(task, LoraTask)
    return task


def _said(task: LoraTask, call: Callable[[], object]) -> Tensor:
    """What the base network says while something is done."""
    said: list[Tensor] = []

    def keep(_module: object, _arguments: object, output: Any) -> None:
        said.extend(output if isinstance(output, list | tuple) else [getattr(output, "sample", output)])

    handle = task.base.register_forward_hook(keep)
    with torch.no_grad():
        call()
    handle.remove()
    return torch.cat([part.flatten() for part in said])


def _output(task: LoraTask) -> Tensor:
    """Of a batch whose noise and times are always the same."""
    latents, texts = task._batch(task.examples[:2])
    shares, generator = torch.tensor([0.3, 0.7]), torch.Generator().manual_seed(0)
    return _said(task, lambda: task.objective.loss(latents, texts, shares, generator))


def _check_first_step(task: LoraTask) -> None:
    """The network is told in training what it is told in painting: a picture's first step, which is pure noise."""
    (plan,) = task.plans
    assert plan.request.seed is not None
    state = task.pipeline.begin(plan, task.pipeline.encode([plan])[0], 0)
    share = 1.0
    if task.family == "sdxl":  # whose first step is not at the end of the schedule, and begins as if it were
        share, scheduler = (float(state.timestep) + 0.5) / 1000, state.leg.scheduler
        state.latent_1Chw = state.latent_1Chw * (scheduler.sigmas[0] / scheduler.init_noise_sigma)
    painted = _said(task, lambda: task.pipeline.step([state]))
    nothing, text = torch.zeros_like(task.material.latent(task.examples[0]))[None], task.text.row(plan.request.prompt)
    generator = torch.Generator().manual_seed(plan.request.seed)
    learned = _said(task, lambda: task.objective.loss(nothing, [text], torch.tensor([share]), generator))
    torch.testing.assert_close(learned, painted[: learned.numel()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", WRITERS)
def test_what_is_written_does_what_was_trained(family: str, data: Path, tmp_path: Path) -> None:
    model = WRITERS[family](tmp_path / f"{family}-model")
    task = _task(model, data, family, alpha=3, trigger="chalk", caption_drop=0.5)
    if family != "infinity":
        _check_first_step(task)
    weights = {name: value.clone() for name, value in task.base.state_dict().items()}
    plain = _output(task)
    task.prepare(tmp_path, lambda made: None)
    assert [name for network in task.text.networks() for name, p in network.named_parameters() if not p.is_meta] == []
    for step in range(2):
        task.loss(step)[0].backward()
    gradients = [layer.get_parameter("up.weight").grad for layer in task.network.layers.values()]
    # Of a last block's text, nothing is read any more.
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) >= 0.6 * len(gradients)
    assert torch.equal(_output(task), plain)  # nothing is added before the first step
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in task.network.layers.values():
            up = layer.get_parameter("up.weight")
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
    trained = _output(task)
    with torch.no_grad():
        figures = task.evaluate()
    assert figures["loss"] != figures["loss_without"]
    assert task.samples().width > task.samples().height  # without, and with
    task.export(tmp_path / "export", {})

    path = tmp_path / "export" / "lora.safetensors"
    assert family in classify(path).families
    with task.network.put_aside():
        assert torch.equal(_output(task), plain)
        adapter = read_adapter(path, {task.role: task.base})
        assert not adapter.warnings
        with Adapted({task.role: task.base}).using([(Use(adapter),)]):
            applied = _output(task)
    assert (trained - plain).abs().max() > 1e-3
    torch.testing.assert_close(applied, trained, rtol=1e-4, atol=1e-4 * float(trained.abs().max()))
    assert all(torch.equal(value, weights[name]) for name, value in task.base.state_dict().items())


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_diffusers_reads_it_alike(family: str, data: Path, tmp_path: Path) -> None:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    task = _task(WRITERS[family](tmp_path / family), data, family, alpha=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in task.network.layers.values():
            up = layer.get_parameter("up.weight")
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
    trained = _output(task)
    task.export(tmp_path / "export", {})
    kind = FluxPipeline if family == "flux" else StableDiffusionXLPipeline
    theirs: Any = kind.from_pretrained(tmp_path / family)
    theirs.load_lora_weights(tmp_path / "export", weight_name="lora.safetensors")
    setattr(task.pipeline, task.role, getattr(theirs, task.role))
    task.base = getattr(theirs, task.role)
    torch.testing.assert_close(_output(task), trained, rtol=1e-4, atol=1e-4)


def test_a_stopped_run_goes_on_bit_for_bit(flux: Path, data: Path, tmp_path: Path) -> None:
    """Once before there is a checkpoint, once after one."""
    recipe = lora_recipe(flux, data, {"held_out": 1, "trigger": "chalk"})
    train(recipe, tmp_path / "whole")
    for step in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", resume=step > 1, report=stop_at(step))
    train(recipe, tmp_path / "run", resume=True)
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    assert exported(tmp_path / "run") == exported(tmp_path / "whole")
    told = classify(tmp_path / "run" / "export" / "lora.safetensors")
    assert told.facts() == {"base model": flux.name, "trained words": "chalk"}  # as `gesso lora show` has it
    said = told.metadata
    assert (said["modelspec.trigger_phrase"], said["ss_num_train_images"], said["ss_steps"]) == ("chalk", "2", "6")
    assert len(said["gesso.base_digest"]) == 64
    (tmp_path / "other").symlink_to(flux)
    with pytest.raises(FileError, match=r"holds a run with model .*flux, not .*other; name another folder"):
        train(lora_recipe(tmp_path / "other", data), tmp_path / "run", resume=True)


def test_a_finished_run_is_exported_again(flux: Path, data: Path, tmp_path: Path) -> None:
    """And damaged material is made again."""
    recipe = lora_recipe(flux, data)
    figures = train(recipe, tmp_path / "run")
    before = exported(tmp_path / "run")
    for path in (tmp_path / "run" / "material").rglob("*.safetensors"):
        path.write_bytes(b"?")
    assert train(recipe, tmp_path / "run", resume=True) == figures
    assert exported(tmp_path / "run") == before


def test_recomputing_changes_nothing(data: Path, tmp_path: Path) -> None:
    for family in ("flux", "z-image"):
        model = WRITERS[family](tmp_path / family)
        losses, gradients = [], []
        for recompute in ("false", "true"):
            task = _task(model, data, family, recompute=recompute)
            loss = task.loss(0)[0]
            loss.backward()
            losses.append(loss.detach())
            assert task.samples().height
            gradients.append([layer.get_parameter("up.weight").grad for layer in task.network.layers.values()])
        torch.testing.assert_close(losses[0], losses[1])
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rank": 0}, "rank 0 is not from 1 to 4096"),
        ({"rank": 33}, "rank 33 is not at most 32, the size of transformer_blocks.0.attn.to_q"),
        ({"steps": 0}, "steps 0 is not from 1 to"),
        ({"alpha": 0}, "alpha 0"),
        ({"targets": '["attn.to_x"]'}, 'targets "attn.to_x" is not layers of this flux; attention, feed_forward, or'),
        ({"width": 60}, "width 60 is not a multiple of 16"),
        ({"dtype": "float16"}, "small gradients are lost"),
        ({"device": "gpu"}, "one of: cpu"),
        ({"flip_scales": 2}, "not one field of the recipe"),
        ({"generation": '[["steps", 0]]'}, "steps 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(flux: Path, data: Path, fields: dict[str, object], problem: str) -> None:
    with pytest.raises(RequestError) as caught:
        lora_recipe(flux, data, fields).task()
    assert problem in str(caught.value)


def test_the_base_is_its_own(flux: Path, data: Path, tmp_path: Path) -> None:
    """Whoever paints with the same model in this process sees nothing of it."""
    painter: Any = load_pipeline(str(flux), CPU, "float32")
    task = lora_recipe(flux, data).task()
    assert isinstance(task, LoraTask)
    task.prepare(tmp_path, lambda made: None)
    assert task.base is not painter.transformer
    assert not any(parameter.is_meta for parameter in painter.text.parameters())
    assert not any(module._forward_hooks for module in painter.transformer.modules())


def test_layers_may_be_named_by_their_ends(flux: Path, data: Path) -> None:
    task = lora_recipe(flux, data, {"targets": '["to_q", "proj_out"]'}).task()
    assert isinstance(task, LoraTask)
    ends = {name.rpartition("-")[2] for name in task.network.layers}
    assert ends == {"to_q", "proj_out"}


def test_a_loss_that_is_no_number_ends_the_run(flux: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"loss is (nan|inf) at step \d; lower learning_rate and resume"):
        train(lora_recipe(flux, data, {"learning_rate": "1e30", "warmup": 0}), tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()


def test_its_recipe_is_plain_data(flux: Path, data: Path) -> None:
    recipe = lora_recipe(flux, data)
    assert json.loads(json.dumps(recipe.as_dict()))["settings"]["rank"] == 2
