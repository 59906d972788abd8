"""What a user names becomes runs: files are told apart, and those of one run put together."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.files import file_digest, parts_of, read_json
from ghoststream.operators import OperatorSet
from ghoststream.recovery.sidecars import require_sound_sidecars
from ghoststream.redaction import without_secrets
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from ghoststream.stages.artifacts.explain import figure_rows
from ghoststream.stages.artifacts.identify import Kind, identify
from ghoststream.stages.reporting.read_exploration import read_exploration
from ghoststream.stages.reporting.read_figures import losses_of, scores_of
from ghoststream.stages.reporting.read_operators import boundaries_of, recovered_operators
from ghoststream.stages.reporting.read_plan import maps_of, measured_of, norms_of
from ghoststream.stages.reporting.read_record import fits_run, with_expected, with_record
from ghoststream.stages.reporting.runs import Run
from ghoststream.stages.run_record import NAME as RECORD_NAME
from ghoststream.stages.run_record import WORK, RunRecord, work_folder

_ADVICE = "restore it, or make it again"
Row = Mapping[str, Any]


def read_runs(places: Sequence[str | Path]) -> tuple[Run, ...]:
    """Read runs, and put figures to the models that they are of, by fingerprint.

    Args:
        places: Recovered folders, folders beside them (``OUT.work``), plan files, operators files,
            explorations, files of figures, estimates; in the order in which they are shown.

    Raises:
        InputNotFoundError: If there is nothing at a place.
        RequestError: If it is something else, or no place is given.
        ArtifactError, CheckpointError: If it is damaged.

    Memory: one operator at a time, in float64, and the figures.
    """
    if not places:
        msg = "nothing to report on; name at least one run"
        raise RequestError(msg)
    runs: list[Run] = []
    rows: list[tuple[Path, Row]] = []
    estimates: list[Row] = []
    for place in dict.fromkeys(Path(one) for one in places):
        with parts_of(place, advice=_ADVICE):
            kind = _kind(place)
            if kind in (Kind.EVALUATION, Kind.TASKS):
                rows += [(place, row) for row in figure_rows(place)]
            elif kind is Kind.ESTIMATE:
                estimates.append(read_json(place))
            else:
                run, own = _read(place, kind)
                runs.append(run)
                rows += [(place, row) for row in own]
    runs = [_with_estimates(run, estimates) for run in runs]
    return _named(_with_rows(runs, rows))


def _kind(place: Path) -> Kind | None:
    """Return the kind of an artifact; None for the folder beside a recovered checkpoint."""
    if place.is_dir() and (place / RECORD_NAME).is_file() and not (place / "manifest.json").is_file():
        return None
    return identify(place)


def _read(place: Path, kind: Kind | None) -> tuple[Run, Sequence[Row]]:
    name = place.resolve().name.removesuffix(WORK)
    if kind is None:
        result = place.resolve().with_name(name)
        if result.is_dir() and result.name != place.resolve().name and _is_recovered(result):
            return _read_recovered(result, place, name)
        return _read_work(Run(name, str(place), "folder of a run, without its result"), place)
    if kind is Kind.RECOVERED:
        return _read_recovered(place, work_folder(place.resolve()), name)
    if kind is Kind.PLAN:
        return _with_plan(Run(name, str(place), kind.value), Selection.load(place)), ()
    if kind is Kind.OPERATORS:
        return _with_operators(Run(name, str(place), kind.value), place, OperatorSet.load(place)), ()
    if kind is Kind.EXPLORATION:
        return read_exploration(place, name), ()
    msg = (
        f"{place} is {kind.one}, of which a report shows nothing; name recovered folders, plan files, "
        "operators files, explorations and files of figures"
    )
    raise RequestError(msg)


def _is_recovered(folder: Path) -> bool:
    try:
        return identify(folder) is Kind.RECOVERED
    except (RequestError, InputNotFoundError):
        return False


def _read_recovered(folder: Path, work: Path, name: str) -> tuple[Run, Sequence[Row]]:
    found = require_sound_sidecars(folder)
    rounds = [*found.get("rounds", ()), found]
    plans = [PruningPlan.from_json(one["plan"]) for one in rounds]
    base = rounds[0]["base"]
    kept = found["operators"]
    run = Run(
        name,
        str(folder),
        Kind.RECOVERED.value,
        plan=functools.reduce(PruningPlan.then, plans),
        digests=frozenset({str(checkpoint_fingerprint(folder)["digest"])}),
        base_digest=str(base["digest"]),
        operator=str(kept["kind"]),
        bytes_before=sum(int(shard["bytes"]) for shard in base["shards"].values()),
        bytes_after=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        recipe=kept["metadata"].get("recipe", {}),
    )
    digest = kept["metadata"].get("recipe_digest")
    run, rows = _read_work(run, work, digest=digest, plan=plans[-1])
    if not run.boundaries:
        operators = recovered_operators(folder)
        run = run if operators is None else replace(run, boundaries=boundaries_of(operators))
    return run, rows


def _read_work(
    run: Run, work: Path, *, digest: str | None = None, plan: PruningPlan | None = None
) -> tuple[Run, Sequence[Row]]:
    """Add what lies in the folder beside a recovered checkpoint; it may have been removed."""
    if not work.is_dir():
        return run, ()
    for file in sorted(work.glob("plan-*.json")):
        selection = Selection.load(file)
        if plan is None or selection.plan == plan:
            run = _with_plan(run, selection)
    for file in sorted(work.glob("*.safetensors")):
        operators = OperatorSet.load(file)
        if digest is None or operators.metadata.get("recipe_digest") == digest:
            run = _with_operators(run, file, operators)
    if (work / RECORD_NAME).is_file():
        run = with_record(run, RunRecord.load(work / RECORD_NAME))
    figures = work / "evaluation.json"
    return run, figure_rows(figures) if figures.is_file() else ()


def _with_plan(run: Run, selection: Selection) -> Run:
    base = selection.base.get("digest")
    return replace(
        run,
        plan=run.plan or selection.plan,
        base_digest=run.base_digest or (None if base is None else str(base)),
        chosen_by=selection.criterion,
        measured=measured_of(selection.candidates),
        maps=maps_of(selection),
        norms=norms_of(selection),
        recipe=run.recipe or selection.recipe,
    )


def _with_operators(run: Run, path: Path, operators: OperatorSet) -> Run:
    base = (operators.metadata.get("base") or {}).get("digest")
    return replace(
        run,
        plan=run.plan or operators.plan,
        digests=run.digests | {file_digest(path)},
        base_digest=run.base_digest or (None if base is None else str(base)),
        operator=operators.kind,
        boundaries=boundaries_of(operators),
        recipe=operators.metadata.get("recipe") or run.recipe,
    )


def _with_estimates(run: Run, estimates: Sequence[Row]) -> Run:
    for estimate in estimates:
        if fits_run(estimate, run):
            run = with_expected(run, estimate["stages"])
    return run


def _with_rows(runs: Sequence[Run], rows: Sequence[tuple[Path, Row]]) -> list[Run]:
    """Put rows of figures to their models; a model that nobody named is a run of its own, and comes first."""
    known, others = list(runs), dict[str, Run]()
    for place, row in rows:
        with parts_of(place, advice=_ADVICE):
            digest = str(row["fingerprint"])
            losses, scores = losses_of(row), scores_of(row)
            owners = [number for number, run in enumerate(known) if digest in run.digests]
            for number in owners:
                known[number] = _with_figures(known[number], losses, scores)
            if not owners:
                own = others.get(digest) or Run(
                    _short(str(row["model"])), str(place), "measured model", digests=frozenset({digest})
                )
                others[digest] = _with_figures(own, losses, scores)
    return [*others.values(), *known]


def _with_figures(run: Run, losses: Sequence[Any], scores: Sequence[Any]) -> Run:
    return replace(
        run,
        losses=tuple(dict.fromkeys((*run.losses, *losses))),
        scores=tuple(dict.fromkeys((*run.scores, *scores))),
    )


def _short(model: str) -> str:
    """Return the last part of a path; a hub id stays whole."""
    path = Path(model)
    return path.name if path.is_absolute() or len(path.parts) != 2 else model


def _named(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Give each run a name of its own that can be shown."""
    found: list[Run] = []
    taken: set[str] = set()
    for run in runs:
        name = base = printable(run.name) or "unnamed"
        number = 2
        while name in taken:
            name, number = f"{base} ({number})", number + 1
        taken.add(name)
        found.append(
            replace(run, name=name, place=printable(run.place), command=without_secrets(run.command))
        )
    return tuple(found)


def printable(text: str) -> str:
    """Return text as it can be shown: no secrets of URLs, no control characters, no half characters."""
    shown = without_secrets(text).encode(errors="replace").decode()
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in shown
    )
