"""One finished picture as it is handed over, and its record: what the engine knows of how it was made.

Not here: the record's shape (``gesso.metadata``), and whether the picture may be seen (``safety``).
"""

from __future__ import annotations

from collections.abc import Mapping

from gesso.engine.flight import Row
from gesso.engine.memory import mode_of
from gesso.engine.safety import Guard
from gesso.events import Rejected, Result
from gesso.metadata import describe, frames_digest, pixels_digest
from gesso.pipelines.contract import Output


def judged_result(
    row: Row,
    output: Output,
    decode_seconds: float,
    guard: Guard,
    *,
    device: str,
    dtype: str | None,
    how: Mapping[str, object],
) -> Result | Rejected:
    """The picture that the row became, as far as the engine's guard lets it be seen. Other arguments as below."""
    seen, verdict = guard.judged(row.run.plan, output, row.run.pipeline)
    how = {**how, "safety": verdict}
    metadata = describe_result(row, seen or output, decode_seconds, device=device, dtype=dtype, how=how)
    if seen is None:
        del metadata["pixels"]
        return Rejected(seed=output.seed, index=row.image, metadata=metadata)
    return Result(
        image=seen.image, seed=seen.seed, index=row.image, metadata=metadata, frames=seen.frames, fps=seen.fps
    )


def describe_result(
    row: Row, output: Output, decode_seconds: float, *, device: str, dtype: str | None, how: Mapping[str, object]
) -> dict[str, object]:
    """Metadata of the picture that the row became.

    ``company`` counts the rows of its steps and of its decoding, and the requests it was encoded with: at 1 the
    picture was alone throughout, and its arithmetic repeats bit for bit. ``seconds`` are those of the batches that it
    took part in.

    Args:
        row: the finished row.
        output: what its state was decoded to.
        decode_seconds: what that took.
        device: where it was made.
        dtype: what the engine was asked for; None is the model's own, which the pipeline may name in ``dtype``.
        how: what else there is to say: attention, compiled, safety.
    """
    run = row.run
    pipeline = run.pipeline
    record = describe(
        run.plan.request,
        index=row.image,
        seed=output.seed,
        model_digest=str(getattr(pipeline, "digest", "")),
        device=device,
        dtype=str(getattr(pipeline, "dtype", dtype or "")).removeprefix("torch."),
        company=max(row.company, run.company),
        seconds={**run.seconds, "step": row.seconds, "decode": decode_seconds},
        given=run.given,
    )
    pixels = frames_digest(output.frames) if output.frames else pixels_digest(output.image)
    if (mode := mode_of(pipeline)) is not None:
        how = {**how, "memory": str(mode)}
    if row.cached is not None:
        how = {**how, "cache": row.cached.record}
    if run.held.records:
        how = {**how, "lora": list(run.held.records)}
    return {**record, **how, **output.measured, "warnings": list(run.plan.warnings), "pixels": pixels}
