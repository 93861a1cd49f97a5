"""InfiniteYou as a guest of FLUX (arXiv:2503.16418): the same person in any picture, from one photograph.

Here: what a request's `identity` means, from the photograph to what is added to FLUX in a step. FLUX's own file calls
it only where a request has an identity, so that without one nothing differs. InfuseNet is not evaluated in steps
outside of its window, nor in the pass of the negative prompt. Not here: FLUX (`flux`), faces (`identity`), the networks
(`models/infusenet`, `models/resampler`) and their files (`engine/loading`).

Random numbers: before all others of a picture, its generator draws the sample of the control picture's posterior, as
many numbers as the start noise has. Shapes as in `flux`; N identity tokens, as wide as text features (E).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from gesso.errors import FileError
from gesso.identity.reader import likeness
from gesso.models import flux_cost, infusenet
from gesso.pipelines.contract import Cost
from gesso.pipelines.planning import value_or
from gesso.request import GenerationRequest
from gesso.request_parts import Identity
from gesso.sampling.windows import in_window

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

    from gesso.identity.reader import Face, Pose

VARIANT = "aes_stage2"
"""The variant where a request names none."""
INFUSENET, RESAMPLER = "infusenet", "resampler"


class Faces(Protocol):
    """Who reads faces: `identity.reader.FaceReader` of photographs, another of a small world's portraits."""

    def face(self, path: Path) -> Face:
        """The face that counts in a picture, with warnings about it."""
        ...

    def vector(self, path: Path) -> Tensor:
        """The unit vector `[V]` of that face."""
        ...

    def vector_of(self, image: Image.Image, source: Path | str) -> Tensor:
        """As `vector`, of a picture in memory that a message calls `source`."""
        ...

    def pose(self, path: Path, width: int, height: int) -> Pose:
        """The key points of a pose picture, for a picture of this size, with warnings about it."""
        ...


@dataclass(frozen=True, eq=False)
class Networks:
    """One variant: InfuseNet on the device, and the resampler, which is small and runs on the processor in float32.

    `return_to` makes it the one that its loader counts and moves, once another variant took that place.
    """

    variant: str
    infusenet: FluxControlNetModel
    resampler: nn.Module
    return_to: Callable[[], None] = lambda: None


@dataclass(frozen=True, eq=False)
class IdentityConditioning:
    """A person's vector `[512]` and tokens `[1,N,E]`, the control picture's posterior, and the networks for them."""

    networks: Networks
    vector_V: Tensor
    tokens_1NE: Tensor
    control: DiagonalGaussianDistribution


@dataclass(frozen=True, eq=False)
class Presence:
    """A person in one picture on its way: `scales` has one value for each evaluation, 0 where nothing is added."""

    networks: Networks
    vector_V: Tensor
    tokens_1NE: Tensor
    control_1LD: Tensor
    scales: tuple[float, ...]

    def key(self, evaluation: int) -> Hashable:
        """What pictures have in common where they share an evaluation; None where nothing is added."""
        if evaluation >= len(self.scales) or not self.scales[evaluation]:
            return None
        return self.networks.variant, self.scales[evaluation], self.tokens_1NE.shape[1]


