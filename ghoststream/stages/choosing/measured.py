"""Measuring plans: each is repaired and run on held-out text, all in one read of the weights.

When the dense lane of a pass reaches the ``stop`` of a candidate span, everything that its fit needs has come
by: the operator is solved there and then, applied to the held-out states kept at ``start``, and the repaired
lane goes on from ``stop`` with the held-out sequences alone. Similarity says what hurts unrepaired; this says
what can be repaired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ghoststream.evaluation import (
    LossAccumulator,
    LossSummary,
    SampledPositions,
    default_logit_tokens,
    induction_tokens,
)
from ghoststream.progress import Progress
from ghoststream.spans import PruningPlan
from ghoststream.stages.choosing.by_text import gaps_by_text, mean_and_error, worst_text
from ghoststream.stages.choosing.fitted_lanes import FittedLanes
from ghoststream.stages.choosing.fitting import Noted, StreamedFit
from ghoststream.stages.choosing.moments import DENSE, Figures
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.writable import why_not_writable
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import Ranges
from ghoststream.streaming import Lane, PassOptions, StreamedPass, make_batches
from ghoststream.text import TokenSet


@dataclass(frozen=True)
class Candidate:
    """A plan that was repaired and measured.

    Attributes:
        repair: What was removed, and how it was repaired.
        losses: Losses of the repaired model on the held-out sequences.
        gaps: Its loss less the dense model's, for each of these.
        gap: Their mean.
        induction_gaps: The same of the tokens that could be copied from the window; None where it has none.
        gap_error: Standard error of that mean.
        refusal: Why the repaired model cannot be written; empty if it can.
        by_text: Where there are several texts: the mean gap of each.
        text_of: Number of the text that each held-out sequence is of; empty where there is one text.
        residuals: What each operator leaves of its gap, ``|prediction - d| / |d|`` on the tokens that it was
            fitted on; empty where that was not asked for.
    """

    repair: Repair
    losses: LossSummary
    gaps: tuple[float, ...]
    gap: float
    induction_gaps: tuple[float | None, ...]
    gap_error: float
    refusal: str = ""
    by_text: tuple[float | None, ...] = ()
    text_of: tuple[int, ...] = ()
    residuals: tuple[float, ...] = ()

    @property
    def plan(self) -> PruningPlan:
        """What was removed."""
        return self.repair.plan

    def to_json(self, across_texts: str = "mean") -> dict[str, Any]:
        """Return the figures as JSON data; with ``worst`` they say by which of several texts to rank."""
        texts: dict[str, Any] = {}
        if self.text_of:
            texts = {"gaps_by_text": list(self.by_text), "window_texts": list(self.text_of)}
        if across_texts == "worst":
            texts["worst_text"] = worst_text(self.by_text)
        return {
            "spans": [[span.start, span.stop] for span in self.plan.spans],
            "repair": self.repair.labels,
            "loss": self.losses.loss,
            "gap": self.gap,
            "gap_standard_error": self.gap_error if math.isfinite(self.gap_error) else None,
            "window_gaps": list(self.gaps),
            "window_induction_gaps": list(self.induction_gaps),
            **texts,
            **({"refusal": self.refusal} if self.refusal else {}),
            **({"residuals": list(self.residuals)} if self.residuals else {}),
        }


def measure_repairs(
    session: ModelSession,
    tokens: TokenSet,
    repairs: Sequence[Repair],
    *,
    ranges: Ranges | None,
    micro_batch: int,
    progress: Progress,
    positions: float = 1.0,
    residuals: bool = False,
) -> tuple[LossSummary, tuple[Candidate, ...]]:
    """Repair plans and measure them in one pass; the result is the same plan by plan.

    Args:
        session: The model.
        tokens: Sequences to fit on, then sequences to measure on.
        repairs: What to try; any number.
        ranges: How the sequences to fit on are divided; all others are measured on, in whole micro-batches.
            ``None`` if nothing is fitted, whatever the methods: all are measured on.
        micro_batch: Sequences in one forward; divides ``ranges.n_sequences``.
        progress: Who is told how far it is.
        positions: Share of the predictions of each window whose losses are taken, the same ones of all plans.
        residuals: Whether to say what each operator leaves of its gap, which takes about a solution more.

    Returns:
        Losses of the dense model, and the candidates in the order of ``repairs``.

    Raises:
        RequestError: If features of the layer before are asked for where there is none.
        UnsupportedModelError: If the model does not allow them.
        NumericsError: If a state or a solution is not finite.
        BudgetError: If two layers and a micro-batch do not fit the memory given.

    Repairs that begin alike, with the same first spans fitted in the same way, go together up to where they
    part: these are fitted once. So is each operator with dense inputs, for all repairs that have it.

    Memory: that of the pass; the states of all sequences once for each distinct ``start`` that waits for its
    ``stop`` (at most as many as the longest span has layers, and those of later boundaries with dense inputs;
    with their taps once for each distinct map that reads taps), once for the dense lane and for each distinct
    beginning that is between two spans; of the held-out sequences once for each candidate that is behind its
    last span; what the operator kind states for one boundary. Arithmetic, as multiples of the dense pass:
    ``1 + sum over candidates of held-out share x (L - last stop) / L``, for each distinct beginning the share
    of the layers between its last span and the next, and the fits.
    """
    skeleton = session.skeleton
    batches = make_batches(tokens.ids, tokens.mask, micro_batch)
    held = (0 if ranges is None else ranges.n_sequences, tokens.n_sequences)
    marked = induction_tokens(tokens.ids, tokens.mask)
    scored = SampledPositions(positions) if positions < 1.0 else None
    accumulators = [
        LossAccumulator(tokens.n_sequences, marked, scored=scored, name=name)
        for name in (DENSE, *(repair.name for repair in repairs))
    ]
    dense = Lane(DENSE, PruningPlan(skeleton.n_layers), logits=accumulators[0], carried=held, scored=scored)
    figures: Figures = "residual" if residuals else "none"
    fitted = FittedLanes(ranges, tokens.mask, session, carried=held, figures=figures)
    lanes = [
        replace(fitted.lane(repair.name, repair, logits=losses), scored=scored)
        for repair, losses in zip(repairs, accumulators[1:], strict=True)
    ]
    factory = fitted.memory(progress).states_factory(batches)
    options = PassOptions(
        logit_tokens=default_logit_tokens(skeleton.vocab_size, skeleton.unit_bytes), progress=progress
    )
    StreamedPass(skeleton, batches, [dense, *fitted.helpers(), *lanes], factory, options).run()
    reference, *found = [losses.summary() for losses in accumulators]
    return reference, tuple(
        replace(
            _candidate(repair, losses, reference, _refusal(repair, lane, session), tokens),
            residuals=_residuals(lane) if residuals else (),
        )
        for repair, losses, lane in zip(repairs, found, lanes, strict=True)
    )


def _refusal(repair: Repair, lane: Lane, session: ModelSession) -> str:
    """Say why the model cannot be written, or what was fitted be absorbed; lanes need neither."""
    refusals = (one.refusal for one in _noted(lane) if one.refusal)
    return next(refusals, "") or why_not_writable(session.skeleton, repair.plan)


def _residuals(lane: Lane) -> tuple[float, ...]:
    return tuple(one.residual for one in _noted(lane) if one.residual is not None)


def _noted(lane: Lane) -> list[Noted]:
    fits = (one.noted for one in lane.maps.values() if isinstance(one, StreamedFit))
    return [noted for noted in fits if noted is not None]


def _candidate(
    repair: Repair, losses: LossSummary, dense: LossSummary, refusal: str, tokens: TokenSet
) -> Candidate:
    pairs = zip(losses.sequence_losses, dense.sequence_losses, strict=True)
    gaps = tuple(mine - theirs for mine, theirs in pairs)
    of_induction = tuple(
        None if mine is None or theirs is None else mine - theirs
        for mine, theirs in zip(losses.marked_losses, dense.marked_losses, strict=True)
    )
    mean, error = mean_and_error(gaps)
    if tokens.text_of is None:
        return Candidate(repair, losses, gaps, mean, of_induction, error, refusal)
    text_of = tuple(tokens.text_of[list(losses.windows)].tolist())
    by_text = tuple(gaps_by_text(gaps, text_of, tokens.n_texts))
    return Candidate(repair, losses, gaps, mean, of_induction, error, refusal, by_text, text_of)
