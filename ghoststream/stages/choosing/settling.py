"""Which of the repairs that were measured is taken: two losses of each, and their errors."""

from __future__ import annotations

import math

from ghoststream.stages.choosing.auto import preference
from ghoststream.stages.choosing.by_text import difference, gaps_by_text, worst_text
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.rounds import SURELY
from ghoststream.stages.choosing.trial import Ranked, Row


def settle(ranked: Ranked) -> Repair:
    """Return the repair that is taken of some that were measured on the same windows.

    Two losses count alike: that of all tokens, and that of the tokens that could be copied from the window
    (:func:`~ghoststream.evaluation.induction_tokens`), which decide how a plan carries over to text of
    another kind. Of the repairs that are not surely worse than the best in their mean, one of the fewest
    spans is taken, as each span is an operator more at inference; of these the best.
    """
    balanced = [(repair, _balanced(row)) for repair, row in ranked]
    best = min((row for _, row in balanced), key=preference)
    close = [pair for pair in balanced if not is_surely_worse(pair[1], best)]
    return min(close, key=lambda pair: (len(pair[0].plan.spans), *preference(pair[1])))[0]


def is_surely_worse(row: Row, best: Row) -> bool:
    """Say whether a repair is worse than another by more than :data:`SURELY` standard errors.

    The error is that of the mean difference over the windows that both were measured on. With one window
    there is none, and the lower loss counts.
    """
    if bool(row.get("refusal")) != bool(best.get("refusal")):
        return bool(row.get("refusal"))
    mean, error = difference(row, best)
    return mean > (0.0 if math.isnan(error) else SURELY * error)


def _balanced(row: Row) -> Row:
    """Return figures whose gaps are the means of both losses; a window with nothing to copy has one."""
    pairs = zip(row["window_gaps"], row["window_induction_gaps"], strict=True)
    gaps = [gap if copied is None else (gap + copied) / 2 for gap, copied in pairs]
    found = {**row, "window_gaps": gaps, "gap": math.fsum(gaps) / len(gaps)}
    if "worst_text" in row:
        means = gaps_by_text(gaps, row["window_texts"], len(row["gaps_by_text"]))
        found |= {"gaps_by_text": means, "worst_text": worst_text(means)}
    return found
