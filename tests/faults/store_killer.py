"""Write a store again and again, killed at one file operation after the other; run by test_store_faults.

Prints one JSON object: for each point at which a run was killed, the digest of every file after the next run.
``python store_killer.py ROOT STRIDE``: the kills come before the 1st, (1 + STRIDE)th, ... operation.
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
from pathlib import Path
from typing import Any

from ghoststream.activations import ActivationStore
from ghoststream.testing.stores import small_layout, small_request, small_states, write_layer

LAYOUT = small_layout(n_layers=1, n_sequences=5, sequences_per_shard=2, sequences_per_chunk=1)


def fill(root: Path) -> None:
    """What a capture does: scratch of the newest layer, the layer, then the older scratch is dropped."""
    with ActivationStore.create_or_resume(root, **small_request(LAYOUT)) as store:
        for layer in LAYOUT.layers:
            states = small_states(LAYOUT, layer)
            if layer not in store.scratch_layers():
                with store.scratch_writer(layer, "float32") as writer:
                    writer.write(0, states.float())
                    writer.commit()
            if layer not in store.completed_layers():
                write_layer(store, layer, states)
            for older in store.scratch_layers():
                if older < layer:
                    store.drop_scratch(older)
        for layer in store.scratch_layers():
            store.drop_scratch(layer)


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


def main(root: Path, stride: int) -> None:
    """Kill at every ``stride``-th operation, resume, and print what is there."""
    results: dict[int, dict[str, str]] = {}
    operation = 1
    while True:
        store = root / str(operation)

        def killed(store: Path = store, operation: int = operation) -> None:
            kill_before(operation)
            fill(store)

        status = run_child(killed)
        if status == 0:
            break
        if not os.WIFSIGNALED(status) or run_child(lambda store=store: fill(store)) != 0:  # type: ignore[misc]
            sys.exit(f"failed around operation {operation}")
        results[operation] = digests(store)
        operation += stride
    print(json.dumps({"killed": results, "undisturbed": digests(store)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