class InfiniteYou:
    """What FLUX asks of its guest. It is handed its components.

    `load` reads a variant's networks; that is done when the first picture wants them, and they are held until one of
    another variant is wanted and the last picture that uses them is done. `shapes` makes its InfuseNet on the meta
    device, for planning. `device` and `dtype` are FLUX's.
    """

    roles = (INFUSENET, RESAMPLER)
    """Of its parts, by which memory is foreseen."""

    def __init__(
        self,
        *,
        faces: Faces,
        load: Callable[[str], Networks],
        shapes: Callable[[str], FluxControlNetModel],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.faces, self._load, self._make_shapes, self._device, self._dtype = faces, load, shapes, device, dtype
        self._shapes: dict[str, FluxControlNetModel] = {}
        self._known: WeakValueDictionary[str, Networks] = WeakValueDictionary()
        self._last: Networks | None = None

    # ---- plan -------------------------------------------------------------------------------------------------------

    def filled(self, identity: Identity) -> Identity:
        """Without blanks, but for a pose that was not given."""
        return identity.model_copy(
            update={
                "strength": value_or(identity.strength, 1.0),
                "start": value_or(identity.start, 0.0),
                "end": value_or(identity.end, 1.0),
                "variant": value_or(identity.variant, VARIANT),
            }
        )

    def warnings(self, filled: GenerationRequest, evaluations: int) -> tuple[str, ...]:
        """Of the photograph, and of a window without a step. Finds the faces, so that what is wrong with a picture is
        known before any work. Raises FileError, MissingError."""
        identity = filled.identity
        assert identity is not None and filled.width is not None and filled.height is not None
        found = self.faces.face(Path(identity.image)).warnings
        if identity.pose is not None:
            found += self.faces.pose(Path(identity.pose), filled.width, filled.height).warnings
        if not any(scales_of(identity, evaluations)):
            found += (f"identity has no effect: no step of {evaluations} lies in its window, or its strength is 0",)
        return found

    def costs(self, filled: GenerationRequest, tokens: int, evaluations: int) -> tuple[Cost, ...]:
        """Of each evaluation, beside FLUX's own."""
        assert filled.identity is not None
        network, values = self._planned(filled.identity)
        each, weights = self._dtype.itemsize, flux_cost.weight_bytes([network])
        once = Cost(
            flops=flux_cost.transformer_flops(values, tokens, infusenet.IDENTITY_TOKENS),
            bytes=flux_cost.transformer_bytes(values, tokens, infusenet.IDENTITY_TOKENS, weights, each),
        )
        none = Cost(flops=0.0, bytes=0.0)
        return tuple(once if scale else none for scale in scales_of(filled.identity, evaluations))

    def weight_bytes(self, identity: Identity) -> int:
        """Of InfuseNet; the resampler is small and no part of the device's memory."""
        return flux_cost.weight_bytes([self._planned(identity)[0]])

    def step_bytes(self, identity: Identity, tokens: int, network_bytes: int) -> int:
        """What a step holds beside weights, where FLUX alone holds `network_bytes`.

        Residuals stay while FLUX works; InfuseNet itself holds those of its blocks beside them.
        """
        values = self._planned(identity)[1]
        width = values["num_attention_heads"] * values["attention_head_dim"]
        count = values["num_layers"] + values["num_single_layers"]
        added = count * tokens * width * self._dtype.itemsize
        own = flux_cost.transformer_peak_bytes(values, tokens, infusenet.IDENTITY_TOKENS, self._dtype.itemsize)
        return added + max(network_bytes, added + own)

    def _planned(self, identity: Identity) -> tuple[FluxControlNetModel, Any]:
        variant = value_or(identity.variant, VARIANT)
        if variant not in self._shapes:
            self._shapes[variant] = self._make_shapes(variant)
        return self._shapes[variant], self._shapes[variant].config

    # ---- encode and begin -------------------------------------------------------------------------------------------

    def encode(
        self, filled: GenerationRequest, posterior: Callable[[Image.Image], DiagonalGaussianDistribution]
    ) -> IdentityConditioning:
        """The photograph as tokens; the pose picture's key points, or black, as `posterior` makes of it."""
        identity = filled.identity
        assert identity is not None and filled.width is not None and filled.height is not None
        networks = self._networks(value_or(identity.variant, VARIANT))
        vector_V = self.faces.vector(Path(identity.image))
        tokens_1NE = networks.resampler(vector_V[None, None]).to(self._device, self._dtype)
        if identity.pose is None:
            control = Image.new("RGB", (filled.width, filled.height))
        else:
            control = self.faces.pose(Path(identity.pose), filled.width, filled.height).picture
        return IdentityConditioning(networks, vector_V, tokens_1NE, posterior(control))

    def likeness(self, presence: Presence, picture: Image.Image) -> float | None:
        """The cosine between the photograph's face and the picture's, 1 for the same; None where no face is found.

        By the recogniser that the picture was painted with, so it flatters: another one would say less.
        """
        try:
            found = self.faces.vector_of(picture, "the picture")
        except FileError:  # it shows no face, or too small a one, which is an answer
            return None
        return round(likeness(presence.vector_V, found), 4)

    def _networks(self, variant: str) -> Networks:
        networks = self._known.get(variant)
        if networks is None:
            self._last = None  # before the next is read: both need not fit
            networks = self._known[variant] = self._load(variant)
        elif networks is not self._last:  # pictures on their way still have it
            networks.return_to()
        self._last = networks
        return networks


def scales_of(identity: Identity, evaluations: int) -> tuple[float, ...]:
    """By how much residuals count in each evaluation."""
    strength, start = value_or(identity.strength, 1.0), value_or(identity.start, 0.0)
    end = value_or(identity.end, 1.0)
    return tuple(strength * in_window(index, evaluations, start, end) for index in range(evaluations))


def residuals(
    presences: Sequence[Presence],
    evaluation: int,
    *,
    tokens_BLD: Tensor,
    pooled_BP: Tensor,
    time_B: Tensor,
    positions_L3: Tensor,
) -> infusenet.Residuals:
    """What InfuseNet adds for pictures of one key; `evaluation` is the first one's, which has the scale of all."""
    return infusenet.residuals(
        presences[0].networks.infusenet,
        tokens_BLD=tokens_BLD,
        control_BLD=torch.cat([presence.control_1LD for presence in presences]),
        identity_BNE=torch.cat([presence.tokens_1NE for presence in presences]),
        pooled_BP=pooled_BP,
        time_B=time_B,
        positions_L3=positions_L3,
        scale=presences[0].scales[evaluation],
    )
