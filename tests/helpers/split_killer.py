"""Run the workers of a split capture as processes: at once, one after the other, and killed; run by tests.

``python split_killer.py ROOT SHARD_BYTES JOB ARGUMENTS``: ARGUMENTS is the command without ``--store`` and
``--worker`` as a JSON list. Shards are made small, so that small captures can be split. JOB is a JSON object:

- ``{"together": [2, 3, 4]}``: for each number, so many workers run at once.
- ``{"kill": CHOICE, "who": [1, 2]}``: the first of two workers, which makes the store, and the last, which
  folds the parts, are killed at the operations that CHOICE picks (see command_killer) and run again.
- ``{"kill beside": N}``: N times, one of two workers that run at once is killed at some operation and run
  again.

Prints one JSON object: the files of the store of one worker, and what the others left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ghoststream import costs
from tests.helpers.command_killer import choose, files, layers, run


def start(folder: Path, arguments: list[str], deadly: list[Any] | None = None) -> int:
    """Run a command in a process, as :func:`run` does, and return its number at once."""
    child = os.fork()
    if child == 0:
        status, _ = run(folder, arguments, deadly)
        os._exit(0 if status == 0 else signal.SIGKILL if os.WIFSIGNALED(status) else 1)
    return child


def exit_code(child: int) -> int:
    """Wait for a process of :func:`start`: 0, 9 if it was killed, 1 if it failed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Split:
    """The captures of one request, each in a folder of its own under ``root``."""

    def __init__(self, root: Path, arguments: list[str]) -> None:
        self._root = root
        self._arguments = arguments
        root.mkdir(parents=True)
        status, operations = run(root / "log", self.command("whole"))
        if status:
            sys.exit("the undisturbed run failed")
        self.layers = layers(operations)

    def command(self, name: str, worker: tuple[int, int] | None = None) -> list[str]:
        """Return the command of one worker, or of the only one, for the store ``name``."""
        share = [] if worker is None else ["--worker", "{}/{}".format(*worker)]
        return [*self._arguments, "--store", str(self._root / name), *share]

    def files(self, name: str) -> dict[str, str]:
        """Digest the files of a store."""
        return files(self._root / name)

    def together(self, count: int) -> dict[str, Any]:
        """Run ``count`` workers at once."""
        name = f"together-{count}"
        workers = [(number, count) for number in range(1, count + 1)]
        running = [start(self._root / f"{name}-{one[0]}", self.command(name, one)) for one in workers]
        codes = [exit_code(child) for child in running]
        return {"codes": codes, "files": self.files(name)}

    def kill(self, who: list[int], choice: dict[str, int]) -> list[dict[str, Any]]:
        """Kill the first of two workers in an empty place, the last where the other has finished."""
        run(self._root / "log", self.command("before last", (1, 2)))
        results = []
        if 1 in who:
            results += self._kill_one((1, 2), (2, 2), None, choice)
        if 2 in who:
            results += self._kill_one((2, 2), None, "before last", choice)
        return results

    def _kill_one(
        self,
        worker: tuple[int, int],
        after: tuple[int, int] | None,
        before: str | None,
        choice: dict[str, int],
    ) -> list[dict[str, Any]]:
        self._prepare("undisturbed", before)
        _, operations = run(self._root / "log", self.command("undisturbed", worker))
        shutil.rmtree(self._root / "undisturbed")
        results = []
        for operation in choose(operations, choice):
            self._prepare("killed", before)
            command = self.command("killed", worker)
            status, first = run(self._root / "log", command, operation)
            again, second = run(self._root / "log", command)
            if after is not None:
                run(self._root / "log", self.command("killed", after))
            results.append(
                {
                    "worker": worker,
                    "operation": operation,
                    "died": os.WIFSIGNALED(status),
                    "exit_code": os.waitstatus_to_exitcode(again),
                    "files": self.files("killed"),
                    "layers": [layers(first), layers(second)],
                }
            )
            shutil.rmtree(self._root / "killed")
        return results

    def kill_beside(self, count: int) -> list[dict[str, Any]]:
        """Kill one of two workers that run at once, at operations spread over its work."""
        self._prepare("undisturbed", None)
        _, operations = run(self._root / "log", self.command("undisturbed", (1, 2)))
        results = []
        for number in range(count):
            name, victim = f"beside-{number}", (1 + number % 2, 2)
            other = (3 - victim[0], 2)
            operation = operations[(2 * number + 1) * len(operations) // (2 * count)][:3]
            beside = start(self._root / f"{name}-other", self.command(name, other))
            time.sleep(0.05 * number)
            died = exit_code(start(self._root / f"{name}-victim", self.command(name, victim), operation))
            again = exit_code(start(self._root / f"{name}-again", self.command(name, victim)))
            codes = [exit_code(beside), again]
            results.append({"operation": operation, "died": died, "codes": codes, "files": self.files(name)})
        return results

    def _prepare(self, name: str, before: str | None) -> None:
        if before is not None:
            shutil.copytree(self._root / before, self._root / name)


def main(root: Path, shard_bytes: int, job: dict[str, Any], arguments: list[str]) -> None:
    """Do the job and print what came of it."""
    costs.SHARD_BYTES = shard_bytes
    split = Split(root, arguments)
    result: dict[str, Any] = {"whole": split.files("whole"), "layers": split.layers}
    if "together" in job:
        result["together"] = {str(count): split.together(count) for count in job["together"]}
    if "kill" in job:
        result["killed"] = split.kill(job["who"], job["kill"])
    if "kill beside" in job:
        result["beside"] = split.kill_beside(job["kill beside"])
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4]))
