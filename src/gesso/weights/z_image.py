"""Z-Image's networks from a folder in diffusers' layout, strict by name and shape. Reads local files only.

S3-DiT is ours; the autoencoder is diffusers', Qwen3 and SigLIP 2 are transformers'. All are made without memory and
then take the tensors themselves. With `weights` false they stay so, for planning.
Not here: which folders (`catalogue`), schedules and defaults, pipelines (`engine/loading`), nano models (`flow_nano`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gesso.errors import FileError, MissingError
from gesso.models import components
from gesso.models.diffusers_parts import INSTALL
from gesso.models.qwen_text import QwenText, build, is_left_out, plain_names
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import S3DiT
from gesso.models.siglip_pictures import SiglipPictures
from gesso.models.transformers_parts import check_tokenizer, quiet, read_automatic, read_network, read_tokenizer, usable
from gesso.weights import diffusers_layout
from gesso.weights.configuration import read_config
from gesso.weights.files import check_shards, fill, read_tensors
from gesso.weights.infinity import parse

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import Qwen3Model

PICTURE_PARTS = ("siglip", "siglip_processor")

_TOKENIZERS = ("tokenizer.json", "vocab.json")
_MENDED = "fetch it again"


def load_transformer(folder: Path, dtype: torch.dtype, *, weights: bool = True) -> S3DiT:
    """S3-DiT of a model's folder, on the CPU.

    Raises FileError for a configuration of something else, WeightsError for weights that do not fit it.
    """
    part = folder / "transformer"
    config = parse(S3DiTConfig, diffusers_layout.part_config(part, "ZImageTransformer2DModel"), part)
    return diffusers_layout.filled(part, "S3DiT", lambda: S3DiT(config), dtype, weights=weights)


def load_autoencoder(folder: Path, *, weights: bool = True) -> AutoencoderKL:
    """The autoencoder of a model's folder, in float32, as the published code runs it. Raises as `load_transformer`."""
    return diffusers_layout.load_autoencoder(folder, torch.float32, weights=weights)


def load_text(folder: Path, dtype: torch.dtype, *, weights: bool = True) -> QwenText:
    """Qwen3 and its tokenizer, which lies beside it or in a folder of its own; its last layer is never made.

    Raises MissingError without transformers, FileError for what is absent or something else, WeightsError for weights
    that do not fit.
    """
    try:
        from transformers import AutoTokenizer, Qwen3Config
    except ImportError as error:
        raise MissingError("transformers, which reads prompts for this model,", INSTALL) from error
    part = folder / "text_encoder"
    kind = read_config(part).get("model_type")
    if kind != "qwen3":
        raise FileError(part, f"holds a {kind}, not a qwen3", _MENDED)
    own = folder / "tokenizer" if (folder / "tokenizer").is_dir() else part
    with quiet():
        config = usable(part, lambda: Qwen3Config.from_pretrained(part, local_files_only=True))
        network = usable(part, lambda: build(config))
        tokenizer = read_tokenizer(AutoTokenizer, own, _TOKENIZERS)
    if not tokenizer.chat_template or not tokenizer.is_fast:
        raise FileError(own, "holds a tokenizer without a chat template, or without tokenizer.json", _MENDED)
    check_tokenizer(tokenizer, own, config.vocab_size, pads=False)
    if not weights:
        return QwenText(network.to(dtype), tokenizer)  # pyright: ignore[reportArgumentType]
    layers = config.num_hidden_layers
    held = components.shared(part, "Qwen3 without its last layer", dtype, lambda: _filled(network, part, dtype, layers))
    return QwenText(held, tokenizer)


def _filled(network: Qwen3Model, part: Path, dtype: torch.dtype, layers: int) -> Qwen3Model:
    """The network with the tensors of its folder, those of so many layers aside that it has no place for."""
    state = plain_names(read_tensors(part, dtype=dtype, pickles=False, later=True))
    fill(network, {name: value for name, value in state.items() if not is_left_out(name, layers)}, part)
    return network.eval().requires_grad_(False)


def load_pictures(folder: Path, dtype: torch.dtype) -> SiglipPictures | None:
    """SigLIP 2 and its processor, for models that edit; None where the folder has none. Raises as `load_text`."""
    part, own = (folder / name for name in PICTURE_PARTS)
    if not part.is_dir():
        return None
    try:
        from transformers import AutoImageProcessor, Siglip2VisionModel
    except ImportError as error:
        raise MissingError("transformers, which reads pictures for this model,", INSTALL) from error
    check_shards(part)
    with quiet():
        processor: Any = usable(own, lambda: read_automatic(AutoImageProcessor, own))
        network = read_network(Siglip2VisionModel, part, dtype)
    return SiglipPictures(network, processor)
