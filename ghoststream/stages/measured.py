"""Measuring plans: each is repaired and run on held-out text, all in one read of the weights.

When the dense lane of a pass reaches the ``stop`` of a candidate span, everything that its fit needs has come by: the
operator is solved there and then, applied to the held-out states kept at ``start``, and the repaired lane goes on
from ``stop`` with the held-out sequences alone. Similarity says what hurts unrepaired; this says what can be repaired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ghoststream.evaluation import LossAccumulator, LossSummary, default_logit_tokens
from ghoststream.progress import Progress
from ghoststream.spans import PruningPlan
from ghoststream.stages.fitting import DENSE, FitMethod, fitted_lane
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import RangePlan
from ghoststream.streaming import Lane, PassOptions, StreamedPass, make_batches
from ghoststream.text import TokenSet


@dataclass(frozen=True)
class Candidate:
    """A plan that was repaired and measured.

    Attributes:
        plan: What was removed.
        losses: Losses of the repaired model on the held-out sequences.
        gap: Mean over held-out sequences of its loss less the dense model's.
        gap_error: Standard error of that mean.
    """

    plan: PruningPlan
    losses: LossSummary
    gap: float
    gap_error: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {
            "plan": self.plan.to_json(),
            "loss": self.losses.loss,
            "gap": self.gap,
            "gap_standard_error": self.gap_error if math.isfinite(self.gap_error) else None,
        }


def measure_plans(
    session: ModelSession,
    tokens: TokenSet,
    plans: Sequence[PruningPlan],
    method: FitMethod,
    *,
    ranges: RangePlan,
    micro_batch: int,
    progress: Progress,
) -> tuple[LossSummary, tuple[Candidate, ...]]:
    """Repair plans and measure them in one pass; the result is the same plan by plan.

    Args:
        session: The model.
        tokens: Sequences to fit on, then sequences to measure on.
        plans: What to try; any number. Later spans of a plan are fitted on the model repaired so far.
        method: How boundaries are fitted.
        ranges: How the sequences to fit on are divided; all others are measured on, in whole micro-batches.
        micro_batch: Sequences in one forward; divides ``ranges.n_sequences``.
        progress: Who is told how far it is.

    Returns:
        Losses of the dense model, and the candidates in the order of ``plans``.

    Raises:
        NumericsError: If a state or a solution is not finite.
        BudgetError: If two layers and a micro-batch do not fit the memory given.

    Memory: that of the pass; the states of all sequences once for each distinct ``start`` that waits for its ``stop`` (at
    most as many as the longest span has layers) and once for the dense lane, and of the held-out sequences once for
    each candidate that is behind its last span; what ``solve`` states for one boundary. Arithmetic, as multiples of the dense
    pass: ``1 + sum over candidates of held-out share x (L - last stop) / L``, and the fits.
    """
    skeleton = session.skeleton
    batches = make_batches(tokens.ids, tokens.mask, micro_batch)
    held = (ranges.n_sequences, tokens.n_sequences)
    accumulators = [LossAccumulator(tokens.n_sequences) for _ in range(len(plans) + 1)]
    dense = Lane(DENSE, PruningPlan(skeleton.n_layers), logits=accumulators[0], goes_on=held)
    lanes = [
        fitted_lane(
            str(plan),
            plan,
            method,
            ranges,
            tokens.mask,
            session,
            logits=losses,
            goes_on=held,
        )
        for plan, losses in zip(plans, accumulators[1:], strict=True)
    ]
    factory = session.memory(tokens.length).states_factory(batches)
    options = PassOptions(
        logit_tokens=default_logit_tokens(skeleton.vocab_size, skeleton.unit_bytes), progress=progress
    )
    StreamedPass(skeleton, batches, [dense, *lanes], factory, options).run()
    reference, *found = [losses.summary() for losses in accumulators]
    return reference, tuple(
        _candidate(plan, losses, reference) for plan, losses in zip(plans, found, strict=True)
    )


def _candidate(plan: PruningPlan, losses: LossSummary, dense: LossSummary) -> Candidate:
    gaps = [mine - theirs for mine, theirs in zip(losses.sequence_losses, dense.sequence_losses, strict=True)]
    n = len(gaps)
    mean = math.fsum(gaps) / n
    spread = math.fsum((gap - mean) ** 2 for gap in gaps)
    return Candidate(plan, losses, mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan)
