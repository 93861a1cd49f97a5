"""The six verbs: all that the engine knows of a model family, and all that a family has to provide.

Here are the protocol and the small records that pass through it; no family, no arithmetic and no loop. A family lives
in a file beside this one; the loop that calls the verbs lives in ``gesso.engine``. The verbs in the order in which
they are called::

    plan(request)                      every blank filled, checked, costed; reads configurations, never weights
    encode(plans)                      one conditioning a plan
    begin(plan, conditioning, image)   one State a picture; its seed is plan.request.seed + image
    step(states)                       states of one batch_key advance together by one step, in place
    preview(state)                     a cheap look at an unfinished picture
    decode(states)                     finished states become pictures, with a breath wherever it takes long

What is said here of a picture holds for a video, which has several frames. Written as a plain ``for`` loop the verbs
make a picture; that loop stays in the tests as the engine's oracle.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

    from gesso.request import GenerationRequest


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a piece of work takes: floating-point operations, and bytes moved to or from memory."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What one step of one picture is inside its network, for those who are attached to it (step caches).

    ``image_tokens`` and ``text_tokens`` of the larger branch, padding included; ``grid`` are rows and columns in which
    the picture's tokens lie; ``output`` is the shape of what the network returns for one sample; ``branches`` is how
    many samples the picture has at most: 2 where it is guided by a second evaluation.
    """

    image_tokens: int
    text_tokens: int
    grid: tuple[int, int]
    output: tuple[int, ...]
    branches: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request that can be run as it stands.

    ``request`` has no blanks left (seed, size and every sampling setting are values); ``steps`` is what one picture
    takes; ``cost`` is the whole of one picture (encode, steps, decode); ``peak_bytes`` is the most memory one picture
    needs at once, weights included; ``warnings`` are sentences for the person who asked.

    ``activations`` are the bytes that each stage holds beside weights: "text" while text encoders work, "picture" while
    the given picture is encoded, "step", "decode". Memory modes are foreseen from it; without it ``peak_bytes`` is
    taken apart. ``guests`` are roles of parts that this request needs beside the model's own, and that are read when
    one first does.

    ``shape`` says that steps can be forecast; None where they cannot. ``cache_bytes`` are those that the request's step
    cache keeps of one picture. The engine fills them in, with all else that a cache means; a family leaves
    ``request.cache`` as it is.
    """

    request: GenerationRequest
    steps: int
    cost: Cost
    peak_bytes: int
    warnings: tuple[str, ...] = ()
    activations: Mapping[str, int] = field(default_factory=dict)
    guests: tuple[str, ...] = ()
    shape: StepShape | None = None
    cache_bytes: int = 0


class Conditioning(Protocol):
    """What ``encode`` made of a prompt. Opaque to the engine, and shared by every picture of one request."""


class State(Protocol):
    """One picture on its way. The engine reads these four and nothing else.

    ``remaining`` steps of ``total`` are still to do; states with equal ``batch_key`` may step together (network, shape,
    scale or time step, compute-or-forecast); ``cost`` is that of the next step.
    """

    @property
    def remaining(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def batch_key(self) -> Hashable: ...

    @property
    def cost(self) -> Cost: ...


@dataclass(kw_only=True)
class Output:
    """A finished picture and the seed that made it.

    A video has all its ``frames``, how many of them are shown a second, and as ``image`` the first of them.
    ``measured`` is what the family has measured of it, for its metadata.
    """

    image: Image
    seed: int
    frames: tuple[Image, ...] = ()
    fps: float | None = None
    measured: Mapping[str, object] = field(default_factory=dict)


class Pipeline(Protocol):
    """A model family, ready to paint. The engine calls it from one thread only.

    The engine never looks inside a conditioning or a state, so a family declares its verbs with its own classes; that
    is why they are ``Any`` here. It may also carry ``digest: str``, the digest of its weights, which goes into the
    metadata.

    Errors: ``plan`` raises ``GessoError`` for a request that this model cannot do. Whatever else is raised, by any
    verb, fails only the requests that took part in that call.
    """

    def plan(self, request: GenerationRequest) -> Plan:
        """Fill every blank, check every value against this model's limits, and say what it will cost."""
        ...

    def encode(self, plans: Sequence[Plan]) -> Sequence[Any]:
        """Make one conditioning for each plan, in order."""
        ...

    def begin(self, plan: Plan, conditioning: Any, image: int) -> Any:
        """Make the ``State`` of picture ``image`` (counted from 0) of the plan."""
        ...

    def step(self, states: Sequence[Any]) -> None:
        """Advance every state by one step, in place. All have equal ``batch_key`` and ``remaining`` above 0."""
        ...

    def preview(self, state: Any) -> Image | Sequence[Image]:
        """Show roughly what the state would become: a picture, or frames of a video. Leaves the state as it was."""
        ...

    def decode(self, states: Sequence[Any]) -> Iterator[Output | None]:
        """Turn finished states (``remaining`` 0) into pictures, yielded one by one in order.

        None, yielded in between, is a breath: the engine looks after everything else and comes back for the rest.
        Whatever takes longer than a step takes one, at a point where the work may also be given up.
        """
        ...


def without_breaths(decoded: Iterable[Output | None]) -> Iterator[Output]:
    """What ``decode`` yields, for those who have nothing to do between its tiles."""
    return (output for output in decoded if output is not None)
