"""Checks any artifact completely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.index import CheckpointIndex, read_header
from ghoststream.errors import DataError, GhoststreamError, PlanError
from ghoststream.files import SUMS_NAME, read_json, verify_sums
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recovery.provenance import PROVENANCE_NAME
from ghoststream.spans import PruningPlan
from ghoststream.stages.artifacts import Kind, identify


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked at ``path``, and what is broken."""

    path: str
    kind: str
    checked: str
    problems: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether nothing is broken."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "problems": list(self.problems), "sound": self.sound}


def verify_path(path: str | Path, *, progress: Progress | None = None) -> VerifyReport:
    """Check the artifact at ``path`` (a local path, or the URL of a store) and report what is broken.

    Raises:
        InputNotFoundError: If there is nothing.
        RequestError: If it is nothing that ghoststream knows.

    Memory: one shard of a store, or 1 MiB of a file; an operators file is loaded whole.
    """
    progress = progress or SilentProgress()
    try:
        kind = identify(path)
    except DataError as error:
        return VerifyReport(str(path), "unreadable file", "header", (str(error),))
    checks: dict[Kind, tuple[str, Callable[[str], list[str]]]] = {
        Kind.STORE: ("manifest, metadata, shards, chunks, tokens", _store),
        Kind.CHECKPOINT: ("index, headers, sizes, checksums where there are any", _checkpoint),
        Kind.RECOVERED: ("checksums, index, headers, sizes, provenance", _recovered),
        Kind.OPERATORS: ("header, digest, values", _operators),
        Kind.TENSORS: ("header and size", _tensors),
        Kind.PLAN: ("spans", _plan),
        Kind.RUN_PLAN: ("JSON", _json),
        Kind.EVALUATION: ("JSON", _json),
        Kind.TASKS: ("JSON", _json),
    }
    checked, check = checks[kind]
    progress.log(f"checking {path}: {kind.value}")
    try:
        problems = check(str(path))
    except DataError as error:
        problems = [str(error.args[0] if error.args else error)]
    return VerifyReport(str(path), kind.value, checked, tuple(problems))


def _store(uri: str) -> list[str]:
    from ghoststream.activations import verify_store

    return [str(problem) for problem in verify_store(uri)]


def _checkpoint(path: str) -> list[str]:
    root = Path(path)
    CheckpointIndex.open(root)
    problems = [] if (root / "config.json").is_file() else [f"{root / 'config.json'} is missing"]
    return problems + (verify_sums(root) if (root / SUMS_NAME).is_file() else [])


def _recovered(path: str) -> list[str]:
    root = Path(path)
    problems = []
    if not (root / SUMS_NAME).is_file():
        problems.append(
            f"{root / SUMS_NAME} is missing: the files cannot be checked; export the checkpoint again"
        )
    try:
        provenance = read_json(root / PROVENANCE_NAME)
        PruningPlan.from_json(provenance["plan"])
    except DataError as error:
        problems.append(str(error.args[0]))
    except (PlanError, KeyError, TypeError) as error:
        problems.append(f"{root / PROVENANCE_NAME} lacks a part of what it should say ({error})")
    try:
        problems += _checkpoint(path)
    except GhoststreamError as error:
        # Weights that are not there would be a bad request elsewhere; an export without them is broken.
        problems.append(str(error.args[0]))
        problems += verify_sums(root) if (root / SUMS_NAME).is_file() else []
    return problems


def _operators(path: str) -> list[str]:
    from ghoststream.operators import OperatorSet

    OperatorSet.load(Path(path))
    return []


def _tensors(path: str) -> list[str]:
    read_header(Path(path))
    return []


def _plan(path: str) -> list[str]:
    data = read_json(Path(path))
    try:
        PruningPlan.from_json(data.get("plan", data))
    except PlanError as error:
        return [f"{path}: {error}"]
    return []


def _json(path: str) -> list[str]:
    read_json(Path(path))
    return []
