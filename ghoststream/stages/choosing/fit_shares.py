"""A fit whose sequences several workers share.

An operator is fitted on all sequences, in the middle of a pass. So there is a round for each boundary that
reads the repaired stream: every worker runs its sequences from the first layer to the stop of that span, with
the operators of earlier rounds in their places, and sums; this process puts the sums together and solves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ghoststream.operators import BoundaryOperator
from ghoststream.options import Compute, Method
from ghoststream.progress import KeptLines, Progress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.division import dealt_ranges
from ghoststream.stages.choosing.moments import DENSE, FitPlace, fitted_operator, place_fits
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.summing import SummedBoundary
from ghoststream.stages.lanes import operator_map
from ghoststream.stages.session import ModelSession
from ghoststream.stages.shared_session import Answer, accepted, answer, open_shared
from ghoststream.stages.workers import Workers
from ghoststream.statistics import Ranges, SumState
from ghoststream.statistics.ranges import SequenceRange, TreeNode
from ghoststream.statistics.streamed import sums_by
from ghoststream.streaming import Batch, Lane, PassOptions, StreamedPass, make_batches
from ghoststream.text import TokenSet

Known = Mapping[Span, BoundaryOperator]
"""The operators of earlier rounds."""

Sums = Mapping[TreeNode, SumState]
"""What a share has of the sums of a boundary."""


@dataclass(frozen=True)
class SharedFit:
    """What is fitted and on what, the same for all workers and rounds.

    Attributes:
        tokens: The text; all sequences serve to fit.
        repair: What is removed, and how each boundary is fitted.
        ranges: How the sequences are divided.
        micro_batch: Sequences in one forward.
    """

    tokens: TokenSet
    repair: Repair
    ranges: Ranges
    micro_batch: int

    def rounds(self) -> list[tuple[Span, ...]]:
        """Return the boundaries that are summed together: those that read dense states, each other alone."""
        first, *later = self.repair.plan.spans
        dense = tuple(span for span in later if self.repair.by_span[span].inputs == "dense")
        return [(first, *dense), *((span,) for span in later if span not in dense)]

    def shares(self, crew: Workers) -> list[tuple[SequenceRange, ...]]:
        """Return the ranges of each worker: those that begin in its run of whole micro-batches.

        A range that ends in the micro-batch of a neighbour has that computed twice.
        """
        return dealt_ranges(self.ranges, crew.rows(self.ranges.n_sequences, self.micro_batch))

    def batches(self, own: Sequence[SequenceRange]) -> tuple[Batch, ...]:
        """Return the micro-batches that hold the sequences of some ranges, as one process cuts them."""
        everything = make_batches(self.tokens.ids, self.tokens.mask, self.micro_batch)
        return tuple(one for one in everything if one.start < own[-1].stop and one.stop > own[0].start)

    def boundary(
        self,
        span: Span,
        session: ModelSession,
        own: Sequence[SequenceRange] | None = None,
        place: FitPlace | None = None,
    ) -> SummedBoundary:
        """Return what sums at a span, over some ranges or all."""
        return SummedBoundary(
            span, self._method(span), self.ranges, self.tokens.mask, session, own=own, place=place
        )

    def lane(self, boundary: SummedBoundary, known: Known, session: ModelSession) -> Lane:
        """Return the lane that comes to a boundary: over what is removed before it, unless it is dense."""
        span, plan = boundary.span, self.repair.plan
        if self._reads_dense(span):
            alone = PruningPlan(plan.n_layers, (span,))
            return Lane(f"{span} alone", alone, {span: boundary}, until=span.stop)
        maps = {one: operator_map(known[one], session.skeleton) for one in plan.spans if one < span}
        return Lane("repaired", plan, {**maps, span: boundary}, until=span.stop)

    def before(self, span: Span, found: Known) -> Known:
        """Return the operators that a worker applies on the way to a boundary."""
        return {} if self._reads_dense(span) else {one: found[one] for one in found if one < span}

    def _reads_dense(self, span: Span) -> bool:
        return span == self.repair.plan.spans[0] or self.repair.by_span[span].inputs == "dense"

    def _method(self, span: Span) -> Method:
        # In a lane of its own what a boundary reads is dense without being told.
        return self.repair.by_span[span].model_copy(update={"inputs": "repaired"})


def fit_shares(
    crew: Workers, session: ModelSession, fit: SharedFit, progress: Progress
) -> list[BoundaryOperator]:
    """Have workers sum what the boundaries of a plan read, and fit them, to the bits of one process.

    The bits do not depend on the number of workers: a micro-batch decides every bit of its states, and sums
    of ranges are merged in the order that their division fixes.

    Args:
        crew: The workers. They see the model.
        session: The model, which runs no pass here.
        fit: What is fitted.
        progress: Who is told how far it is.

    Returns:
        The operators, in the order of the spans.

    Raises:
        MismatchError: If a worker finds another model.
        CheckpointError: If workers read different weights.
        NumericsError: If a state or a solution is not finite.
        GhoststreamError: What :meth:`~ghoststream.stages.workers.Workers.run` raises.

    Memory: on each worker that of a pass over its sequences, the states of these twice or three times, and
    what :meth:`~ghoststream.stages.choosing.moments.Boundary.sums` states. Here, for one round, the sums of
    all folds once or twice for each worker, in float64, and what the operator's ``cost`` states for one
    boundary.
    """
    dealt, rounds = fit.shares(crew), fit.rounds()
    found: dict[Span, BoundaryOperator] = {}
    for number, spans in enumerate(rounds, 1):
        named = ", ".join(map(str, spans))
        progress.log(f"round {number} of {len(rounds)}: {len(dealt)} workers sum at {named}")
        request = (session.name, str(session.fingerprint["digest"]), fit, fit.before(spans[0], found), spans)
        shares = [(*request, own) for own in dealt]
        answers = crew.run(sum_share, session.compute, shares, [_length(own) for own in dealt], progress)
        summed = accepted(answers, session, "a worker summed", progress)
        for span in spans:
            found[span] = _fitted(fit, span, [sums.pop(span) for sums in summed], session, progress)
    return [found[span] for span in fit.repair.plan.spans]


def sum_share(
    compute: Compute,
    model: str,
    digest: str,
    fit: SharedFit,
    known: Known,
    spans: tuple[Span, ...],
    own: Sequence[SequenceRange],
) -> Answer[dict[Span, Sums]]:
    """Sum some ranges at the boundaries of a round, on a worker.

    Raises:
        MismatchError: If the model is another one.
        GhoststreamError: What opening the model, and the pass raise.
    """
    session, told = open_shared(compute, model, digest), KeptLines()
    place, last = FitPlace(), max(span.stop for span in spans)
    boundaries = [fit.boundary(span, session, own, place) for span in spans]
    lanes = [fit.lane(one, known, session) for one in boundaries]
    batches, memory = fit.batches(own), session.memory(fit.tokens.length)
    place_fits(place, session, memory, [one.boundary for one in boundaries], told)
    dense = Lane(DENSE, PruningPlan(fit.repair.plan.n_layers), until=last)
    options = PassOptions(last_layer=last, progress=told)
    StreamedPass(session.skeleton, batches, [dense, *lanes], memory.states_factory(batches), options).run()
    sums: dict[Span, Sums] = {one.span: one.sums.nodes for one in boundaries if one.sums is not None}
    return answer(sums, session, told.lines)


def _fitted(
    fit: SharedFit, span: Span, shares: Sequence[Sums], session: ModelSession, progress: Progress
) -> BoundaryOperator:
    """Put the sums of all shares together, and solve where one process would."""
    place = FitPlace()
    boundary = fit.boundary(span, session, place=place).boundary
    place_fits(place, session, session.memory(fit.tokens.length), [boundary], progress)
    together = sums_by(boundary.reducer())
    for nodes in shares:
        for node, state in nodes.items():
            together.put(node, state)
    return fitted_operator(boundary.kind, boundary.moments(together), "all")


def _length(own: Sequence[SequenceRange]) -> int:
    return sum(map(len, own))
