"""How fast a model is read, and how much memory that takes: a Z-Image of 2 GB with random weights, in shards.

    python -m benchmarks.load_time [--gigabytes 2] [--shards 4] [--folder DIR] [--save]

Each reading is a process of its own, of which only the loading is measured. The files are put out of the page cache
before it, and so are they before the disk's own rate is measured, in the same run, by reading them as `dd` does: in
order, 8 MiB at a time, into one buffer. Wanted: 0.8 of that rate, digests of all files included where they are known
already; peak memory beyond the weights themselves at most 1.1 times the largest shard. What a first load costs, which
computes the digests beside the reading, is told as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.measuring import Claims, arguments
from benchmarks.memory_modes import peak_of, start_counting, write_z_image
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.transformer import S3DiT

WANTED_RATE, WANTED_SHARDS = 0.8, 1.1
_AT_ONCE = 1 << 23  # bytes
_PARAMETERS_A_LAYER = 23e6  # at the width below


def write_model(folder: Path, gigabytes: float, shards: int) -> None:
    """A tiny Z-Image whose transformer is put aside for one of so many bytes in float32."""
    write_z_image(folder, tiny=True)
    part = folder / "transformer"
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    layers = max(1, round(gigabytes * 2**30 / 4 / _PARAMETERS_A_LAYER) - 2)
    fields = {name: config[name] for name in ("in_channels", "cap_feat_dim")}
    network = S3DiTConfig(dim=1344, n_heads=21, n_kv_heads=21, n_layers=layers, axes_dims=(16, 24, 24), **fields)
    network = S3DiTConfig(**{**asdict(network), "n_refiner_layers": 1})
    (part / "config.json").write_text(json.dumps({"_class_name": config["_class_name"]} | asdict(network)), "utf-8")
    for path in part.glob("*.safetensors"):
        path.unlink()
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in S3DiT(network).state_dict().items()}
    names = list(shapes)
    for number in range(shards):
        own = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        state = {name: torch.empty(shapes[name]).normal_(std=0.02) for name in own}
        save_file(state, part / f"diffusion_pytorch_model-{number + 1:05}-of-{shards:05}.safetensors")


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def forget(folder: Path) -> None:
    """Put the files out of the page cache, as far as the system does."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_seconds(folder: Path) -> float:
    """Seconds to read all files in order into one buffer."""
    buffer = bytearray(_AT_ONCE)
    started = time.perf_counter()
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def loaded(folder: Path, tiny: Path) -> dict[str, float]:
    """In this process, which should be fresh: seconds to load, peak and resident bytes beyond what was there before."""
    from gesso.engine.loading import load_pipeline

    load_pipeline(str(tiny), "cpu", "float32", memory="full")  # libraries
    before = start_counting("cpu")
    started = time.perf_counter()
    pipeline = load_pipeline(str(folder), "cpu", "float32", memory="full")
    seconds = time.perf_counter() - started
    build = getattr(pipeline, "build")  # noqa: B009  # what loading adds
    return {"seconds": seconds, "peak": peak_of("cpu") - before, "weights": build.footprint.weights(build.memory)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where files are made, and taken away; else a temporary one")
    parser.add_argument("--one", nargs=2, type=Path, metavar=("FOLDER", "TINY"), help="measure here, as it is")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(loaded(*given.one)))
        return
    claims = Claims("load-time", given.save)
    with tempfile.TemporaryDirectory(dir=given.folder) as room:
        whole, tiny, home = (Path(room) / name for name in ("whole", "tiny", "home"))
        write_model(whole, given.gigabytes, given.shards)
        write_z_image(tiny, tiny=True)
        sizes = [path.stat().st_size for path in weight_files(whole)]
        os.sync()
        time.sleep(3)  # a file that was written to just now is not remembered
        for name, cold in (("first, digests computed", True), ("cold", True), ("in the page cache", False)):
            if cold:
                forget(whole)
            disk = plain_seconds(whole)
            if cold:
                forget(whole)
            command = [sys.executable, "-m", "benchmarks.load_time", "--one", str(whole), str(tiny)]
            environment = os.environ | {"GESSO_HOME": str(home)}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            rate, disk_rate = (sum(sizes) / seconds / 1e6 for seconds in (found["seconds"], disk))
            claims.report(
                f"loading, {name}, MB/s (rival: reading the files in order; wanted: {WANTED_RATE})",
                rate,
                disk_rate,
                rate / disk_rate,
                gigabytes=sum(sizes) / 1e9,
                seconds=found["seconds"],
            )
            beyond = found["peak"] - found["weights"]
            claims.report(
                f"loading, {name}, MB of memory beyond the weights (wanted: {WANTED_SHARDS} of the largest shard)",
                beyond / 1e6,
                max(sizes) / 1e6,
                beyond / max(sizes),
            )
    claims.keep()


if __name__ == "__main__":
    main()
