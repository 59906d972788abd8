"""A run that is an exploration: its curve, its heat maps and what it measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ghoststream.stages.exploring.report import ExplorationReport
from ghoststream.stages.reporting.read_plan import GAP_MAP, grid, measured_of, similarity_maps
from ghoststream.stages.reporting.runs import CurvePoint, Exploration, Run

_RESIDUAL_MAP = "relative residual of the repair, on the tokens that it was fitted on"


def read_exploration(path: Path, name: str) -> Run:
    """Read what `ghoststream explore` left.

    Raises:
        InputNotFoundError: If it is not there.
        ArtifactError: If it is damaged.
    """
    found = ExplorationReport.load(path)
    maps = asdict(found.maps)
    points = tuple(
        CurvePoint(
            found.plan_of(point),
            point.gap,
            point.gap_low,
            point.gap_high,
            point.perplexity,
        )
        for point in found.points
    )
    return Run(
        name=name,
        place=str(path),
        kind="exploration",
        base_digest=str(found.base["digest"]) if "digest" in found.base else None,
        chosen_by="explore",
        bytes_before=found.dense.weight_bytes,
        measured=measured_of(found.candidates),
        maps=(
            grid(GAP_MAP, maps, "gap"),
            *similarity_maps(maps),
            grid(_RESIDUAL_MAP, maps, "residual"),
        ),
        recipe=found.recipe,
        exploration=Exploration(points, found.verdict, found.findings.knee, found.cheap, found.broken),
    )
