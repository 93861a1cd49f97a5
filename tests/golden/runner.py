"""Walking a folder for goldens and checking each by its family and kind.

A kind or family without a check here is a row "not yet", which is no failure. A golden that cannot be read, or whose
check compared nothing, is a failure with its reason. Not here: the table (`__main__`), the checks (`infinity_*`,
`step_cache_*`, `z_image_*`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.golden import (
    infinite_you_faces,
    infinite_you_loops,
    infinite_you_network,
    infinite_you_quantization,
    infinity_averages,
    infinity_filtering,
    infinity_generation,
    infinity_pictures,
    infinity_rotary,
    infinity_tokenizer,
    infinity_training,
    step_cache_math,
    step_cache_networks,
    step_cache_runs,
    step_cache_schedules,
    step_cache_tokens,
    z_image_encoders,
    z_image_loops,
    z_image_manifests,
    z_image_network,
    z_image_parts,
    z_image_transformer,
)
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, read_golden

Check = Callable[[Golden, Comparison], None]
CHECKS: dict[tuple[str, str], Check] = {
    ("infinity", "a"): infinity_tokenizer.check_quantizer,
    ("infinity", "b"): infinity_tokenizer.check_autoencoder,
    ("infinity", "c"): infinity_training.check_correction,
    ("infinity", "d"): infinity_training.check_training,
    ("infinity", "e"): infinity_generation.check_generation,
    ("infinity", "f"): infinity_rotary.check_rotary,
    ("infinity", "g"): infinity_filtering.check_filtering,
    ("infinity", "h"): infinity_averages.check_averages,
    ("infinity", "j"): infinity_pictures.check_pictures,
    ("step-cache", "clusca"): step_cache_tokens.check_clusters,
    ("step-cache", "clusca_quirk"): step_cache_tokens.check_empty_cluster,
    ("step-cache", "end_to_end"): step_cache_runs.check_run,
    ("step-cache", "extension_not_reference"): step_cache_runs.check_run,
    ("step-cache", "speca_metrics"): step_cache_tokens.check_metrics,
    ("step-cache", "step_decisions"): step_cache_schedules.check_decisions,
    ("step-cache", "taylor_math"): step_cache_math.check_taylor_math,
    ("step-cache", "toca_schedules"): step_cache_schedules.check_schedules,
    ("step-cache", "toca_selection"): step_cache_tokens.check_selection,
    ("step-cache", "weights"): step_cache_networks.check_weights,
    ("z-image", "attention"): z_image_parts.check_attention,
    ("z-image", "embeddings"): z_image_parts.check_embeddings,
    ("z-image", "loops"): z_image_loops.check_loops,
    ("z-image", "manifest-cases"): z_image_manifests.check_manifests,
    ("z-image", "omni_transformer_io"): z_image_transformer.check_editing,
    ("z-image", "scheduler"): z_image_parts.check_scheduler,
    ("z-image", "text_features"): z_image_encoders.check_text,
    ("z-image", "tiny_transformer_io"): z_image_transformer.check_forwards,
    ("z-image", "tiny_transformer_weights"): z_image_network.check_weights,
    ("z-image", "tiny_vae_io"): z_image_encoders.check_autoencoder,
    ("z-image", "tiny_vae_weights"): z_image_network.check_weights,
    ("z-image", "wide_transformer_io"): z_image_transformer.check_forwards,
    ("infiniteyou", "detector"): infinite_you_faces.check_detector,
    ("infiniteyou", "face_embedding"): infinite_you_faces.check_embedding,
    ("infiniteyou", "fake_scrfd"): infinite_you_faces.check_fake_detector,
    ("infiniteyou", "injection"): infinite_you_network.check_injection,
    ("infiniteyou", "keypoints"): infinite_you_faces.check_key_points,
    ("infiniteyou", "loops"): infinite_you_loops.check_loops,
    ("infiniteyou", "pad"): infinite_you_faces.check_fitting,
    ("infiniteyou", "quantization"): infinite_you_quantization.check_quantization,
    ("infiniteyou", "resampler"): infinite_you_network.check_resampler,
    ("infiniteyou", "schedules"): infinite_you_loops.check_schedules,
    ("infiniteyou", "tiny_flux_weights"): infinite_you_network.check_weights,
    ("infiniteyou", "tiny_infusenet_weights"): infinite_you_network.check_weights,
    ("infiniteyou", "tiny_vae_weights"): infinite_you_network.check_weights,
    ("names", "AutoencoderKL"): z_image_parts.check_autoencoder_names,
    ("names", "FluxControlNetModel"): infinite_you_network.check_infusenet_names,
    ("names", "ZImageTransformer2DModel"): z_image_parts.check_transformer_names,
    ("names", "image_proj_model.bin"): infinite_you_network.check_resampler_names,
    ("names", "recognition_arcface_ir_se50.pth"): infinite_you_network.check_recogniser_names,
}
_NAMED_FAILURES = 4


@dataclass(frozen=True)
class Row:
    """A line of the table; `error` and `tolerance` are of the comparison nearest to its limit, or farthest beyond."""

    file: str
    kind: str
    outcome: Literal["yes", "no", "not yet"]
    error: float | None = None
    tolerance: float | None = None
    note: str = ""


def run(folder: Path) -> Iterator[Row]:
    """A row for every golden below `folder`, in order of path; JSON files that are no side-cars are passed over."""
    for path in sorted(folder.rglob("*.json")):
        file = str(path.relative_to(folder).with_suffix(""))
        try:
            golden = read_golden(path)
        except BrokenGoldenError as error:
            yield Row(file, "?", "no", note=str(error))
            continue
        if golden is not None:
            yield _row(file, golden)


def _row(file: str, golden: Golden) -> Row:
    kind = f"{golden.family} {golden.kind}"
    check = CHECKS.get((golden.family, golden.letter))
    if check is None:
        return Row(file, kind, "not yet")
    comparison = Comparison()
    try:
        check(golden, comparison)
    except NotYetError as reason:
        return Row(file, kind, "not yet", note=str(reason))
    except BrokenGoldenError as reason:
        return Row(file, kind, "no", note=str(reason))
    except Exception as error:  # whatever the product raises is this golden's failure, and the others still count
        return Row(file, kind, "no", note=f"{type(error).__name__}: {' '.join(str(error).split())}")
    if not comparison.findings:
        return Row(file, kind, "no", note="nothing was compared")
    worst, failures = comparison.worst, comparison.failures
    if failures:
        named = "; ".join(str(finding) for finding in failures[:_NAMED_FAILURES])
        more = len(failures) - _NAMED_FAILURES
        note = named + (f"; and {more} more" if more > 0 else "")
    else:
        note = f"{len(comparison.findings)} comparisons; nearest to its limit: {worst.name}"
    return Row(file, kind, "no" if failures else "yes", worst.error, worst.tolerance, note)
