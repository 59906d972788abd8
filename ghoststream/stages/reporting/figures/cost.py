"""Time and memory by stage, beside what was expected."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.files import format_bytes
from ghoststream.progress import human_seconds
from ghoststream.stages.reporting.comparison import ABSENT, Table
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing
from ghoststream.stages.reporting.runs import Run, StageTaken

_TITLE = "Time and memory by stage"
_Rows = Sequence[tuple[str, float | None, float | None]]


def cost(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw what each stage took, and what an estimate expected of it."""
    found = [(number, run, stage) for number, run in enumerate(runs) for stage in run.stages]
    if not found:
        return (Absent(_TITLE, "not recorded by these runs"),)

    def paint(canvas: Canvas) -> None:
        top, below = canvas.axes(2)
        for axes, name, scale in ((top, "seconds", 1.0), (below, "GiB of memory", 2.0**30)):
            for row, (number, _, stage) in enumerate(found):
                pair = _time(stage) if axes is top else _memory(stage)
                taken, expected = (None if value is None else value / scale for value in pair)
                style = canvas.series(number)
                if taken is not None:
                    axes.barh(row, taken, height=0.6, color=style["color"], linewidth=0)
                if expected is not None:
                    ink = canvas.ink
                    axes.plot([expected], [row], "D", color=ink.ground, mec=ink.text, mew=1.6, markersize=7)
            names = [canvas.short(f"{run.name}: {stage.name}") for _, run, stage in found]
            axes.set_yticks(range(len(found)), names)
            axes.set_ylim(len(found) - 0.5, -0.6)
            axes.set_xlim(left=0)
            axes.set_xlabel(name)

    told = "; ".join(f"{run.name} {stage.name} {_seconds(stage.seconds)}" for _, run, stage in found)
    return (
        Drawing(
            "cost",
            _TITLE,
            "Bars are what a stage took; memory is the largest of the process up to the end of the stage, "
            f"libraries included. {_expectation(runs)}",
            f"Time by stage: {told}.",
            1.4 + 2 * 0.3 * len(found),
            paint,
            _table(runs),
        ),
    )


def _expectation(runs: Sequence[Run]) -> str:
    stages = [stage for run in runs for stage in run.stages]
    if any(stage.expected_seconds is not None for stage in stages):
        return "Diamonds are the estimate; its memory is that of the work alone."
    advice = "give the file of ghoststream estimate --json too, or recover with --report"
    return f"Diamonds are the estimate, memory that of the work alone. Times were not estimated: {advice}."


def _time(stage: StageTaken) -> tuple[float | None, float | None]:
    return stage.seconds, stage.expected_seconds


def _memory(stage: StageTaken) -> tuple[float | None, float | None]:
    return stage.peak_bytes, stage.expected_bytes


def _table(runs: Sequence[Run]) -> Table:
    rows = tuple(
        (
            run.name,
            stage.name,
            _seconds(stage.seconds),
            _seconds(stage.expected_seconds),
            ABSENT if not stage.peak_bytes else format_bytes(stage.peak_bytes),
            ABSENT if not stage.expected_bytes else format_bytes(stage.expected_bytes),
        )
        for run in runs
        for stage in run.stages
    )
    headers = ("run", "stage", "took", "estimated", "memory up to its end", "estimated for the work")
    return Table(headers, rows)


def _seconds(value: float | None) -> str:
    return ABSENT if value is None else human_seconds(value)
