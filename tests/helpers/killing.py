"""Running a script that kills a command again and again, and what must be true of the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.forking import ForkServer


def run_killer(warm: ForkServer, name: str, *arguments: object) -> dict[str, Any]:
    """Run a script of this folder in a fork, and return the JSON object that it prints."""
    finished = warm.python(Path(__file__).with_name(name).read_text(), *arguments, seconds=3000)
    assert finished.exit_code == 0, finished.stderr[-4000:]
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def require_survived(result: dict[str, Any]) -> None:
    """Check that killed runs ended with the files of an undisturbed one, and repeated two layers at most.

    One of them was being committed, and the other one computed.
    """
    for run in result["killed"]:
        who = f"worker {run['worker']} " if "worker" in run else ""
        where = f"{who}killed before {run['operation']}"
        assert run["died"], where
        assert run["exit_code"] == 0, where
        assert run["files"] == result["whole"], where
        first, second = run["layers"]
        repeated = len(first) + len(second) - len(result["layers"])
        assert repeated in {0, 1, 2}, f"{where}: computed {first}, then {second}"
