"""Memory that FLUX.1 [dev] with InfiniteYou needs in each mode, foreseen on the meta device, beside what is published.

    python -m benchmarks.identity_memory [--width 864] [--height 1152] [--save]

The networks have their published sizes and no weights: nothing is fetched, a few seconds and no memory are used. A
folder of configurations stands for each model; tokenizers and the face detector are made up. The rival is the peak that
InfiniteYou's authors publish (their README), for modes that they lack that of the nearest. Not here: measuring a mode
(`benchmarks.memory_modes`), foreseeing (`weights/footprint`), which `gesso plan "…" --model flux-dev --identity FILE`
prints for files that are there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import Claims, arguments

PUBLISHED = {"full": 43, "offload": 30, "8bit": 24, "offload+8bit": 16}
"""GB (1e9 bytes), by our names of the modes."""
PROMPT = "A man, portrait, cinematic"

NETWORK: dict[str, Any] = {
    "in_channels": 64,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
}
AUTOENCODER: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
T5: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
}
_RESAMPLER_FILE = 338_000_000  # bytes, as published


def write_models(home: Path) -> None:
    """Configurations of FLUX.1 [dev] and of both variants of InfiniteYou, where the catalogue looks for them."""
    from transformers import CLIPTextConfig, T5Config

    from tests.tiny_flux import DYNAMIC, clip_tokenizer, t5_tokenizer
    from tests.tiny_infinite_you import PACK

    flux, words = home / "weights/flux-dev", clip_tokenizer()
    marks: dict[str, Any] = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    _write(flux / "model_index.json", {"_class_name": "FluxPipeline"})
    _write(flux / "scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"} | DYNAMIC)
    layers = {"num_layers": 19, "num_single_layers": 38}
    _write(flux / "transformer/config.json", {"_class_name": "FluxTransformer2DModel"} | NETWORK | layers)
    _write(flux / "vae/config.json", AUTOENCODER)
    CLIPTextConfig(**CLIP, **marks).save_pretrained(flux / "text_encoder")
    T5Config(**T5, feed_forward_proj="gated-gelu").save_pretrained(flux / "text_encoder_2")
    words.save_pretrained(flux / "tokenizer")
    t5_tokenizer().save_pretrained(flux / "tokenizer_2")
    part = home / "weights/infinite-you/infu_flux_v1.0/aes_stage2"
    layers = {"num_layers": 4, "num_single_layers": 10}
    _write(part / "InfuseNetModel/config.json", {"_class_name": "FluxControlNetModel"} | NETWORK | layers)
    pack = home / "weights/antelopev2"
    pack.mkdir()
    shutil.copy(PACK / "fake_scrfd.onnx", pack)
    (home / "weights/infinite-you/recognition_arcface_ir_se50.pth").touch()
    with (part / "image_proj_model.bin").open("wb") as file:
        file.truncate(_RESAMPLER_FILE)  # looked at for its size only


def foreseen(width: int, height: int) -> dict[str, int]:
    """Bytes at most by mode, as `gesso plan` says them, in bfloat16; of the home that is set."""
    from gesso.devices import CPU
    from gesso.engine.loading import load_planner
    from gesso.engine.memory import peaks
    from gesso.request import GenerationRequest
    from tests.tiny_infinite_you import PERSON

    planner: Any = load_planner("flux-dev", CPU, "bf16")
    request = GenerationRequest(
        prompt=PROMPT,
        model="flux-dev",
        width=width,
        height=height,
        identity=str(PERSON),  # type: ignore[arg-type]
    )
    return {str(mode): size for mode, size in peaks(planner, planner.plan(request)).items()}


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=864)
    parser.add_argument("--height", type=int, default=1152)
    given = parser.parse_args()
    claims = Claims("identity-memory", given.save)
    with tempfile.TemporaryDirectory() as home:
        os.environ["GESSO_HOME"] = home
        write_models(Path(home))
        sizes = foreseen(given.width, given.height)
    for mode, size in sizes.items():
        rival = PUBLISHED[mode.replace("model-offload", "offload").replace("group-offload", "offload")]
        claim = f"GB at most for FLUX.1 [dev] with InfiniteYou at {given.width}x{given.height}, {mode}"
        claims.report(claim, size / 1e9, rival, size / 1e9 / rival)
    claims.keep()


if __name__ == "__main__":
    main()
