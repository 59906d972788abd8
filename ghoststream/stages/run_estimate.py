"""What a run is expected to take, and the command that repeats it, for the record of the run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ghoststream.errors import GhoststreamError
from ghoststream.options import Recovery
from ghoststream.progress import Progress
from ghoststream.redaction import without_secrets
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.session import ModelSession

_OF_A_STAGE = ("name", "seconds", "peak_bytes", "read_bytes", "write_bytes", "flops", "limited_by")


def expected(
    session: ModelSession, recovery: Recovery, out: Path, *, measure: bool, progress: Progress
) -> tuple[str, dict[str, Any] | None]:
    """Return the command of a recovery, and what it is expected to take, as JSON data.

    Args:
        session: The model.
        recovery: What is done.
        out: Folder of the recovered checkpoint.
        measure: Whether the machine is measured for two seconds; without it there are no times.
        progress: Who is told.

    Returns:
        The command line, without what is secret in URLs, and ``stages`` as an estimate has them. The text is
        empty where only a pipeline file says it all. An empty text and None where the model cannot be
        estimated: that ends no run.
    """
    try:
        found = estimate(recovery, model=session.root, measure=measure, progress=progress)
    except GhoststreamError:
        return "", None
    # An estimate knows the folder of a hub model, and not where the result goes.
    words = [*found.command[:2], session.name, *found.command[3:-1], str(out)] if found.command else []
    kept = [{name: stage[name] for name in _OF_A_STAGE} for stage in found.to_json()["stages"]]
    return without_secrets(shlex.join(words)), {"stages": kept}
