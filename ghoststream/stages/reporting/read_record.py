"""What a run took by stage, beside what was expected: its record, and an estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ghoststream.stages.reporting.runs import Run, StageTaken
from ghoststream.stages.run_record import RunRecord


def with_record(run: Run, record: RunRecord) -> Run:
    """Return a run with what its record says; a stage of several attempts is one stage."""
    taken: dict[str, StageTaken] = {}
    for stage in record.stages:
        earlier = taken.get(stage.name, StageTaken(stage.name, 0.0, 0))
        taken[stage.name] = replace(
            earlier,
            seconds=(earlier.seconds or 0.0) + stage.seconds,
            peak_bytes=max(earlier.peak_bytes or 0, stage.peak_bytes),
        )
    stages = tuple(taken.values())
    known = replace(
        run,
        stages=stages,
        seconds=sum(stage.seconds or 0.0 for stage in stages) if stages else record.seconds,
        peak_bytes=record.peak_bytes or None,
        state=record.outcome,
        command=record.command,
    )
    return with_expected(known, (record.estimate or {}).get("stages", ()))


def with_expected(run: Run, stages: Sequence[Mapping[str, Any]]) -> Run:
    """Return a run with what an estimate expects of its stages; what was expected before stays otherwise."""
    expected = {str(stage["name"]): stage for stage in stages}
    known = {stage.name: stage for stage in run.stages}
    named = [*known, *(name for name in expected if name not in known)] if run.stages else []
    found = []
    for name in named:
        stage, own = known.get(name, StageTaken(name)), expected.get(name, {})
        seconds, peak = own.get("seconds"), own.get("peak_bytes")
        found.append(
            replace(
                stage,
                expected_seconds=stage.expected_seconds if seconds is None else seconds,
                expected_bytes=peak or stage.expected_bytes,
            )
        )
    return replace(run, stages=tuple(found))


def fits_run(estimate: Mapping[str, Any], run: Run) -> bool:
    """Say whether an estimate is of a run: as many layers, and as many of them removed."""
    plan = run.plan
    return (
        plan is not None
        and bool(run.stages)
        and estimate["model"]["n_layers"] == plan.n_layers
        and estimate["n_removed"] == plan.n_removed
    )
