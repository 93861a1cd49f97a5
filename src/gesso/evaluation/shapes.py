"""Shapes-score of a model: held-out prompts painted through the engine, judged exactly by the shapes world.

Here: painting the questions, counting the answers, and how sure the counts are. Not here: the questions and the judge
(`gesso.worlds.shapes.score`), and printing.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice

from gesso.engine import Engine
from gesso.errors import RequestError
from gesso.request import GenerationRequest, parse_request
from gesso.worlds import shapes

MOST_PROMPTS = 100_000
_TOGETHER = 64  # requests handed to the engine at once: enough to fill any batch


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One picture judged: what was asked, with which seed, whether it is right, and what is wrong where it is not."""

    category: str
    prompt: str
    seed: int
    right: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Share:
    """So many right of so many, and the 95 % interval of the true share (Wilson's)."""

    right: int
    asked: int

    @property
    def value(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Lowest and highest share that these counts are compatible with (E. B. Wilson, 1927)."""
        z, n = 1.959964, self.asked
        middle = (self.value + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.value * (1 - self.value) / n + z * z / (4 * n * n))
        return middle - half, middle + half


@dataclass(frozen=True, kw_only=True)
class ShapesScore:
    """The score of one model.

    Attributes:
        request: the fields every prompt was painted with.
        digest: of the weights.
        categories: right of asked, in GenEval's order.
        overall: mean of the categories' shares, as GenEval has it.
        seconds: of painting and judging.
        answers: every picture's.
    """

    request: dict[str, object]
    digest: str
    categories: dict[str, Share]
    overall: float
    seconds: float
    answers: tuple[Answer, ...]

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: the score first, then every answer."""
        return {
            "score": "shapes",
            "overall": self.overall,
            "categories": {
                name: {"share": share.value, "right": share.right, "asked": share.asked, "interval": share.interval}
                for name, share in self.categories.items()
            },
            "request": self.request,
            "digest": self.digest,
            "seconds": self.seconds,
            "answers": [asdict(answer) for answer in self.answers],
        }


def evaluate(
    engine: Engine,
    fields: Mapping[str, object] | None = None,
    *,
    prompts: int = 600,
    seed: int = 0,
    report: Callable[[Answer], None] | None = None,
) -> ShapesScore:
    """Paints held-out prompts and judges the pictures.

    Args:
        engine: paints; a request with `deterministic` gives the same score again whatever the batch.
        fields: fields of `GenerationRequest` for every prompt (model, guidance, temperature, num_images, …).
        prompts: how many, the six categories in turn.
        seed: of the prompts; prompt i is painted with seed + i · num_images.
        report: called with every answer as it comes.

    Raises:
        RequestError: a field cannot be used, or the number of prompts is out of range.
        GessoError: whatever made the painting fail.

    Example:
        >>> from gesso import Engine
        >>> with Engine(device="cpu") as engine:
        ...     result = evaluate(engine, {"model": "infinity-nano"}, prompts=6)
        >>> 0.0 <= result.overall <= 1.0
        True
    """
    check_prompts(prompts)
    settings = {name: value for name, value in (fields or {}).items() if name not in ("prompt", "seed")}
    started = time.perf_counter()
    answers: list[Answer] = []
    digest = ""
    for answer, painted_by in _answers(engine, settings, prompts, seed):
        answers.append(answer)
        digest = painted_by
        if report is not None:
            report(answer)
    categories = {name: _share(answers, name) for name in shapes.CATEGORIES}
    return ShapesScore(
        request=settings | {"prompts": prompts, "seed": seed},
        digest=digest,
        categories=categories,
        overall=sum(share.value for share in categories.values()) / len(categories),
        seconds=time.perf_counter() - started,
        answers=tuple(answers),
    )


def check_prompts(count: int) -> None:
    """Refuses a number of prompts that would leave a category without one, or is beyond reason.

    Raises:
        RequestError: with what is allowed.
    """
    if not len(shapes.CATEGORIES) <= count <= MOST_PROMPTS:
        raise RequestError("prompts", count, f"a whole number from {len(shapes.CATEGORIES)} to {MOST_PROMPTS}")


def _answers(engine: Engine, fields: Mapping[str, object], prompts: int, seed: int) -> Iterator[tuple[Answer, str]]:
    """Every picture's answer, and the digest of the weights that painted it."""
    questions = shapes.prompts(prompts, seed)
    requests = [_request(question.prompt, fields, seed, number) for number, question in enumerate(questions)]
    waiting = iter(zip(questions, requests, strict=True))
    while together := list(islice(waiting, _TOGETHER)):
        results = iter(engine.run([request for _, request in together]))
        for question, request in together:
            for result in islice(results, request.num_images):
                verdict = shapes.judge(question, result.image)
                model = result.metadata.get("model")
                answer = Answer(
                    category=question.category,
                    prompt=question.prompt,
                    seed=result.seed,
                    right=verdict.right,
                    reasons=verdict.reasons,
                )
                yield answer, str(model.get("digest", "")) if isinstance(model, dict) else ""


def _request(prompt: str, fields: Mapping[str, object], seed: int, number: int) -> GenerationRequest:
    fields = {"safety": "off", **fields, "prompt": prompt}  # a checker would hide from the judge what it flags
    request = parse_request(fields)
    return parse_request({**fields, "seed": seed + number * request.num_images})


def _share(answers: list[Answer], category: str) -> Share:
    right = [answer.right for answer in answers if answer.category == category]
    return Share(right=sum(right), asked=len(right))
