"""A recovery in less memory than a quarter of the checkpoint, killed at random moments: the same bytes.

    python benchmarks/bench_killed.py [--preset 70b-in-small] [--kills 10] [--json FILE]

The checkpoint has the proportions of a 70B, weights whose spectra fall as those of trained models do, and a
massive activation that is born and dies. Each command runs with RLIMIT_DATA at a quarter of the checkpoint:
private memory, of which a process that asks for more gets none. First undisturbed, then killed by SIGKILL
after a random share of the time that the undisturbed run took, up to three tenths, again and again, and run
to its end. What both leave is compared byte by byte. The peak is that of the undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from random_checkpoint import PRESETS, make, place_of
from results_file import write_json

from ghoststream.stages.run_record import NAME
from ghoststream.testing.synthetic import SINK_TOKEN, save_ids

WAYS: dict[str, list[str]] = {
    "published": ["--criterion", "streamline-published", "--operator", "ghost"],
    "measured": ["--criterion", "measured", "--operator", "least-squares", "--token-weights", "drop_sinks"],
}


def main() -> None:
    """Run each way undisturbed and killed, compare, print and write JSON."""
    options = _options()
    model = make(place_of(options.preset), options.preset)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    options.work.mkdir(parents=True, exist_ok=True)
    vocabulary = PRESETS[options.preset]["vocab_size"]
    text = save_ids(
        options.work / "ids.npy",
        sequences=options.sequences,
        length=options.length,
        vocab_size=vocabulary,
        first=SINK_TOKEN,
    )
    limit = size // 4
    rows: dict[str, Any] = {"settings": vars(options), "checkpoint": size, "limit": limit}
    for way in options.ways:
        request = [str(model), "--remove", str(options.remove), *WAYS[way], "--calibration", text]
        sizes = ["--sequences", str(options.sequences), "--length", str(options.length)]
        memory = ["--dtype", options.dtype, "--host-memory", str(limit * options.share // 100)]
        rows[way] = _compared([*request, *sizes, *memory], options, way, limit)
        write_json(options.json, rows)
        print(f"{way}: {json.dumps(rows[way])}", flush=True)


def _compared(request: list[str], options: argparse.Namespace, way: str, limit: int) -> dict[str, Any]:
    whole, killed = options.work / way / "whole", options.work / way / "killed"
    shutil.rmtree(options.work / way, ignore_errors=True)
    seconds = _finished(_start([*request, "--out", str(whole)], limit))
    draw, died = random.Random(options.seed), 0
    for _ in range(options.kills):
        process = _start([*request, "--out", str(killed)], limit)
        try:
            # Short enough that it is not finished long before the last kill, as what is finished is kept.
            process.wait(draw.uniform(0.05, 0.3) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            died += process.wait() == -signal.SIGKILL
    _finished(_start([*request, "--out", str(killed)], limit))
    record = json.loads((whole.with_name("whole.work") / NAME).read_text(encoding="utf-8"))
    same = _digests(whole) == _digests(killed)
    return {
        "seconds": round(seconds, 1),
        "killed": died,
        "same_bytes": same,
        "peak_bytes": record["peak_bytes"],
        "peak_share_of_limit": round(record["peak_bytes"] / limit, 3),
        "tasks": {task["name"]: task["seconds"] for task in record["tasks"]},
    }


def _start(request: list[str], limit: int) -> subprocess.Popen[bytes]:
    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-m", "ghoststream", "recover", *request]
    # glibc keeps freed blocks of up to 32 MiB for later, which the limit counts. Weights of a 70B are larger.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, preexec_fn=bounded, env=environment, stdout=quiet, stderr=quiet)


def _finished(process: subprocess.Popen[bytes]) -> float:
    begun = time.perf_counter()
    if process.wait():
        sys.exit(f"exit code {process.returncode}: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]
    return time.perf_counter() - begun


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="70b-in-small")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--remove", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--share", type=int, default=45, help="percent of the limit that a pass may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/ghoststream-bench/killed"))
    parser.add_argument("--json", type=Path, default=Path("bench_killed.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
