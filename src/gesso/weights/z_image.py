"""Z-Image's networks from a folder in diffusers' layout, strict by name and shape. Reads local files only.

S3-DiT is ours; the autoencoder is diffusers', Qwen3 and SigLIP 2 are transformers'. All are made without memory and
then take the tensors themselves. With `weights` false they stay so, for planning.
Not here: which folders (`catalogue`), schedules and defaults, pipelines (`engine/loading`), nano models (`flow_nano`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from gesso.errors import FileError, MissingError, WeightsError
from gesso.models.qwen_text import QwenText, build, is_left_out, plain_names
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import S3DiT
from gesso.models.siglip_pictures import SiglipPictures
from gesso.weights.catalogue import read_config
from gesso.weights.files import fill, read_tensors
from gesso.weights.infinity import parse

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Made = TypeVar("Made")
Network = TypeVar("Network", bound=nn.Module)

_TOKENIZERS = ("tokenizer.json", "vocab.json")
_MENDED = "fetch it again"
_INSTALL = "pip install 'gesso[diffusion]'"
_UNUSABLE = (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AttributeError, OSError)


def load_transformer(folder: Path, dtype: torch.dtype, *, weights: bool = True) -> S3DiT:
    """S3-DiT of a model's folder, on the CPU.

    Raises FileError for a configuration of something else, WeightsError for weights that do not fit it.
    """
    part = folder / "transformer"
    config = _config(part, "ZImageTransformer2DModel")
    network = _empty(part, lambda: S3DiT(parse(S3DiTConfig, config, part)))
    return _filled(network, part, dtype) if weights else network.to(dtype)


def load_autoencoder(folder: Path, *, weights: bool = True) -> AutoencoderKL:
    """The autoencoder of a model's folder, in float32, as the published code runs it. Raises as `load_transformer`."""
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise MissingError("diffusers, which holds this model's autoencoder,", _INSTALL) from error
    part = folder / "vae"
    config = _config(part, "AutoencoderKL")
    known = set(inspect.signature(AutoencoderKL.__init__).parameters)
    if unknown := sorted(set(config) - known):
        raise FileError(part, f"its configuration has unknown fields: {', '.join(unknown)}", _MENDED)
    network = _empty(part, lambda: AutoencoderKL(**config))
    return _filled(network, part, torch.float32) if weights else network


def load_text(folder: Path, dtype: torch.dtype, *, weights: bool = True) -> QwenText:
    """Qwen3 and its tokenizer, which lies beside it or in a folder of its own; its last layer is never made.

    Raises MissingError without transformers, FileError for what is absent or something else, WeightsError for weights
    that do not fit.
    """
    try:
        from transformers import AutoTokenizer, Qwen3Config
    except ImportError as error:
        raise MissingError("transformers, which reads prompts for this model,", _INSTALL) from error
    part = folder / "text_encoder"
    kind = read_config(part).get("model_type")
    if kind != "qwen3":
        raise FileError(part, f"holds a {kind}, not a qwen3", _MENDED)
    with _quiet():
        config = _made(part, lambda: Qwen3Config.from_pretrained(part, local_files_only=True))
        network = _made(part, lambda: build(config))
        own = folder / "tokenizer"
        tokenizer = _tokenizer(AutoTokenizer, own if own.is_dir() else part)
    if not weights:
        return QwenText(network.to(dtype), tokenizer)  # pyright: ignore[reportArgumentType]
    state = plain_names(read_tensors(part, dtype=dtype))
    kept = {name: value for name, value in state.items() if not is_left_out(name, config.num_hidden_layers)}
    fill(network, kept, part)
    return QwenText(network.eval().requires_grad_(False), tokenizer)


def load_pictures(folder: Path, dtype: torch.dtype) -> SiglipPictures | None:
    """SigLIP 2 and its processor, for models that edit; None where the folder has none. Raises as `load_text`."""
    part = folder / "siglip"
    if not part.is_dir():
        return None
    try:
        from transformers import AutoImageProcessor, Siglip2VisionModel
    except ImportError as error:
        raise MissingError("transformers, which reads pictures for this model,", _INSTALL) from error
    with _quiet():
        own = folder / "siglip_processor"
        processor = _made(own, lambda: AutoImageProcessor.from_pretrained(own, local_files_only=True))
        read: Any = _made(
            part,
            lambda: Siglip2VisionModel.from_pretrained(
                part,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            ),
        )
    network, loading = read
    mismatched = [f"{name}: {tuple(found)} where {tuple(wanted)} is wanted"
                  for name, found, wanted in loading["mismatched_keys"]]  # fmt: skip
    if loading["missing_keys"] or mismatched:  # these transformers has filled with random numbers
        raise WeightsError(part, missing=sorted(loading["missing_keys"]), mismatched=sorted(mismatched))
    return SiglipPictures(network.eval().requires_grad_(False), processor)


def _config(folder: Path, wanted: str) -> dict[str, Any]:
    """A part's configuration without what diffusers adds. Raises FileError that names what the part is, if not this."""
    config = read_config(folder)
    called = config.get("_class_name")
    if called != wanted:
        raise FileError(folder, f"holds diffusers' {called}, not {wanted}", _MENDED)
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _empty(source: Path, make: Callable[[], Network]) -> Network:
    """A network on the meta device. Raises as `_made`."""
    with torch.device("meta"):
        return _made(source, make)


def _made(source: Path, make: Callable[[], Made]) -> Made:
    """What is made of a configuration. Raises FileError for one that fits nothing."""
    try:
        return make()
    except MemoryError:
        raise
    except _UNUSABLE as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileError(source, f"cannot be used ({reason})", _MENDED) from error


def _filled(network: Network, folder: Path, dtype: torch.dtype) -> Network:
    fill(network, read_tensors(folder, dtype=dtype), folder)
    return network.eval().requires_grad_(False)


def _tokenizer(automatic: Any, folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZERS):  # transformers would make up an empty one
        raise FileError(folder, f"holds no tokenizer ({' or '.join(_TOKENIZERS)})", _MENDED)
    try:
        tokenizer = automatic.from_pretrained(folder, local_files_only=True)
    except (MemoryError, RuntimeError):  # says nothing about the folder
        raise
    except Exception as error:  # whatever its many readers raise for files that are damaged
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileError(folder, f"holds no tokenizer that can be read ({reason})", _MENDED) from error
    if not tokenizer.chat_template or not tokenizer.is_fast:
        raise FileError(folder, "holds a tokenizer without a chat template, or without tokenizer.json", _MENDED)
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and reports on stderr: what is wrong with a folder is raised."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
