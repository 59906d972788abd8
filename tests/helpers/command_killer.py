"""Run commands of the command line again and again, killed at one operation after the other.

``python command_killer.py ROOT CHOICE JOBS``: JOBS is a JSON object of argument lists. Each command runs in
processes of its own (forked, so that the libraries are imported once), each in its own folder under ROOT,
which takes the place of ``{work}`` in the arguments. First undisturbed; then for each chosen operation once
until SIGKILL strikes before it, and once more to the end. CHOICE is ``{"every": N, "first": M}``, or
``{"count": N}`` for so many operations of each kind and stage, or ``{"count": N, "of": "stage"}`` of each
stage.

Operations are layers of a pass, closing of scratch files for its states, writes of zarr and of checkpoint
shards (killed when half of it is written), renames, removals and syncs. Prints one JSON object: for each job
the files and the layers that each run left and computed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distributed  # noqa: F401 - here, so that it is imported once
import transformers.models.llama.modeling_llama  # noqa: F401 - the same
import zarr.storage._local as zarr_local

from ghoststream.activations import shard_workers
from ghoststream.checkpoint import writer as checkpoint_writer
from ghoststream.cli import main as command_line
from ghoststream.files import write_all
from ghoststream.recovery import export as checkpoint_export
from ghoststream.stages import steps
from ghoststream.stages.run_record import NAME as RECORD
from ghoststream.streaming import StreamedPass
from ghoststream.streaming.states import FileStates

_STAGES = {
    "capture": (steps, "capture_session"),
    "select": (steps, "select_from_store"),
    "fit": (steps, "fit_from_store"),
    "export": (checkpoint_export, "export_recovered"),
}


class Saboteur:
    """Counts the operations of this process, notes them in a log, and kills the process at one of them."""

    def __init__(self, log: Path, deadly: list[Any] | None) -> None:
        self._log = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._deadly = deadly
        # Threads do not always take turns in the same order, so each kind is counted for itself.
        self._numbers: defaultdict[tuple[str, str], Iterator[int]] = defaultdict(lambda: itertools.count(1))
        self._stage = "start"

    def install(self) -> None:
        """Watch everything that changes files, the layers, and the stages."""
        for owner, name in (
            (pathlib.Path, "replace"),
            (pathlib.Path, "rename"),
            (pathlib.Path, "unlink"),
            (shutil, "rmtree"),
            (StreamedPass, "_through_layer"),
            (FileStates, "close"),
        ):
            setattr(owner, name, self._counted(name, getattr(owner, name)))
        # SIGKILL leaves the page cache alone: syncing would only cost time here.
        os.fsync = self._counted("fsync", lambda _: None)
        zarr_local._put = self._counted("put", zarr_local._put, _half_put)
        vars(shard_workers)["_MOST_THREADS"] = 2  # so that a job takes the same memory on every machine
        vars(checkpoint_writer)["write_all"] = self._counted("write", write_all, _half_write)
        for stage, (module, function) in _STAGES.items():
            setattr(module, function, self._staged(stage, getattr(module, function)))

    def _counted(
        self, name: str, function: Callable[..., Any], half: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if isinstance(args[0], Path) and RECORD in args[0].name:
                return function(*args, **options)  # written by the clock, so never as often
            operation = [self._stage, name, next(self._numbers[self._stage, name])]
            layer = args[1] if name == "_through_layer" else None
            os.write(self._log, f"{json.dumps([*operation, layer])}\n".encode())
            if operation == self._deadly:
                if half is not None:
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    def _staged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._stage = name
            return function(*args, **options)

        return call


def _half_put(path: Path, value: Any, *_: Any) -> None:
    data = bytes(value.as_buffer_like())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".0123456789abcdef.partial").write_bytes(data[: len(data) // 2])


def _half_write(file: Any, chunk: memoryview) -> None:
    file.write(chunk[: len(chunk) // 2])


def run(folder: Path, arguments: list[str], deadly: list[Any] | None = None) -> tuple[int, list[list[Any]]]:
    """Run the command in a forked process; return its wait status and the operations it began."""
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(folder.with_suffix(".out"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
        try:
            Saboteur(log, deadly).install()
            command_line([part.replace("{work}", str(folder)) for part in arguments])
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on
            traceback.print_exc()
        os._exit(99)
    status = os.waitpid(child, 0)[1]
    operations = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return status, operations


def files(folder: Path) -> dict[str, str]:
    """Digest every file and name every folder, but locks and what differs by nature."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.name != "run.json" and not path.name.endswith(".lock")
    }


def layers(operations: list[list[Any]]) -> list[int]:
    """Layers that a run began to compute."""
    return [layer for *_, layer in operations if layer is not None]


def choose(operations: list[list[Any]], choice: dict[str, Any]) -> list[list[Any]]:
    """Pick the operations to die at."""
    everything = [operation[:3] for operation in operations]
    if "every" in choice:
        return everything[choice["first"] :: choice["every"]]
    kinds = defaultdict(list)
    for operation in everything:
        kinds[tuple(operation[: 1 if choice.get("of") == "stage" else 2])].append(operation)
    count = choice["count"]
    chosen = [
        same[(2 * part + 1) * len(same) // (2 * count)] for same in kinds.values() for part in range(count)
    ]
    # The last one as well: everything is done then, and only the process has not ended.
    return [*chosen, *(operation for operation in everything[-1:] if operation not in chosen)]


def survive(root: Path, choice: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """Run undisturbed, then killed at each chosen operation, and return what came of it."""
    whole = root / "whole"
    whole.mkdir(parents=True)
    status, operations = run(whole, arguments)
    if status:
        sys.exit("the undisturbed run failed")
    killed = []
    for operation in choose(operations, choice):
        folder = root / "-".join(map(str, operation))
        folder.mkdir()
        status, first = run(folder, arguments, deadly=operation)
        again, second = run(folder, arguments)
        killed.append(
            {
                "operation": operation,
                "died": os.WIFSIGNALED(status),
                "exit_code": os.waitstatus_to_exitcode(again),
                "files": files(folder),
                "layers": [layers(first), layers(second)],
            }
        )
        shutil.rmtree(folder)
    return {
        "whole": files(whole),
        "layers": layers(operations),
        "operations": len(operations),
        "killed": killed,
    }


if __name__ == "__main__":
    jobs = json.loads(sys.argv[3])
    print(
        json.dumps(
            {name: survive(Path(sys.argv[1], name), json.loads(sys.argv[2]), jobs[name]) for name in jobs}
        )
    )
