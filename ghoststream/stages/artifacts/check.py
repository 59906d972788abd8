"""Complete checks, one for each kind of artifact; each returns what is broken.

What reads one kind is imported there: a plan must not wait for the libraries of a store.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ghoststream.checkpoint.configuration import read_config
from ghoststream.checkpoint.header import read_header
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.sizes import sizes_of
from ghoststream.errors import CheckpointError, DataError, GhoststreamError, PlanError, UnsupportedModelError
from ghoststream.files import SUMS_NAME, file_digest, read_json, unseal, verify_sums
from ghoststream.recovery.names import ADAPTER_NAME, GGUF_NAME, PROVENANCE_NAME
from ghoststream.recovery.sidecars import require_sound_sidecars
from ghoststream.spans import PruningPlan
from ghoststream.stages.run_record import RunRecord


def check_store(uri: str) -> list[str]:
    """Check every chunk of a store."""
    from ghoststream.activations import verify_store

    return [str(problem) for problem in verify_store(uri)]


def check_checkpoint(path: str) -> list[str]:
    """Check headers and sizes, checksums where there are any, and that weights are what the config says."""
    return _check_files(Path(path), ())


def _check_files(root: Path, required: tuple[str, ...]) -> list[str]:
    index = CheckpointIndex.open(root)
    required = (*index.shards, *required) if required else ()
    problems = [] if (root / "config.json").is_file() else [f"{root / 'config.json'} is missing"]
    problems += [str(index.absence(name).args[0]) for name in index.absent]
    problems += [] if problems else _misfits(index)
    return problems + (verify_sums(root, required=required) if (root / SUMS_NAME).is_file() else [])


def _misfits(index: CheckpointIndex) -> list[str]:
    """Compare headers with the configuration, of architectures that can be streamed."""
    try:
        # In any dtype: none of these sizes is told.
        sizes_of(index, read_config(index.root), "float32", None)
    except UnsupportedModelError:
        return []
    except CheckpointError as error:
        return [str(error.args[0])]
    return []


def check_recovered(path: str) -> list[str]:
    """Check checksums and provenance too."""
    return _check_repair(Path(path), _check_files)


def check_gguf(path: str) -> list[str]:
    """Check the checksum of the file, and the provenance."""

    def check_sums(root: Path, required: tuple[str, ...]) -> list[str]:
        return verify_sums(root, required=(GGUF_NAME, *required))

    return _check_repair(Path(path), check_sums)


def check_adapter(path: str) -> list[str]:
    """Check header, checksums and provenance."""

    def check_sums(root: Path, required: tuple[str, ...]) -> list[str]:
        read_header(root / ADAPTER_NAME)
        return verify_sums(root, required=(ADAPTER_NAME, *required))

    return _check_repair(Path(path), check_sums)


def _check_repair(root: Path, check_files: Callable[[Path, tuple[str, ...]], list[str]]) -> list[str]:
    problems, required = [], (PROVENANCE_NAME,)
    if not (root / SUMS_NAME).is_file():
        problems.append(
            f"{root / SUMS_NAME} is missing: the files cannot be checked; export the checkpoint again"
        )
    try:
        provenance = require_sound_sidecars(root)
        required = (PROVENANCE_NAME, *provenance["files"])
        PruningPlan.from_json(provenance["plan"])
    except DataError as error:
        problems.append(str(error.args[0]))
    except (PlanError, KeyError, TypeError) as error:
        problems.append(f"{root / PROVENANCE_NAME} lacks a part of what it should say ({error})")
    try:
        problems += check_files(root, required)
    except GhoststreamError as error:
        # Weights that are not there would be a bad request elsewhere; an export without them is broken.
        problems.append(str(error.args[0]))
        problems += verify_sums(root) if (root / SUMS_NAME).is_file() else []
    return problems


def check_operators(path: str) -> list[str]:
    """Load an operators file whole."""
    from ghoststream.operators import OperatorSet

    OperatorSet.load(Path(path))
    return []


def check_tensors(path: str) -> list[str]:
    """Read the header of a safetensors file."""
    read_header(Path(path))
    return []


def check_plan(path: str) -> list[str]:
    """Read a plan file whole."""
    from ghoststream.selection import Selection

    try:
        Selection.load(Path(path))
    except PlanError as error:
        return [str(error)]
    return []


def check_exploration(path: str) -> list[str]:
    """Read a report whole, and compare the files beside it with their digests."""
    from ghoststream.stages.exploring.report import ExplorationReport

    place = Path(path)
    report, folder = ExplorationReport.load(place), place if place.is_dir() else place.parent
    problems = []
    for name, digest in report.files.items():
        if not (folder / name).is_file():
            problems.append(f"{folder / name} is missing; run the same `ghoststream explore` again")
        elif file_digest(folder / name) != digest:
            problems.append(
                f"{folder / name} was changed after it was written; move it away and explore again"
            )
    return problems


def check_json(path: str) -> list[str]:
    """Read a JSON file."""
    read_json(Path(path))
    return []


def check_figures(path: str) -> list[str]:
    """Read a file of figures and check its digest; what a command printed has none."""
    data = read_json(Path(path))
    if not isinstance(data, list):
        unseal(data, path, advice="measure again")
    return []


def check_run(path: str) -> list[str]:
    """Read the record of a run."""
    RunRecord.load(Path(path))
    return []
