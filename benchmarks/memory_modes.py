"""Each memory mode of a FLUX and a Z-Image with random weights: predicted and measured peak, and how much slower it is.

    python -m benchmarks.memory_modes [--model flux|z-image] [--modes full,offload] [--side 256] [--device cpu]

The models have about 1.5 GB in float32 and are made in a temporary folder in the official layout. Every mode runs in
a process of its own that has painted with a tiny model of the family before, so that libraries do not count. On the
CPU the peak is that of the process's resident memory beyond what it was before loading; on a GPU that of PyTorch's
allocator. Wanted: prediction within a tenth of it. The slowdown is that of a second picture, prompt to pixels, against
`full`: prompts are read and weights come and go in it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Claims, arguments
from gesso.devices import CPU
from gesso.memory_modes import SHOWN

PROMPT = "two red stars above a blue ring"
WANTED = 0.1


def write_flux(folder: Path, *, tiny: bool) -> Path:
    """A FLUX in diffusers' layout: 250 M parameters in the transformer, 110 M in T5; or next to nothing."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from tests.tiny_flux import DYNAMIC, clip_tokenizer, t5_tokenizer

    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    clip: dict[str, Any] = {
        "vocab_size": len(clip_words),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": clip_words.bos_token_id,
        "eos_token_id": clip_words.eos_token_id,
    }
    width, inner, layers = (64, 128, 1) if tiny else (768, 3072, 16)
    t5 = T5Config(
        vocab_size=len(t5_words), d_model=width, d_kv=64, d_ff=inner, num_layers=layers, num_heads=width // 64
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1 if tiny else 2,
        num_single_layers=1 if tiny else 8,
        num_attention_heads=2 if tiny else 18,
        attention_head_dim=64,
        joint_attention_dim=width,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=True,
    )
    made = FluxPipeline(
        transformer=transformer,
        vae=AutoencoderKL(**_autoencoder(tiny)),
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip)),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer=clip_words,
        tokenizer_2=t5_words,
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
    )
    made.save_pretrained(folder)
    return folder


def write_z_image(folder: Path, *, tiny: bool) -> Path:
    """A Z-Image in diffusers' layout: 250 M parameters in the transformer, 100 M in Qwen3; or next to nothing."""
    from dataclasses import asdict

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3Model

    from gesso.models.s3dit.config import S3DiTConfig
    from gesso.models.s3dit.transformer import S3DiT
    from tests.tiny_z_image import randomize, tokenizer

    width, text_width = (64, 64) if tiny else (1152, 768)
    network = S3DiTConfig(
        in_channels=16,
        dim=width,
        n_layers=1 if tiny else 12,
        n_refiner_layers=1 if tiny else 2,
        n_heads=width // 64,
        n_kv_heads=width // 64,
        cap_feat_dim=text_width,
        axes_dims=(16, 24, 24),
    )
    text = Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=2 if tiny else 12,
        num_attention_heads=text_width // 64,
        num_key_value_heads=text_width // 64,
        head_dim=64,
    )
    scheduler = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}
    for part, values in (
        ("model_index.json", {"_class_name": "ZImagePipeline"}),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"} | scheduler),
        ("transformer/config.json", {"_class_name": "ZImageTransformer2DModel"} | asdict(network)),
    ):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_text(json.dumps(values), encoding="utf-8")
    transformer = S3DiT(network)
    randomize(transformer, 0)
    save_file(transformer.state_dict(), folder / "transformer/diffusion_pytorch_model.safetensors")
    AutoencoderKL(**_autoencoder(tiny)).save_pretrained(folder / "vae")
    Qwen3Model(text).save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def _autoencoder(tiny: bool) -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32,) * 4 if tiny else (64, 128, 256, 256),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


WRITERS = {"flux": write_flux, "z-image": write_z_image}


def measured(folder: Path, tiny: Path, mode: str, side: int, steps: int, device: str, dtype: str) -> dict[str, float]:
    """In this process, which should be fresh: predicted and measured peak, seconds to load and of two pictures."""
    from gesso.engine.loading import load_pipeline, load_planner
    from gesso.engine.memory import peaks
    from gesso.request import GenerationRequest

    def ask(model: Path, seed: int, edge: int) -> GenerationRequest:
        fields = {"steps": steps, "guidance": 3.0, "width": edge, "height": edge}
        return GenerationRequest.model_validate({"prompt": PROMPT, "model": str(model), "seed": seed, **fields})

    _paint(load_pipeline(str(tiny), device, dtype, memory=mode), ask(tiny, 1, 64))
    planner = load_planner(str(folder), device, dtype)
    assert planner is not None
    foreseen = {str(found): size for found, size in peaks(planner, planner.plan(ask(folder, 1, side)), mode).items()}
    del planner
    before = start_counting(device)
    started = time.perf_counter()
    pipeline = load_pipeline(str(folder), device, dtype, memory=mode)
    loaded = time.perf_counter()
    _paint(pipeline, ask(folder, 1, side))
    first = time.perf_counter()
    _paint(pipeline, ask(folder, 2, side))
    second = time.perf_counter()
    return {
        "predicted": foreseen[mode],
        "measured": peak_of(device) - before,
        "load": loaded - started,
        "first": first - loaded,
        "second": second - first,
    }


def _paint(pipeline: Any, request: Any) -> None:
    plan = pipeline.plan(request)
    (conditioning,) = pipeline.encode([plan])
    state = pipeline.begin(plan, conditioning, 0)
    while state.remaining:
        pipeline.step([state])
    for _ in pipeline.decode([state]):
        pass


def start_counting(device: str) -> int:
    """Bytes that count for nothing; the peak is counted from here."""
    gc.collect()
    if device != CPU:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak_of(device: str) -> int:
    return _status("VmHWM") if device == CPU else torch.cuda.max_memory_allocated()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=sorted(WRITERS), help="else both")
    parser.add_argument("--modes", default=",".join(str(mode) for mode in SHOWN))
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default=CPU)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--one", nargs=2, type=Path, metavar=("FOLDER", "TINY"), help="measure one mode in this process"
    )
    given = parser.parse_args()
    if given.one:
        folder, tiny = given.one
        print(json.dumps(measured(folder, tiny, given.modes, given.side, given.steps, given.device, given.dtype)))
        return
    claims = Claims("memory-modes", given.save)
    same = ["--side", str(given.side), "--steps", str(given.steps), "--device", given.device, "--dtype", given.dtype]
    for model in [given.model] if given.model else sorted(WRITERS):
        with tempfile.TemporaryDirectory() as room:
            torch.manual_seed(0)
            folders = [str(WRITERS[model](Path(room) / name, tiny=name == "tiny")) for name in ("whole", "tiny")]
            plain = 0.0
            for mode in given.modes.split(","):
                command = [sys.executable, "-m", "benchmarks.memory_modes", "--one", *folders, "--modes", mode, *same]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                plain = plain or found["second"]
                claims.report(
                    f"{model}, {mode}: peak MiB measured, against predicted (wanted: within {WANTED:.0%})",
                    found["measured"] / 2**20,
                    found["predicted"] / 2**20,
                    found["measured"] / found["predicted"],
                    slowdown=found["second"] / plain,
                    seconds=found["second"],
                    seconds_to_load=found["load"],
                    side=given.side,
                    dtype=given.dtype,
                )
    claims.keep()


if __name__ == "__main__":
    main()
