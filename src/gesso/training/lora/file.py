"""What training gives: `lora.safetensors` in diffusers' and PEFT's spelling, and what it says of itself.

Metadata has kohya's names (`ss_…`) and ModelSpec's (`modelspec.…`) for what others read, and names of our own for the
rest. The same training writes the same bytes. Not here: names of tensors (`layers`), reading such files (`adapters`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from gesso import __version__
from gesso.training.export import whole_folder

NAME = "lora.safetensors"
# How ModelSpec calls families; the rest go by our names.
_ARCHITECTURES = {"flux": "flux-1-dev/lora", "sdxl": "stable-diffusion-xl-v1-base/lora"}


def metadata(
    *,
    family: str,
    model: str,
    digest: str,
    trigger: str,
    rank: int,
    alpha: float,
    size: tuple[int, int],
    pictures: int,
    loop: Mapping[str, object],
) -> dict[str, str]:
    """What the file says of itself, all of it text. `size` is (width, height), `loop` the loop's settings."""
    said: dict[str, object] = {
        "format": "pt",
        "software": f"gesso {__version__}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES.get(family, f"{family}/lora"),
        "modelspec.resolution": f"{size[0]}x{size[1]}",
        "modelspec.trigger_phrase": trigger,
        "ss_base_model_version": family,
        "ss_sd_model_name": model,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_tag_frequency": json.dumps({"data": {trigger: pictures}}) if trigger else "",
        "ss_num_train_images": pictures,
        "ss_steps": loop.get("steps"),
        "ss_total_batch_size": loop.get("batch"),
        "ss_learning_rate": loop.get("learning_rate"),
        "ss_seed": loop.get("seed"),
        "gesso.version": __version__,
        "gesso.base_model": model,
        "gesso.base_digest": digest,
    }
    return {name: str(value) for name, value in said.items() if value not in (None, "")}


def write(folder: Path, tensors: Mapping[str, Tensor], said: Mapping[str, str], facts: Mapping[str, object]) -> None:
    """Write the LoRA and `training.json` as a whole folder. Raises RunError."""
    with whole_folder(folder) as aside:
        (aside / NAME).write_bytes(_ordered(save(dict(tensors), dict(said))))
        (aside / "training.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")


def _ordered(content: bytes) -> bytes:
    """The same file with its metadata in order, which safetensors writes in another one each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]
