"""What FLUX's pipeline passes around: the text encoder's face, defaults, conditioning, and a picture's state.

The verbs are in `flux`. Shapes as there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from gesso.pipelines.planning import CuttingVocabulary
from gesso.pipelines.token_state import TokenState

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    from gesso.pipelines.infinite_you import IdentityConditioning, Presence


class TextEncoder(CuttingVocabulary, Protocol):
    """Prompts to features `[B,T,E]` of one length T = `max_tokens`, and one vector each, `[B,P]`."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class TwoTextEncoders(Protocol):
    """What a text encoder offers besides where the pooled vector comes from a network that reads less (CLIP)."""

    @property
    def pooled_tokens(self) -> int: ...

    def cut_from_pooled(self, prompt: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class FluxDefaults:
    """What a request's blanks are filled with, and what the model is.

    `guidance` goes into the network where that has an embedding for it (FLUX.1 dev). Where it has none, a `distilled`
    model has no use for it (schnell), and for any other it is classifier-free guidance with a second evaluation.
    `sizes` (width, height) are those that the model was trained at, if it was trained at few.
    """

    width: int
    height: int
    steps: int = 28
    guidance: float = 3.5
    scheduler: str = "euler"
    init_strength: float = 0.6
    distilled: bool = False
    largest_edge: int = 4096
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ReadText:
    """A prompt as the network reads it: features `[1,T,E]` and pooled `[1,P]`."""

    features_1TE: Tensor
    pooled_1P: Tensor


@dataclass(frozen=True)
class FluxConditioning:
    """A prompt, what guidance pushes away from (None where nothing is), the given picture's posterior, and a person."""

    prompt: ReadText
    negative: ReadText | None = None
    picture: DiagonalGaussianDistribution | None = None
    identity: IdentityConditioning | None = None


@dataclass(eq=False, kw_only=True)
class FluxState(TokenState):
    """One picture on its way; `guidance` and `true_guidance` have one value for each evaluation."""

    conditioning: FluxConditioning
    guidance: tuple[float, ...]
    true_guidance: tuple[float, ...]
    positions_L3: Tensor
    presence: Presence | None = None

    @property
    def doubled(self) -> bool:
        """Whether this evaluation is followed by a second one, of the negative prompt."""
        return self.remaining > 0 and self.true_guidance[self.index] > 1

    @property
    def batch_key(self) -> Hashable:
        """The network takes a time a sample, so pictures of one size step together wherever they are on their way."""
        return (self.size, self.conditioning.prompt.features_1TE.shape[1], self.doubled, self.presence_key)

    @property
    def presence_key(self) -> Hashable:
        """What a person adds in this evaluation, None where nothing is added: then the picture is like any other."""
        return None if self.presence is None else self.presence.key(self.index)
