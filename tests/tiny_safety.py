"""Tiny safety checkers with random weights, in folders as they are published; one flags only the pictures it is told.

Not here: fixtures (the tests' own).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, CLIPConfig, ViTConfig, ViTForImageClassification

SIDE, WIDTH, SPACE = 32, 32, 24
NEVER = 2.0
"""A threshold that no cosine reaches."""


def tiny_checker() -> StableDiffusionSafetyChecker:
    """It flags nothing."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    network = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=text, projection_dim=SPACE))
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(network.concept_embeds)
    torch.nn.init.normal_(network.special_care_embeds)
    for weights in (network.concept_embeds_weights, network.special_care_embeds_weights):
        weights.data.fill_(NEVER)
    return network.eval().requires_grad_(False)


def write_checker(
    folder: Path, flagged: Sequence[Image.Image] = (), passed: Sequence[Image.Image] = (), *, published: bool = True
) -> Path:
    """A checker's folder; with `published` its tensors are called as in the published file.

    Each of `flagged` has a concept: its own embedding, apart from what it has in common with those of `passed`, with
    the threshold halfway between its own cosine and the nearest of theirs.
    """
    network = tiny_checker()
    write_processor(folder)
    if flagged:
        own, others = (embeddings(network, folder, pictures or [_grey()]) for pictures in (flagged, passed))
        for index, embedding in enumerate(own):
            concept = normalize(embedding - others.mean(0), dim=0)
            near, far = float(embedding @ concept), float((others @ concept).max())
            assert near - far > 0.02, "the tiny network cannot tell these pictures apart"
            network.concept_embeds.data[index] = concept
            network.concept_embeds_weights.data[index] = (near + far) / 2
    return write_network(folder, network, published=published)


def write_network(folder: Path, network: Any, *, published: bool = True) -> Path:
    """Configuration and weights, beside what prepares pictures."""
    write_processor(folder)
    config = network.config.to_dict() | {"architectures": [type(network).__name__]}
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    if published and isinstance(network, StableDiffusionSafetyChecker):
        own = "vision_model."
        state = {f"{own}{name}" if name.startswith(own) else name: value for name, value in state.items()}
        state[f"{own}{own}embeddings.position_ids"] = torch.arange((SIDE // 8) ** 2 + 1)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_processor(folder: Path) -> None:
    """As Stable Diffusion's checker has it, but small."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": SIDE,
        "crop_size": SIDE,
        "resample": 3,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")


def pixels(folder: Path, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """What the network of a folder sees of pictures, [B,3,h,w]."""
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    return processor(images=list(pictures), return_tensors="pt")["pixel_values"]


def embeddings(network: Any, folder: Path, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Unit vectors [B,P] of pictures."""
    return normalize(network.visual_projection(network.vision_model(pixels(folder, pictures))[1]))


def write_classifier(folder: Path) -> Path:
    """A classifier with the labels normal and nsfw; the second is what bright pictures get."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    network = ViTForImageClassification(config).eval().requires_grad_(False)
    write_processor(folder)
    dark, bright = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("black", "white"))
    tokens = network.vit(pixels(folder, [dark, bright])).last_hidden_state[:, 0]
    direction = tokens[1] - tokens[0]
    network.classifier.weight.data = torch.stack([-direction, direction]) * 20 / direction.norm() ** 2
    network.classifier.bias.data = network.classifier.weight @ -tokens.mean(0)
    return write_network(folder, network)


def _grey() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), "grey")
