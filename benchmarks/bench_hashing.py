"""What hashing every tensor, and looking for NaN in it, adds to a pass; and the rates of hashes.

    python benchmarks/bench_hashing.py --preset 1.5gb --lengths 128 2048

- Rates on one thread, of bytes in memory: xxh3_128 and the search for NaN, which a pass does, and what was
  considered: sha256, blake2b, and BLAKE3 where the package blake3 is installed.
- A pass without head over one sequence of each length, with both and without, in turns within one process.
  The checkpoint is in the page cache. The ratios are those of the medians, of seconds and of processor
  seconds of all threads; the second holds on a machine that does other work too. The fewer the tokens, the
  more a pass is reading alone.
- Reading alone: all layers, one after the other, with both and without.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from random_checkpoint import PRESETS, make, place_of
from results_file import write_json

_BUFFER = 256 * 2**20


class _NoCheck:
    """Stands for the check of a tensor's content, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def update(self, chunk: memoryview) -> None:
        del chunk

    def digest(self) -> str:
        return ""


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    return statistics.median(_seconds(work) for _ in range(rounds))


def _seconds(work: Callable[[], object]) -> float:
    return _spent(work)[0]


def _spent(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds and processor seconds."""
    begin = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def rates(rounds: int) -> dict[str, float]:
    """Return GB/s of one thread."""
    import xxhash

    from ghoststream.checkpoint.contents import CHUNK_BYTES, ContentCheck

    numbers = np.random.default_rng(0).standard_normal(_BUFFER // 4, dtype=np.float32)
    whole = memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16)).cast("B")  # as bfloat16

    def both() -> None:
        check = ContentCheck("a", "BF16", Path("a"))
        for first in range(0, len(whole), CHUNK_BYTES):
            check.update(whole[first : first + CHUNK_BYTES])

    methods: dict[str, Callable[[], object]] = {
        "xxh3_128 and NaN": both,
        "xxh3_128": lambda: xxhash.xxh3_128(whole).digest(),
        "sha256": lambda: hashlib.sha256(whole).digest(),
        "blake2b": lambda: hashlib.blake2b(whole).digest(),
    }
    try:
        import blake3

        methods["BLAKE3"] = lambda: blake3.blake3(whole).digest()
    except ModuleNotFoundError:
        pass
    return {name: round(len(whole) / median_seconds(work, rounds) / 1e9, 2) for name, work in methods.items()}


def streamed(model: Path, length: int) -> None:
    """Run a pass over one sequence, without head."""
    import torch

    from ghoststream.spans import PruningPlan
    from ghoststream.streaming import Lane, MemoryBudget, PassMemory, Skeleton, StreamedPass, make_batches

    skeleton = Skeleton(model)
    ids = np.load(model / "ids.npy").reshape(-1)[:length].reshape(1, length)
    batches = make_batches(ids, None, 1)
    factory = PassMemory(skeleton, MemoryBudget(), length).states_factory(batches)
    with torch.no_grad():
        StreamedPass(skeleton, batches, [Lane("dense", PruningPlan(skeleton.n_layers))], factory).run()


def read_alone(model: Path) -> None:
    """Read every layer, and compute nothing."""
    from ghoststream.streaming import Skeleton

    skeleton = Skeleton(model)
    for layer in range(skeleton.n_layers):
        skeleton.read_layer(layer)


def compared(work: Callable[[], object], rounds: int) -> dict[str, float]:
    """Return medians with and without the checks, taken in turns, and their ratios."""
    place = "ghoststream.checkpoint.content_reader.ContentCheck"
    spent: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    work()
    for number in range(2 * rounds):
        name = "with" if number % 4 in (0, 3) else "without"  # in turns that favour neither
        with nullcontext() if name == "with" else mock.patch(place, _NoCheck):
            spent[name].append(_spent(work))
    figures: dict[str, float] = {}
    for unit, index in (("seconds", 0), ("processor seconds", 1)):
        medians = {name: statistics.median(one[index] for one in found) for name, found in spent.items()}
        figures |= {f"{unit} {name}": round(median, 4) for name, median in medians.items()}
        figures[f"ratio of {unit}"] = round(medians["with"] / medians["without"], 4)
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="1.5gb")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("bench_hashing.json"))
    options = parser.parse_args()
    model = make(place_of(options.preset), options.preset)
    results: dict[str, Any] = {
        "preset": options.preset,
        "rounds": options.rounds,
        "GB/s": rates(options.rounds),
    }
    print(results["GB/s"], flush=True)
    works: dict[str, Callable[[], object]] = {"reading alone": lambda: read_alone(model)}
    for length in options.lengths:
        works[f"pass of {length} tokens"] = lambda length=length: streamed(model, length)  # type: ignore[misc]
    for name, work in works.items():
        results[name] = compared(work, options.rounds)
        print(name, results[name], flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
