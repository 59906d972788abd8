"""The stage that chooses which layers to remove, from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghoststream.errors import ArtifactError, InputNotFoundError, OutputExistsError, PlanError
from ghoststream.files import read_json, require_writable
from ghoststream.options import Reduction
from ghoststream.progress import Progress, SilentProgress
from ghoststream.selection import SelectionResult, make_criterion
from ghoststream.spans import PruningPlan
from ghoststream.stages.evidence import StoreEvidence, discard_work
from ghoststream.stages.session import ModelOptions
from ghoststream.statistics import open_source, store_digest


def select(
    store_uri: str | Path,
    n_remove: int,
    *,
    criterion: str = "streamline",
    out: str | Path | None = None,
    model: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    memory: int | None = None,
    scheduler: Any = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> SelectionResult:
    """Choose ``n_remove`` layers by a criterion, and write the plan if ``out`` is given.

    The same request again returns what is in ``out``. What ``residual`` gathers is kept in ``<out>.partial`` until then,
    so that a killed run repeats at most one range of sequences, or one candidate.

    Args:
        store_uri: Path or URL of the store.
        n_remove: How many layers to remove.
        criterion: Name of a criterion (``docs/selection.md``).
        out: Plan file (JSON) to write.
        model: The checkpoint that the store was made of: local folder or hub id; for ``magnitude``.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Whether the model's own code may run.
        memory: Bytes that ``residual`` may take at a time in this process (on a cluster: one task); by default half
            of what is free. It decides the number of sweeps over the store, and changes no bit.
        scheduler: Address of a Dask scheduler, a ``distributed.Client``, or None for this process.
        workers: Threads in this process.
        progress: Told how many sequences are done.

    Raises:
        RequestError: If the criterion is unknown, cannot remove so many layers or needs a model, or ``out`` cannot be
            written.
        OutputExistsError: If ``out`` holds something else.
        StoreError: If a hidden state that is needed is not in the store.
        MismatchError: If the store is not of ``model``.
        NumericsError: If a hidden state or a solution is not finite.
        BudgetError, DiskFullError: If what ``residual`` gathers does not fit memory or disk.

    Memory: what the criterion's docstring states, once for each worker thread: for ``streamline``, ``shortgpt`` and
    ``uidl`` as many blocks of 1,024 tokens (at least one sequence) in float32 as hidden states wait for their partner.
    """
    out = None if out is None else Path(out)
    rule = make_criterion(criterion)
    source = open_source(str(store_uri))
    n_layers, digest = source.n_layers, store_digest(source)
    rule.check(n_layers, n_remove)
    if out is not None and out.exists():
        return _existing(out, criterion, n_remove, digest)
    if out is not None:
        require_writable(out)
    options = ModelOptions(revision=revision, trust_remote_code=trust_remote_code)
    reduction = Reduction.make({"scheduler": scheduler, "workers": workers, "memory": memory})
    made_of = None if model is None else (model, options)
    evidence = StoreEvidence(str(store_uri), source, made_of, reduction, out, progress or SilentProgress())
    choice = rule.choose(evidence, n_remove)
    plan = PruningPlan(n_layers, choice.chosen)
    result = SelectionResult(
        plan, criterion, n_remove, rule.meaning, choice.scores, choice.chosen, digest, choice.details
    )
    if out is not None:
        result.save(out)
        discard_work(out)
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
    if found is None or (found.criterion, found.remove, found.store_digest) != (
        criterion,
        n_remove,
        digest,
    ):
        msg = f"{out} exists and is not the plan of this request; choose another name, or move it away"
        raise OutputExistsError(msg)
    discard_work(out)
    return found
