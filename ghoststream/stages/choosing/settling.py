"""Which of the repairs that were measured is taken, where differences are within their errors."""

from __future__ import annotations

import math

from ghoststream.stages.choosing.by_text import RANKED, difference
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.rounds import SURELY
from ghoststream.stages.choosing.trial import Ranked, Row


def settle(ranked: Ranked) -> Repair:
    """Return the repair that is taken of some that were measured on the same windows.

    Of those that are not surely worse than the best, those that are not surely worse on the tokens that could
    be copied from the window (:func:`~ghoststream.evaluation.induction_tokens`): they decide how a plan
    carries over to text of another kind, and differ more between plans. Of these one of the fewest spans, as
    each span is an operator more at inference; of these the best.
    """
    _, best = ranked[0]
    close = [pair for pair in ranked if not is_surely_worse(pair[1], best)]
    copying = min((row for _, row in close), key=_induction_gap)
    close = [pair for pair in close if not is_surely_worse(pair[1], copying, of="window_induction_gaps")]
    return min(close, key=lambda pair: len(pair[0].plan.spans))[0]


def is_surely_worse(row: Row, best: Row, *, of: str = RANKED) -> bool:
    """Say whether a repair is worse than another by more than :data:`SURELY` standard errors.

    The error is that of the mean difference over the windows that both were measured on. With one window
    there is none, and the lower loss counts.

    Args:
        row: Figures of the one.
        best: Figures of the other.
        of: Which figures by window are compared; windows where one is None do not count.
    """
    if bool(row.get("refusal")) != bool(best.get("refusal")):
        return bool(row.get("refusal"))
    mean, error = difference(row, best, of)
    return mean > (0.0 if math.isnan(error) else SURELY * error)


def _induction_gap(row: Row) -> float:
    gaps = [gap for gap in row["window_induction_gaps"] if gap is not None]
    return math.fsum(gaps) / len(gaps) if gaps else 0.0
