"""Singular values of the operators."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.stages.reporting.comparison import Table, figure
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing
from ghoststream.stages.reporting.runs import Run, Spectrum

_TITLE = "Spectra of the operators"
_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0)


def spectra(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw the singular values of what each operator adds."""
    found = [
        (number, run, at, boundary)
        for number, run in enumerate(runs)
        for at, boundary in enumerate(run.boundaries)
        if boundary.spectrum.values
    ]
    reasons = sorted({one.spectrum.absence for run in runs for one in run.boundaries if one.spectrum.absence})
    if not found:
        reason = "; ".join(reasons) or "no operators file lies beside the runs"
        return (Absent(_TITLE, reason),)

    def paint(canvas: Canvas) -> None:
        (axes,) = canvas.axes()
        for number, run, at, boundary in found:
            values = boundary.spectrum.values
            style = {**canvas.series(number), "linestyle": ("-", "--", ":", "-.")[at % 4], "markersize": 4}
            every = max(1, len(values) // 8)
            label = f"{canvas.short(run.name)} {boundary.span}"
            axes.plot(range(1, len(values) + 1), values, label=label, markevery=every, **style)
        canvas.logarithmic(axes, "y")
        axes.grid(visible=True, axis="y", linewidth=0.6)
        axes.set_xlabel("number of the singular value")
        axes.set_ylabel("singular value")
        canvas.legend(axes)

    rows = tuple(
        (run.name, str(boundary.span), boundary.kind, f"{len(boundary.spectrum.values):,}",
         *(figure(_at(boundary.spectrum, share)) for share in _QUANTILES))
        for _, run, _, boundary in found
    )  # fmt: skip
    headers = ("largest", *(f"after {share:.0%}" for share in _QUANTILES[1:-1]), "least")
    return (
        Drawing(
            "spectra",
            _TITLE,
            "Singular values of the map that is added to the hidden state, largest first. A value of 1 adds "
            f"as much as it takes in.{' Left out: ' + '; '.join(reasons) + '.' if reasons else ''}",
            "Singular values; the largest are "
            + "; ".join(
                f"{run.name} {one.span}: {figure(one.spectrum.values[0])}" for _, run, _, one in found
            ),
            3.6 + 0.2 * len(found),
            paint,
            Table(("run", "boundary", "operator", "values", *headers), rows),
        ),
    )


def _at(spectrum: Spectrum, share: float) -> float:
    return spectrum.values[round(share * (len(spectrum.values) - 1))]
