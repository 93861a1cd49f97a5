"""The checker of Stable Diffusion: a picture is flagged that comes too near to one of 17 concepts.

The network is diffusers' `StableDiffusionSafetyChecker`, the rule that of its `forward`, whose arithmetic on cosines it
repeats: three concepts of special care come first, and where one of them is near, all others are judged more strictly.
The network's own `forward` is not called, because it passes a picture whose embedding is no number.
Not here: reading it (`reading`). Shapes: B pictures, P width of the common space, K concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gesso.errors import RunError
from gesso.safety.decisions import Decision

if TYPE_CHECKING:
    from PIL.Image import Image

_STRICTER = 0.01  # added to every later score once a concept of special care is near
_DIGITS = 3  # to which scores are rounded before they are held against 0


class ConceptChecker:
    """Nearness to concepts, as Stable Diffusion's own pipeline measures it.

    Args:
        network: diffusers' `StableDiffusionSafetyChecker`, or one whose tensors have its names.
        processor: pictures to what the network sees.
        device: where the network is when it is asked.
    """

    def __init__(self, network: Any, processor: Any, device: torch.device) -> None:
        self.network = network
        self._processor = processor
        self._device = device

    @torch.no_grad()
    def check(self, pictures: Sequence[Image]) -> list[Decision]:
        """One decision a picture; its score is the largest excess of a cosine over its concept's threshold."""
        embeddings_BP = self._embeddings(pictures)
        network = self.network
        care_BK = embeddings_BP @ normalize(network.special_care_embeds).T
        concepts_BK = embeddings_BP @ normalize(network.concept_embeds).T
        thresholds = network.special_care_embeds_weights, network.concept_embeds_weights
        if not all(torch.isfinite(values).all() for values in (care_BK, concepts_BK, *thresholds)):
            raise RunError("the safety checker's answer is no number; nothing is shown that it has not passed")
        answers = zip(care_BK.float().cpu().numpy(), concepts_BK.float().cpu().numpy(), strict=True)
        return [self._decision(care_K, concepts_K) for care_K, concepts_K in answers]

    def _embeddings(self, pictures: Sequence[Image]) -> Tensor:
        """Unit vectors [B,P]."""
        network = self.network
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        pooled = network.vision_model(pixels.to(self._device, network.concept_embeds.dtype))[1]
        return normalize(network.visual_projection(pooled))

    def _decision(self, care_K: Any, concepts_K: Any) -> Decision:
        network, adjustment = self.network, 0.0
        for cosine, threshold in zip(care_K, network.special_care_embeds_weights.tolist(), strict=True):
            if round(cosine - threshold + adjustment, _DIGITS) > 0:
                adjustment = _STRICTER
        thresholds = network.concept_embeds_weights.tolist()
        scores = [
            float(round(cosine - threshold + adjustment, _DIGITS))
            for cosine, threshold in zip(concepts_K, thresholds, strict=True)
        ]
        worst = max(range(len(scores)), key=scores.__getitem__)
        flagged = scores[worst] > 0
        return Decision(
            flagged=flagged, score=round(scores[worst], _DIGITS), reason=f"concept {worst}" if flagged else ""
        )
