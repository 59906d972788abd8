"""The figures of a page: one file each. Each takes all runs, and returns drawings or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ghoststream.stages.reporting.drawing import Absent, Drawing
from ghoststream.stages.reporting.figures.cost import cost
from ghoststream.stages.reporting.figures.curve import curve
from ghoststream.stages.reporting.figures.heat import heat
from ghoststream.stages.reporting.figures.layers import layers
from ghoststream.stages.reporting.figures.norms import norms
from ghoststream.stages.reporting.figures.perplexity import perplexity
from ghoststream.stages.reporting.figures.plans import plans
from ghoststream.stages.reporting.figures.ridge import ridge
from ghoststream.stages.reporting.figures.spectra import spectra
from ghoststream.stages.reporting.figures.tasks import tasks
from ghoststream.stages.reporting.runs import Run

FIGURES: tuple[Callable[[Sequence[Run]], Sequence[Drawing | Absent]], ...] = (
    curve,
    layers,
    perplexity,
    tasks,
    plans,
    heat,
    norms,
    ridge,
    spectra,
    cost,
)


def all_figures(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Return every figure of some runs, in the order of the page."""
    return tuple(one for figure in FIGURES for one in figure(runs))
