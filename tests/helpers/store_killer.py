"""Write a store again and again, killed at one file operation after the other; run by tests.

Prints one JSON object: for each point at which a run was killed, the digest of every file after the next run.
``python store_killer.py ROOT STRIDE WHO...``: the kills come before the 1st, (1 + STRIDE)th, ... operation of
each WHO: ``whole``, one writer; ``first`` or ``last``, one of two writers of parts, who comes before or after
the other. What is left undisturbed is always what one writer leaves.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ghoststream.activations import ActivationStore, PartStore, WritableStore
from ghoststream.testing.stores import small_layout, small_request, small_states

PARTS = ((0, 2), (2, 5))
LAYOUT = small_layout(n_layers=1, n_sequences=5, sequences_per_shard=2, sequences_per_chunk=1)


def fill(root: Path, rows: tuple[int, int] | None = None) -> None:
    """What a capture does: scratch of the newest layer, the layer, then the older scratch is dropped."""
    with open_store(root, rows) as store:
        start, stop = store.rows
        for layer in LAYOUT.layers if not store.complete else ():
            states = small_states(LAYOUT, layer)[start:stop]
            if layer not in store.scratch_layers():
                with store.scratch_writer(layer, "float32") as writer:
                    writer.write(start, states.float())
                    writer.commit()
            if layer not in store.completed_layers():
                with store.writer(layer) as writer:
                    writer.write(start, states)
                    writer.commit()
            for older in store.scratch_layers():
                if older < layer:
                    store.drop_scratch(older)
        store.finish()


def open_store(root: Path, rows: tuple[int, int] | None) -> WritableStore:
    """Open the store, or a part of it."""
    if rows is None:
        return ActivationStore.create_or_resume(root, **small_request(LAYOUT))
    return PartStore.create_or_resume(root, rows, **small_request(LAYOUT))


def kill_before(operation: int) -> None:
    """Send SIGKILL to this process before its n-th change to the file system."""
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for owner, name in (
        (pathlib.Path, "replace"),
        (pathlib.Path, "unlink"),
        (os, "fsync"),
        (shutil, "rmtree"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def run_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process and return its wait status; zarr's threads do not exist yet here."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def digests(root: Path) -> dict[str, str]:
    """Digest every file, and name every folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(root.rglob("*"))
    }


def main(root: Path, stride: int, everyone: list[str]) -> None:
    """Kill each at every ``stride``-th operation, resume, and print what is there."""
    results = {
        f"{who} {operation}": found
        for who in everyone
        for operation, found in kill(root / who, stride, who).items()
    }
    _require(run_child(partial(fill, root / "undisturbed")), 0)
    print(json.dumps({"killed": results, "undisturbed": digests(root / "undisturbed")}))


def kill(root: Path, stride: int, who: str) -> dict[int, dict[str, str]]:
    """Kill one writer at every ``stride``-th operation, resume, and return what is there by operation."""
    rows = {"whole": None, "first": PARTS[0], "last": PARTS[1]}[who]
    results: dict[int, dict[str, str]] = {}
    operation = 1
    while True:
        store = root / str(operation)
        if who == "last":
            _require(run_child(partial(fill, store, PARTS[0])), operation)

        def killed(store: Path = store, operation: int = operation) -> None:
            kill_before(operation)
            fill(store, rows)

        status = run_child(killed)
        if status == 0:
            break
        _require(0 if os.WIFSIGNALED(status) else status, operation)
        _require(run_child(partial(fill, store, rows)), operation)
        if who == "first":
            _require(run_child(partial(fill, store, PARTS[1])), operation)
        results[operation] = digests(store)
        operation += stride
    return results


def _require(status: int, operation: int) -> None:
    if status != 0:
        sys.exit(f"failed around operation {operation}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
