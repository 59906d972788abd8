"""What it takes to write hidden states: ghoststream's writer beside plain zarr, in turns in one run.

    python benchmarks/bench_writing.py --folder /dev/shm

- `ghoststream` writes layers through a store's own writer: search for NaN, checksums, SHA-256, commit.
- `zarr` writes the same arrays shard by shard, and neither looks at the values nor hashes.
- `zarr, hashed` also does what a store promises: looks through the values, and hashes each file's bytes.
- `zarr, 4 threads` is `zarr, hashed` from four threads, a shard each.

Processor seconds are those of all threads of the process, so they hold on a machine that does other work too.
A row of rates comes before: each of the parts alone, on one thread. `from float32` writes float32 states into
stores of narrower types, int8 among them: processor seconds a gigabyte of what is given.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from results_file import write_json
from zarr.codecs import Crc32cCodec

from ghoststream.activations import ActivationStore
from ghoststream.testing.stores import small_layout, small_request

_MIB = 2**20


class Case:
    """Hidden states of one layer to write, and where.

    Args:
        folder: Where stores are made and removed.
        dtype: What is stored.
        shape: Sequences, positions, channels.
        per_shard: Sequences in one shard, a chunk each.
        layers: How many layers are written in a run.
        given: Type of the states before they are stored; as stored by default.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        shape: tuple[int, int, int],
        per_shard: int,
        layers: int,
        given: str | None = None,
    ) -> None:
        self.folder, self.dtype, self.layers, self.per_shard = folder, dtype, layers, per_shard
        states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.states = states.to(getattr(torch, given or dtype))
        stored = self.states.view(torch.uint16) if self.states.dtype == torch.bfloat16 else self.states
        self.stored: np.ndarray[Any, Any] = stored.numpy()

    @property
    def n_bytes(self) -> int:
        """Bytes of hidden states that a run is given."""
        return self.layers * self.stored.nbytes

    def ghoststream(self) -> None:
        """Write through a store."""
        n_sequences, length, hidden = self.states.shape
        layout = small_layout(
            n_sequences=n_sequences,
            length=length,
            hidden=hidden,
            n_layers=self.layers - 1,
            store_dtype=self.dtype,
            sequences_per_shard=self.per_shard,
            sequences_per_chunk=1,
        )
        with ActivationStore.create(self.folder / "ours", **small_request(layout)) as store:
            for layer in layout.layers:
                with store.writer(layer) as writer, torch.inference_mode():
                    for first in range(n_sequences):
                        writer.write(first, self.states[first : first + 1])
                    writer.commit()

    def zarr(self, *, hashed: bool = False, threads: int = 1) -> None:
        """Write with zarr, all layers into arrays of their own."""
        place = self.folder / "zarr"
        with ThreadPoolExecutor(threads) as pool:
            for layer in range(self.layers):
                array = zarr.create_array(
                    str(place / str(layer)),
                    shape=self.stored.shape,
                    shards=(self.per_shard, *self.stored.shape[1:]),
                    chunks=(1, *self.stored.shape[1:]),
                    dtype=self.stored.dtype,
                    compressors=[Crc32cCodec()],
                    filters=None,
                    fill_value=0,
                    config={"write_empty_chunks": True},
                )

                def write(first: int, array: zarr.Array[Any] = array, layer: int = layer) -> None:
                    rows = slice(first, first + self.per_shard)
                    if hashed and not bool(torch.stack(torch.aminmax(self.states[rows])).isfinite().all()):
                        raise ValueError(first)
                    array[rows] = self.stored[rows]
                    if hashed:
                        file = place / str(layer) / "c" / str(first // self.per_shard) / "0" / "0"
                        hashlib.sha256(file.read_bytes())

                list(pool.map(write, range(0, len(self.stored), self.per_shard)))
        os.sync()


def rates(rounds: int) -> dict[str, float]:
    """Return the processor seconds a gigabyte of each part of writing, on one thread, in memory."""
    values = torch.randn(8 * _MIB)
    data = values.numpy().view(np.uint8)
    other = np.empty_like(data)
    parts: dict[str, Callable[[], object]] = {
        "copy": lambda: np.copyto(other, data),
        "crc32c": lambda: google_crc32c.value(data),
        "sha256": lambda: hashlib.sha256(data).digest(),
    }
    return {name: round(_spent(part, rounds)[0] / data.nbytes * 1e9, 3) for name, part in parts.items()}


def _spent(work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the least processor seconds of a few runs, and the median of the seconds."""
    processor, wall = [], []
    for _ in range(rounds):
        begin = time.process_time(), time.perf_counter()
        work()
        processor.append(time.process_time() - begin[0])
        wall.append(time.perf_counter() - begin[1])
    return min(processor), statistics.median(wall)


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Return processor seconds a gigabyte and gigabytes a second of each way, and ratios to ours."""
    ways: dict[str, Callable[[], None]] = {
        "ghoststream": case.ghoststream,
        "zarr": case.zarr,
        "zarr, hashed": lambda: case.zarr(hashed=True),
        "zarr, 4 threads": lambda: case.zarr(hashed=True, threads=4),
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            spent[name].append(_spent(way, 1))
            for made in case.folder.iterdir():
                shutil.rmtree(made)
    found: dict[str, dict[str, float]] = {}
    for name, runs in spent.items():
        found[name] = {
            "processor s/GB": round(min(run[0] for run in runs) / case.n_bytes * 1e9, 3),
            "GB/s": round(case.n_bytes / min(run[1] for run in runs) / 1e9, 3),
        }
    ours = found["ghoststream"]["processor s/GB"]
    for figures in found.values():
        figures["processor time over ghoststream's"] = round(figures["processor s/GB"] / ours, 2)
    return found


def narrowed(folder: Path, shape: tuple[int, int, int], layers: int, rounds: int) -> dict[str, float]:
    """Return the processor seconds a gigabyte of float32 states that are stored in fewer bytes, in turns."""
    per_shard = max(1, 8 * _MIB // (shape[1] * shape[2]))
    cases = [Case(folder, dtype, shape, per_shard, layers, "float32") for dtype in ("bfloat16", "int8")]
    spent: dict[str, list[float]] = {case.dtype: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            spent[case.dtype].append(_spent(case.ghoststream, 1)[0])
            shutil.rmtree(folder / "ours")
    found = {dtype: min(runs) / cases[0].n_bytes * 1e9 for dtype, runs in spent.items()}
    return {**found, "int8 over bfloat16": found["int8"] / found["bfloat16"]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 2048, 2048], metavar=("S", "T", "C"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("bench_writing.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"settings": vars(options), "processor s/GB": rates(options.rounds)}
    print(results["processor s/GB"], flush=True)
    n_sequences, length, hidden = options.shape
    for dtype in ("bfloat16", "float32"):
        per_shard = max(1, 16 * _MIB // (length * hidden * (2 if dtype == "bfloat16" else 4)))
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            case = Case(Path(folder), dtype, (n_sequences, length, hidden), per_shard, options.layers)
            results[dtype] = measure(case, options.rounds)
        for name, figures in results[dtype].items():
            print(dtype, name, figures, flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shape = (n_sequences, length, hidden)
        results["from float32"] = narrowed(Path(folder), shape, options.layers, options.rounds)
    print("from float32", results["from float32"], flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
