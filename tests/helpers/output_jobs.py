"""Commands that write one output, on a tiny model: what they are given, and what they leave undisturbed."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.files import WorkFolder
from ghoststream.files.staging import StagingFolder
from ghoststream.testing.models import save_tiny
from tests.helpers.command_bench import run, succeed

SEQUENCES, LENGTH = 8, 16
FILES = (
    "select from a store",
    "select by running",
    "fit from a store",
    "fit by a sketch",
    "fit on taps",
    "fit by auto",
    "distill",
)
"""Jobs that keep something beside their file."""

JOBS = (*FILES, "evaluate", "export", "recover", "capture")


@dataclass(frozen=True)
class OutputJobs:
    """Commands by name, on inputs in a folder."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> OutputJobs:
        """Make the inputs in an empty folder."""
        jobs = cls(root)
        save_tiny("llama", root / "model", num_hidden_layers=4)
        ids = np.random.default_rng(0).integers(3, 128, size=(SEQUENCES, LENGTH))
        np.save(root / "ids.npy", ids)
        succeed(*jobs.command("capture", root / "store"))
        succeed(*jobs.command("fit from a store", root / "operators"))
        return jobs

    def command(self, job: str, out: Path) -> tuple[object, ...]:
        """Return the arguments of a job that writes ``out``."""
        spec, model = f"ids:{self.root / 'ids.npy'}", self.root / "model"
        sizes = ("--sequences", SEQUENCES, "--length", LENGTH)
        text = ("--calibration", spec, *sizes)
        stored = ("--store", self.root / "store")
        fit = ("fit", "--plan", "2:3", *stored, "--operator", "least-squares")
        sketch = ("--solver", "sketch-features", "--sketch-size", 8, "--power-iterations", 1)
        commands: dict[str, tuple[object, ...]] = {
            "select from a store": ("select", "--remove", 1, *stored, "--criterion", "residual"),
            "select by running": ("select", "--remove", 1, "--model", model, *text, "--operator", "ghost"),
            "fit from a store": fit,
            "fit by a sketch": (*fit, *sketch),
            "fit on taps": (*fit, "--features", "mlp", "--model", model),
            "fit by auto": ("fit", "--plan", "2:3", "--model", model, *text),
            "distill": ("distill", model, self.root / "operators", *text, "--steps", 2, "--batch", 4),
            "evaluate": ("evaluate", model, "--text", spec, *sizes),
            "export": ("export", model, "--operators", self.root / "operators"),
            "recover": ("recover", model, "--remove", "2:3", "--operator", "ghost", *text),
        }
        if job == "capture":
            return ("capture", model, *text, "--store", out)
        return (*commands[job], "--out", out)

    def run(self, job: str, out: Path) -> Any:
        """Run a job in this process."""
        return run(*self.command(job, out))

    def leave_kept_work(self, job: str, out: Path) -> None:
        """Leave what a run does that is killed when all is done but the rename of its result."""

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(StagingFolder, "commit", stop)
            if job in FILES:
                patched.setattr(WorkFolder, "remove", stop)
            assert self.run(job, out).exit_code == 130
        out.unlink(missing_ok=True)


def tree(place: Path) -> dict[str, str]:
    """Return the digest of a file, or of each file in a folder, but locks and what differs by nature.

    Of JSON that of what it says: blanks between tokens, and one at the end, may differ.
    """
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {
        str(path.relative_to(place)): hashlib.sha256(_content(path)).hexdigest()
        for path in files
        if path.name not in {".lock", "run.json"}
    }


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    with suppress(ValueError):
        return json.dumps(json.loads(content), sort_keys=True).encode()
    return content
