"""Checks any artifact completely."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.hub import resolve_checkpoint
from ghoststream.errors import DataError, RequestError
from ghoststream.files import parts_of
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stages.artifacts.bases import Base
from ghoststream.stages.artifacts.identify import Kind, identify
from ghoststream.stages.artifacts.kinds import KINDS

_WITH_WEIGHTS = frozenset({Kind.CHECKPOINT, Kind.RECOVERED, Kind.ADAPTER})


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked at ``path``, and what is broken.

    ``digest`` is that of all tensors of a checkpoint: two that have the same hold the same weights.
    ``in_short`` says the problems in fewer lines, where nearly all tensors are another model's; else nothing.
    """

    path: str
    kind: str
    checked: str
    problems: tuple[str, ...] = ()
    digest: str = ""
    in_short: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether nothing is broken."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        data = {**asdict(self), "problems": list(self.problems), "sound": self.sound}
        del data["in_short"]
        return data


def verify_path(
    path: str | Path, *, model: str | Path | None = None, progress: Progress | None = None
) -> VerifyReport:
    """Check the artifact at ``path`` (a local path, or the URL of a store) and report what is broken.

    Of a checkpoint every tensor is read.

    Args:
        path: The artifact.
        model: The model that it was made of: its tensors are compared with what they were then.
        progress: Who is told how far it is.

    Raises:
        InputNotFoundError: If there is nothing.
        RequestError: If it is nothing that ghoststream knows, or was made of no model and one is given.

    Memory: one shard of a store, or 1 MiB of a file; an operators file is loaded whole.
    """
    progress = progress or SilentProgress()
    try:
        kind = identify(path)
    except DataError as error:
        return VerifyReport(str(path), "unreadable file", "header", (str(error),))
    progress.log(f"checking {path}: {kind.value}")
    problems: list[str] = []
    in_short: list[str] = []
    digest = ""
    try:
        with parts_of(path, advice="restore it, or make it again"):
            problems += KINDS[kind].check(str(path))
        if kind in _WITH_WEIGHTS or model is not None:
            from ghoststream.stages.artifacts.weights import check_weights, compare_base

            # What is broken in the files themselves is told first, and weights may not be there to read.
            if kind in _WITH_WEIGHTS and not problems:
                broken, digest = check_weights(Path(path), progress)
                problems += broken
            if model is not None:
                root = resolve_checkpoint(model).root
                compared = compare_base(_base_of(kind, str(path)), str(path), root, progress)
                if compared.is_another:
                    in_short = [*problems, f"{model} is not the model that {path} was made of: {compared}"]
                problems += compared.problems
    except DataError as error:
        problems.append(str(error.args[0] if error.args else error))
    checked = KINDS[kind].checked if model is None else f"{KINDS[kind].checked}, tensors of {model}"
    found = tuple(dict.fromkeys(problems))
    return VerifyReport(str(path), kind.value, checked, found, digest, tuple(in_short))


def _base_of(kind: Kind, path: str) -> Base:
    read = KINDS[kind].base
    if read is None:
        msg = f"{path} is {kind.one}, which was made of no other model; leave --model out"
        raise RequestError(msg)
    return read(path)
