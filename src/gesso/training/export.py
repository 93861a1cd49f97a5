"""A trained model as files: bfloat16 safetensors, a configuration, and a manifest of digests.

Written aside and renamed as a whole folder. `weights/infinity` and `weights/flow_nano` read what this writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from gesso.errors import RunError
from gesso.weights import manifest


def save_model(
    folder: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, object],
    facts: Mapping[str, object],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write `<part>.safetensors` for each part, `config.json`, `training.json` and `manifest.json`.

    Raises RunError where that fails, as `whole_folder` does.
    """
    with whole_folder(folder) as aside:
        for part, state in parts.items():
            tensors = {name: value.detach().to(dtype).contiguous() for name, value in state.items()}
            (aside / f"{part}.safetensors").write_bytes(save(tensors))
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (aside / "training.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
        (aside / "manifest.json").write_text(json.dumps(manifest.make(aside), indent=1) + "\n")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder beside `folder` to write into, which takes its place if the block succeeds.

    Raises RunError where writing fails; an older folder then lies in its place, or beside it as `<name>.old`.
    """
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        _replace(folder, aside)
    except OSError as error:
        raise RunError(f"model {folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(folder: Path, aside: Path) -> None:
    """Put the new folder where the old one is; between two renames, and never longer, there is neither."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    aside.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
