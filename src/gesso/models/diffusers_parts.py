"""The networks that are diffusers' own, looked up when one is made: it is an extra, and slow to import.

Not here: what is made of them, files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gesso.errors import MissingError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from gesso.models.qwen_image_autoencoder import PictureAutoencoder

INSTALL = "pip install 'gesso[diffusion]'"
_UNUSABLE = "a diffusers that can be imported"


def autoencoder_kl() -> type[AutoencoderKL]:
    """The autoencoder of FLUX, Z-Image and the nano flow models. Raises MissingError without diffusers."""
    return _class("diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL", "this model's autoencoder")


def flux_transformer() -> type[FluxTransformer2DModel]:
    """FLUX's network. Raises MissingError without diffusers."""
    return _class("diffusers.models.transformers.transformer_flux", "FluxTransformer2DModel", "FLUX's network")


def flux_control_network() -> type[FluxControlNetModel]:
    """The side network that InfiniteYou's InfuseNet is. Raises MissingError without diffusers."""
    return _class("diffusers.models.controlnets.controlnet_flux", "FluxControlNetModel", "InfuseNet's network")


def qwen_image_transformer() -> type[QwenImageTransformer2DModel]:
    """Qwen-Image's network. Raises MissingError without diffusers."""
    module = "diffusers.models.transformers.transformer_qwenimage"
    return _class(module, "QwenImageTransformer2DModel", "Qwen-Image's network")


def qwen_image_autoencoder() -> type[PictureAutoencoder]:
    """Qwen-Image's autoencoder. Raises MissingError without diffusers."""
    return _class("gesso.models.qwen_image_autoencoder", "PictureAutoencoder", "Qwen-Image's autoencoder")


def hunyuan_video_transformer() -> type[HunyuanVideoTransformer3DModel]:
    """HunyuanVideo's network. Raises MissingError without diffusers."""
    module = "diffusers.models.transformers.transformer_hunyuan_video"
    return _class(module, "HunyuanVideoTransformer3DModel", "HunyuanVideo's network")


def hunyuan_video_autoencoder() -> type[AutoencoderKLHunyuanVideo]:
    """HunyuanVideo's autoencoder. Raises MissingError without diffusers."""
    module = "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video"
    return _class(module, "AutoencoderKLHunyuanVideo", "HunyuanVideo's autoencoder")


def unet_2d_condition() -> type[UNet2DConditionModel]:
    """Stable Diffusion XL's network. Raises MissingError without diffusers."""
    return _class("diffusers.models.unets.unet_2d_condition", "UNet2DConditionModel", "Stable Diffusion XL's network")


def safety_checker() -> Any:
    """Stable Diffusion's safety checker. Raises MissingError without diffusers."""
    module = "diffusers.pipelines.stable_diffusion.safety_checker"
    return _class(module, "StableDiffusionSafetyChecker", "the safety checker")


def _class(module: str, name: str, what: str) -> Any:
    """Where diffusers lacks a library of its own, transformers for one, it raises a RuntimeError about its import."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, RuntimeError) as error:
        library = _absent(error)
        held = library in ("diffusers", _UNUSABLE)
        use = f"which holds {what}," if held else f"which diffusers needs for {what},"
        raise MissingError(f"{library}, {use}", INSTALL) from error


def _absent(error: BaseException | None) -> str:
    """The library that an import has not found; where nothing says so, diffusers itself."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return _UNUSABLE
