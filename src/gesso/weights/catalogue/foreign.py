"""What lies in a file or folder, told by the names of its tensors and configurations: a model, a part, an adapter.

Nothing is read but headers, JSON, and a pickle's first bytes for names; nothing is executed. Not here: what becomes of
a model that is known (`local`), bytes that are no safetensors (`weights/headers`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from gesso.errors import FileError

_WHOLE = "name a model of the catalogue, a folder with a whole model, or a checkpoint of one"
_ADAPTER = "an adapter is added to a model, and is none itself"
_DIFFUSERS = "get the model as a folder in diffusers' layout"
_PART = f"it is a part of a model; {_WHOLE}"
INFINITY = 'name it in models.toml: path, layout = "infinity", files = [transformer, tokenizer, text encoder]'
"""The way out for an Infinity in its authors' layout, whose files do not say by themselves that they are one model."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Recognised:
    """What a file holds, in words that follow "holds"; the family if it is a whole model of one; else the way out."""

    what: str
    family: str = ""
    hint: str = ""


@dataclass(frozen=True)
class _Rule:
    """Holds for names of which each of `each` is a part of at least one, and where `none` is no part of any."""

    recognised: Recognised
    each: tuple[str, ...]
    none: tuple[str, ...] = ()

    def holds(self, names: str) -> bool:
        return all(part in names for part in self.each) and not any(part in names for part in self.none)


# What names of an Infinity's transformer and tokenizer begin with, and those of no other.
_INFINITY = ("text_proj_for_sos.", "encoder.down.0.block.0.conv1.conv.")
_LOOKED_INTO = 16  # files of a folder
_NAMES = 1 << 20  # bytes that a file of weights has its names in, whatever it is, or the first of them

# The first that holds. A name is looked for as "\nNAME\n", so that "\nx" means "begins with x".
_UNET = "\nmodel.diffusion_model.input_blocks."
_RULES = (
    *(
        _Rule(Recognised("a LoRA", hint=_ADAPTER), (part,))
        for part in (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "\nlora_", ".lora.", "hada_w1_a", ".lokr_w1")
    ),
    _Rule(Recognised("an IP-Adapter", hint=_ADAPTER), ("\nip_adapter.",)),
    _Rule(Recognised("a textual inversion", hint=_ADAPTER), ("\nemb_params\n",)),
    _Rule(Recognised("a ControlNet", hint=_ADAPTER), ("\ncontrol_model.",)),
    _Rule(Recognised("a ControlNet", hint=_ADAPTER), ("\ncontrolnet_",)),
    _Rule(
        Recognised("an SDXL checkpoint", family="sdxl"),
        (_UNET, "\nfirst_stage_model.", "\nconditioner.embedders.0.", "\nconditioner.embedders.1."),
    ),
    _Rule(
        Recognised("an SDXL refiner", family="sdxl-refiner"),
        (_UNET, "\nconditioner.embedders.0."),
        ("\nconditioner.embedders.1.",),
    ),
    _Rule(
        Recognised("a checkpoint of Stable Diffusion 1 or 2", hint=f"no family here reads it; {_WHOLE}"),
        (_UNET, "\ncond_stage_model."),
    ),
    _Rule(Recognised("a U-Net alone", hint=_PART), (_UNET,)),
    _Rule(Recognised("a U-Net alone", hint=_PART), ("\ndown_blocks.", "\nmid_block.", "\ntime_embedding.")),
    _Rule(Recognised("a transformer of Stable Diffusion 3", hint=_WHOLE), ("joint_blocks.0.",)),
    _Rule(Recognised("a FLUX transformer alone", hint=_DIFFUSERS), ("double_blocks.0.img_attn", "single_blocks.0.")),
    _Rule(Recognised("a HunyuanVideo transformer alone", hint=_DIFFUSERS), ("double_blocks.0.img_mod",)),
    _Rule(
        Recognised("a FLUX transformer alone", hint=_DIFFUSERS),
        ("single_transformer_blocks.0.", "\ntransformer_blocks.0.", "\nx_embedder."),
    ),
    _Rule(Recognised("a Z-Image transformer alone", hint=_DIFFUSERS), ("cap_embedder.", "noise_refiner.")),
    _Rule(Recognised("a transformer alone", hint=_DIFFUSERS), ("\ntransformer_blocks.0.",)),
    *(
        _Rule(Recognised("an Infinity transformer alone", hint=INFINITY), (part,))
        for part in ("\nblock_chunks.0.", f"\n{_INFINITY[0]}")
    ),
    _Rule(Recognised("an Infinity tokenizer alone", hint=INFINITY), (f"\n{_INFINITY[1]}",)),
    _Rule(Recognised("an autoencoder alone", hint=_PART), ("\nfirst_stage_model.",), (_UNET,)),
    _Rule(Recognised("an autoencoder alone", hint=_PART), ("\nencoder.down", "\ndecoder.")),
    _Rule(Recognised("an autoencoder alone", hint=_PART), ("\ndecoder.up",)),
    *(
        _Rule(Recognised("a text encoder alone", hint=_PART), (part,))
        for part in ("text_model.encoder.layers.", "encoder.block.0.layer.0.SelfAttention", "layers.0.self_attn.")
    ),
)
_UNKNOWN = Recognised("tensors of no model that is known", hint=_WHOLE)


def recognise(names: Collection[str]) -> Recognised:
    """What tensors of these names are. A file without tensors is known to be nothing."""
    if not names:
        return Recognised("no tensors", hint=_WHOLE)
    listed = "\n" + "\n".join(names) + "\n"
    return next((rule.recognised for rule in _RULES if rule.holds(listed)), _UNKNOWN)


def part_of_a_model(folder: Path, config: Mapping[str, object]) -> FileError | None:
    """Why a folder with a `config.json` is no model, if the configuration is one of diffusers' or transformers'."""
    architectures = config.get("architectures")
    if isinstance(called := config.get("_class_name"), str):
        return FileError(folder, f"holds diffusers' {called} alone", _PART)
    if isinstance(architectures, list) and architectures:
        return FileError(folder, f"holds transformers' {architectures[0]} alone", _PART)
    if isinstance(kind := config.get("model_type"), str):
        return FileError(folder, f"holds transformers' {kind} alone", _PART)
    return None


def is_of_infinity(path: Path) -> bool:
    """Whether a file, which may be a pickle, has the names of a part of an Infinity; its bytes are only searched."""
    try:
        with path.open("rb") as file:
            first = file.read(_NAMES)
    except OSError:  # which whoever opens it puts into words
        return False
    return any(name.encode() in first for name in _INFINITY)


def no_model(folder: Path) -> FileError:
    """What a folder holds that has neither index nor configuration, nor one checkpoint."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return FileError(folder, "is empty: it holds no model (no model_index.json and no config.json)", _WHOLE)
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return FileError(folder, "holds a LoRA", _ADAPTER)
    weights = [name for name in names if name.endswith((".safetensors", *PICKLES))]
    if (part := next((name for name in weights[:_LOOKED_INTO] if is_of_infinity(folder / name)), None)) is not None:
        return FileError(folder, f"holds parts of an Infinity ({part})", INFINITY)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        return FileError(folder, f"holds pickles ({pickles[0]}), which may hold code", "get the model as .safetensors")
    return FileError(folder, "holds no model (no model_index.json and no config.json)", _WHOLE)
