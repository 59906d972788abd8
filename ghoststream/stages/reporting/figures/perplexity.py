"""Perplexity on each text, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.stages.reporting.comparison import Table, figure, gap_of, with_interval
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing, is_wide_range, shortened
from ghoststream.stages.reporting.figures.common import interval_row
from ghoststream.stages.reporting.runs import Loss, Run, TextMeasured, texts_of

_TITLE = "Perplexity"


def perplexity(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw the perplexity of every run on every text."""
    texts = texts_of(runs)
    if not texts:
        return (Absent(_TITLE, "no figures of ghoststream evaluate --out were given for any run"),)
    found = {text: _measured(runs, text) for text in texts}
    counts = [len(rows) for rows in found.values()]

    def paint(canvas: Canvas) -> None:
        for axes, (text, rows) in zip(canvas.axes(len(texts), counts), found.items(), strict=True):
            values = [loss.perplexity for _, loss in rows]
            for number, (run, loss) in enumerate(rows):
                style = canvas.series(list(runs).index(run))
                label = figure(loss.perplexity)
                interval_row(axes, number, loss.perplexity, loss.interval, style, label)
            if is_wide_range(values):
                canvas.logarithmic(axes, "x")
            axes.set_yticks(range(len(rows)), [canvas.short(run.name) for run, _ in rows])
            axes.set_ylim(len(rows) - 0.5, -0.6)
            axes.margins(x=0.14)
            axes.set_title(shortened(text.name, 46 if canvas.is_narrow else 110))
            axes.set_xlabel("perplexity")

    return (
        Drawing(
            "perplexity",
            _TITLE,
            "Lower is better. Lines are 95 % intervals over windows, of one model by itself: two models may "
            "differ surely where their lines overlap. The table has paired differences to the dense model.",
            "Perplexities: "
            + "; ".join(
                f"{run.name} {figure(loss.perplexity)} on {text.name}"
                for text, rows in found.items()
                for run, loss in rows
            ),
            0.5 + sum(0.85 + 0.32 * count for count in counts),
            paint,
            _table(runs, texts),
        ),
    )


def _measured(runs: Sequence[Run], text: TextMeasured) -> list[tuple[Run, Loss]]:
    pairs = [(run, run.loss_on(text)) for run in runs]
    return [(run, loss) for run, loss in pairs if loss is not None]


def _table(runs: Sequence[Run], texts: Sequence[TextMeasured]) -> Table:
    rows = []
    for text in texts:
        for run, loss in _measured(runs, text):
            gap = gap_of(run, runs, text)
            rows.append(
                (
                    run.name,
                    text.name,
                    with_interval(loss.perplexity, loss.interval, 5),
                    with_interval(loss.value, None, 5),
                    figure(loss.standard_error, 3),
                    f"{loss.tokens:,}",
                    "-" if gap is None else with_interval(gap.value, (gap.low, gap.high)),
                )
            )
    headers = (
        "run", "text", "perplexity [95 %]", "loss, nats a token", "standard error", "tokens",
        "above dense, nats a token [paired 95 %]",
    )  # fmt: skip
    return Table(headers, tuple(rows))
