"""Z-Image goldens of lists of checksums: what lines mean, what of a folder is listed, and what is found wrong."""

from __future__ import annotations

import tempfile
from pathlib import Path

from gesso.weights import checksums
from gesso.weights.checksums import Checksums, Findings
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, SideCar

ESSENTIAL = (
    "model_index.json",
    "transformer/config.json",
    "transformer/*.safetensors*",
    "vae/config.json",
    "vae/*.safetensors",
    "text_encoder/config.json",
    "text_encoder/*.safetensors*",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)
"""What of a Z-Image's folder its authors' lists are made of; ours are of every file that is read."""


class Verdict(SideCar):
    all_valid: bool
    missing: tuple[str, ...]
    corrupted: tuple[str, ...]


class Case(SideCar):
    name: str
    text: str
    parsed: dict[str, str | None]
    verify_False: Verdict
    verify_True: Verdict


class Manifests(SideCar):
    file_contents: dict[str, str]
    md5: dict[str, str]
    essential_files_found: list[str]
    cases: list[Case]


def check_manifests(golden: Golden, comparison: Comparison) -> None:
    """Every list over the recorded files, looked for and read; each answer is equal or it is not."""
    recorded = golden.view(Manifests)
    if not recorded.cases:
        raise BrokenGoldenError("side-car field 'cases' is empty")

    def equal(name: str, measured: object, expected: object) -> None:
        comparison.true(name, measured == expected, f"{measured} is not {expected}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, content in recorded.file_contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content, encoding="utf-8")
        equal("md5", {path: checksums.digest(folder / path) for path in recorded.md5}, recorded.md5)
        made = checksums.make(folder, [path for each in ESSENTIAL for path in folder.glob(each) if path.is_file()])
        equal("essential files", sorted(made), sorted(recorded.essential_files_found))
        equal("written and read", dict(checksums.parse(checksums.write(made)).digests), made)
        for case in recorded.cases:
            listed = checksums.parse(case.text)
            equal(f"{case.name}: parsed", dict(listed.digests), case.parsed)
            for contents, verdict in ((False, case.verify_False), (True, case.verify_True)):
                found = checksums.check(folder, listed, contents=contents, case_matters=True)
                equal(f"{case.name}: contents {contents}", found, _findings(verdict))
                equal(f"{case.name}: fine {contents}", found.fine, verdict.all_valid)
    shipped = golden.data.get("turbo_manifest")
    if isinstance(shipped, dict):
        equal("z-image-turbo", _shipped("z-image-turbo").digests, shipped)


def _findings(verdict: Verdict) -> Findings:
    return Findings(missing=verdict.missing, altered=verdict.corrupted)


def _shipped(name: str) -> Checksums:
    return checksums.read(checksums.SHIPPED / f"{name}.txt")
