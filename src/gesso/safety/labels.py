"""A checker by labels: any image classifier of transformers that has a label for what is unsafe.

Not here: reading it (`reading`). Shapes: B pictures, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gesso.errors import RequestError, RunError
from gesso.safety.decisions import Decision

if TYPE_CHECKING:
    from PIL.Image import Image


class LabelChecker:
    """The share that a classifier gives to unsafe labels.

    Args:
        network: of transformers, for image classification.
        processor: pictures to what the network sees.
        device: where the network is when it is asked.
        unsafe: labels that count as unsafe, in any case of letters.
        threshold: share of all of them together above which a picture is flagged, between 0 and 1.

    Raises:
        RequestError: the classifier does not know one of the labels.
    """

    def __init__(
        self, network: Any, processor: Any, device: torch.device, *, unsafe: Sequence[str], threshold: float
    ) -> None:
        self.network = network
        self._processor = processor
        self._device = device
        self._threshold = threshold
        known = {str(label).lower(): int(index) for index, label in network.config.id2label.items()}
        for label in unsafe:
            if label.lower() not in known:
                labels = ", ".join(known)
                raise RequestError("safety_labels", label, "a label of the safety checker", f"it has: {labels}")
        self._unsafe = {known[label.lower()]: label for label in unsafe}

    @torch.no_grad()
    def check(self, pictures: Sequence[Image]) -> list[Decision]:
        """One decision a picture; its score is the share of all unsafe labels, the reason the likeliest of them."""
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        dtype = next(self.network.parameters()).dtype
        shares_BL = self.network(pixels.to(self._device, dtype)).logits.float().softmax(-1)
        if not torch.isfinite(shares_BL).all():
            raise RunError("the safety checker's answer is no number; nothing is shown that it has not passed")
        return [self._decision(shares) for shares in shares_BL.tolist()]

    def _decision(self, shares: list[float]) -> Decision:
        score = sum(shares[index] for index in self._unsafe)
        flagged = score > self._threshold
        worst = max(self._unsafe, key=lambda index: shares[index])
        return Decision(flagged=flagged, score=round(score, 3), reason=self._unsafe[worst] if flagged else "")
