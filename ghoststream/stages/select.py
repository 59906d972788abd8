"""The stage that chooses which layers to remove, from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghoststream.errors import ArtifactError, InputNotFoundError, OutputExistsError, PlanError
from ghoststream.files import read_json, require_writable
from ghoststream.progress import Progress
from ghoststream.selection import SelectionResult, make_criterion
from ghoststream.spans import PruningPlan
from ghoststream.statistics import open_source, reduce_whole, store_digest


def select(
    store_uri: str | Path,
    n_remove: int,
    *,
    criterion: str = "streamline",
    out: Path | None = None,
    scheduler: Any = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> SelectionResult:
    """Choose ``n_remove`` layers by a criterion, and write the plan if ``out`` is given.

    The same request again returns what is in ``out``.

    Args:
        store_uri: Path or URL of the store.
        n_remove: How many layers to remove.
        criterion: Name of a criterion (``streamline``, ``shortgpt``).
        out: Plan file (JSON) to write.
        scheduler: Address of a Dask scheduler, a ``distributed.Client``, or None for this process.
        workers: Threads in this process.
        progress: Told how many sequences are done.

    Raises:
        RequestError: If the criterion is unknown or cannot remove so many layers, or ``out`` cannot be written.
        OutputExistsError: If ``out`` holds something else.
        StoreError: If a hidden state that is needed is not in the store.
        NumericsError: If a hidden state is not finite.

    Memory: a worker thread holds as many blocks of 1,024 tokens (at least one sequence) in float32 as hidden
    states wait for their partner: ``n_remove + 2`` for ``streamline``, 3 for ``shortgpt``.
    """
    rule = make_criterion(criterion)
    source = open_source(str(store_uri))
    n_layers, digest = source.n_layers, store_digest(source)
    reducer = rule.reducer(n_layers, n_remove)
    if out is not None and out.exists():
        return _existing(out, criterion, n_remove, digest)
    if out is not None:
        require_writable(out)
    state = reduce_whole(str(store_uri), reducer, scheduler=scheduler, workers=workers, progress=progress)
    choice = rule.choose(state, n_layers, n_remove)
    plan = PruningPlan(n_layers, choice.chosen)
    result = SelectionResult(plan, criterion, n_remove, rule.meaning, choice.scores, choice.chosen, digest)
    if out is not None:
        result.save(out)
    return result


def read_plan(source: str | Path | PruningPlan, n_layers: int) -> PruningPlan:
    """Return a plan from a plan file, from spans such as ``13:19``, or as it is, checked against the model.

    Raises:
        PlanError: If it is no plan, or one for another number of layers.
        InputNotFoundError: If it looks like a file, and there is none.
        ArtifactError: If the file is not JSON.
    """
    if isinstance(source, PruningPlan):
        plan = source
    elif Path(source).is_file():
        plan = _plan_file(Path(source))
    elif Path(source).suffix == ".json" or "/" in str(source):
        msg = f"there is no plan file {source}; check the path, or give spans such as 13:19"
        raise InputNotFoundError(msg)
    else:
        plan = PruningPlan.parse(n_layers, str(source))
    plan.require_fits(n_layers)
    if not plan.spans:
        msg = "the plan removes no layer; name at least one span, for example 13:19"
        raise PlanError(msg)
    return plan


def _plan_file(path: Path) -> PruningPlan:
    data = read_json(path)
    if not isinstance(data, dict):
        msg = f'{path} is not a pruning plan; it needs "n_layers" and "spans": [[start, stop], ...]'
        raise PlanError(msg)
    try:
        return PruningPlan.from_json(data.get("plan", data))
    except PlanError as error:
        msg = f"{path}: {error}"
        raise PlanError(msg) from error


def _existing(out: Path, criterion: str, n_remove: int, digest: str) -> SelectionResult:
    try:
        found = SelectionResult.load(out)
    except (ArtifactError, InputNotFoundError):
        found = None
    if found is None or (found.criterion, found.n_remove, found.store_digest) != (
        criterion,
        n_remove,
        digest,
    ):
        msg = f"{out} exists and is not the plan of this request; choose another name, or move it away"
        raise OutputExistsError(msg)
    return found
