"""Commands in forks of a warm process: many of them in little time, none of which can hang or kill a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.helpers.command_bench import run

_SERVER = Path(__file__).with_name("fork_server.py")


@dataclass(frozen=True)
class Outcome:
    """How a command ended; ``exit_code`` is None where it had to be killed.

    ``calls`` are those of the system that a preloaded library counted, by kind.
    """

    exit_code: int | None
    stdout: str
    stderr: str
    calls: Mapping[str, int] = field(default_factory=dict)

    @property
    def complaint(self) -> str:
        """What is wrong with the way in which it ended; empty if it did, or said what to do."""
        if self.exit_code is None:
            return "hangs"
        if self.exit_code not in {0, 2, 3}:
            return f"exit code {self.exit_code}"
        if "Traceback" in self.stderr:
            return "shows a traceback"
        lines = self.stderr.strip().splitlines()
        problems = "problem" in self.stdout or "PROBLEM" in self.stdout or self.stdout.strip()
        if self.exit_code and not (lines and lines[-1].startswith("error: ")) and not problems:
            return "fails without an error"
        return ""


class Server(Protocol):
    """Something that runs commands."""

    def run(self, *arguments: object, seconds: float = 60, fail: dict[str, Any] | None = None) -> Outcome:
        """Run a command."""
        ...


class ForkServer:
    """A process that has imported everything and forks for each command."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, *arguments: object, seconds: float = 60, fail: dict[str, Any] | None = None) -> Outcome:
        """Run a command; ``fail`` says which call of the system shall fail, and how."""
        return self._ask({"arguments": list(map(str, arguments)), "seconds": seconds, "fail": fail})

    def python(self, code: str, *arguments: object, seconds: float = 300, **environment: str) -> Outcome:
        """Do what ``python -c CODE ARGUMENTS`` does in the top folder, with the environment of the caller.

        A signal that ended it is a negative exit code.
        """
        job = {"code": code, "arguments": list(map(str, arguments)), "seconds": seconds}
        return self._ask({**job, "environment": {**os.environ, **environment}})

    def _ask(self, job: dict[str, Any]) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(job)}\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Outcome(**answer)


class InProcess:
    """Runs commands as a server does, but in this process: for a few of which none can hang."""

    def run(self, *arguments: object, seconds: float = 60, fail: dict[str, Any] | None = None) -> Outcome:
        """Run a command; ``seconds`` is not looked at."""
        del seconds
        assert fail is None, "no call can be made to fail in this process"
        result = run(*arguments)
        return Outcome(result.exit_code, result.stdout, result.stderr)


@contextmanager
def fork_server(*, light: bool = False, **environment: str) -> Iterator[ForkServer]:
    """Start a server; it ends with the context.

    Args:
        light: Import nothing beforehand: for commands that read headers only.
        **environment: Added to the environment.
    """
    process = subprocess.Popen(
        [sys.executable, str(_SERVER), *(["--light"] if light else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=_SERVER.parents[2],
        env={**os.environ, "PYTHONPATH": str(_SERVER.parents[2]), **environment},
    )
    try:
        yield ForkServer(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
