"""Heat maps of single spans: start by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ghoststream.spans import Span
from ghoststream.stages.choosing.ranking import Similarity
from ghoststream.stages.choosing.trial import Row
from ghoststream.stages.exploring.report import Grid, HeatMaps


def heat_maps(ranked: Mapping[Span, Similarity], alone: Mapping[Span, Row]) -> HeatMaps:
    """Put what is known of single spans into matrices.

    Args:
        ranked: Similarities of the states around every span of some lengths.
        alone: Figures of the spans that were repaired and measured alone.
    """
    starts = tuple(sorted({span.start for span in ranked}))
    lengths = tuple(sorted({len(span) for span in ranked}))

    def grid(figure: Callable[[Span], float | None]) -> Grid:
        return _grid(starts, lengths, figure)

    return HeatMaps(
        starts,
        lengths,
        channel_cosine=grid(lambda span: ranked[span].channels if span in ranked else None),
        token_cosine=grid(lambda span: ranked[span].tokens if span in ranked else None),
        residual=grid(lambda span: float(alone[span]["residuals"][0]) if span in alone else None),
        gap=grid(lambda span: float(alone[span]["gap"]) if span in alone else None),
    )


def _grid(starts: Sequence[int], lengths: Sequence[int], figure: Callable[[Span], float | None]) -> Grid:
    return tuple(tuple(figure(Span(start, start + length)) for start in starts) for length in lengths)
