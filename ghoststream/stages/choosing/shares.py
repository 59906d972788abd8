"""Candidates that several workers measure: each takes some of them, in a pass of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ghoststream.evaluation import LossSummary
from ghoststream.options import Compute
from ghoststream.progress import KeptLines, Progress
from ghoststream.stages.choosing.measured import Candidate, measure_repairs
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.session import ModelSession
from ghoststream.stages.shared_session import Answer, accepted, answer, open_shared
from ghoststream.stages.workers import Workers
from ghoststream.statistics import Ranges
from ghoststream.streaming import Runs
from ghoststream.text import TokenSet


class Found(NamedTuple):
    """Losses of the dense model, the candidates in the order of their repairs, and what was run for them."""

    dense: LossSummary
    candidates: tuple[Candidate, ...]
    runs: Runs


@dataclass(frozen=True)
class Measuring:
    """What is measured on, the same for all candidates; see :func:`measure_repairs`."""

    tokens: TokenSet
    ranges: Ranges | None
    micro_batch: int
    positions: float = 1.0
    residuals: bool = False

    def of(self, session: ModelSession, repairs: Sequence[Repair], progress: Progress) -> Found:
        """Repair plans and measure them in one pass, here."""
        before = session.skeleton.runs
        dense, candidates = measure_repairs(
            session,
            self.tokens,
            repairs,
            ranges=self.ranges,
            micro_batch=self.micro_batch,
            progress=progress,
            positions=self.positions,
            residuals=self.residuals,
        )
        return Found(dense, candidates, session.skeleton.runs - before)


def measure_shares(
    crew: Workers,
    session: ModelSession,
    measuring: Measuring,
    repairs: Sequence[Repair],
    progress: Progress,
) -> Found:
    """Have workers measure repairs; the figures are those of one pass, however many workers there are.

    A lane does not depend on the other lanes of its pass. Each worker runs the dense model for itself, and
    fits what its own candidates have. Those that begin alike stay together, and share that part of the way.

    Args:
        crew: The workers. They see the model.
        session: The model, which runs no pass here.
        measuring: What is measured on.
        repairs: What to try.
        progress: Who is told how far it is.

    Raises:
        MismatchError: If a worker finds another model.
        CheckpointError: If workers read different weights.
        GhoststreamError: What :meth:`~ghoststream.stages.workers.Workers.run` and :func:`measure_repairs`
            raise.
    """
    dealt = _dealt(repairs, crew.count)
    request = (session.name, str(session.fingerprint["digest"]), measuring)
    shares = [(*request, [repairs[place] for place in places]) for places in dealt]
    answers = crew.run(
        measure_share, session.compute, shares, list(map(len, dealt)), progress, unit="candidates"
    )
    measured = accepted(answers, session, "a worker measured candidates", progress)
    own: dict[int, Candidate] = {}
    runs = Runs()
    for places, found in zip(dealt, measured, strict=True):
        own |= zip(places, found.candidates, strict=True)
        runs += found.runs
    return Found(measured[0].dense, tuple(own[place] for place in range(len(repairs))), runs)


def measure_share(
    compute: Compute, model: str, digest: str, measuring: Measuring, repairs: Sequence[Repair]
) -> Answer[Found]:
    """Measure some repairs, on a worker.

    Raises:
        MismatchError: If the model is another one.
        GhoststreamError: What opening the model, and the pass raise.
    """
    session, told = open_shared(compute, model, digest), KeptLines()
    return answer(measuring.of(session, repairs, told), session, told.lines)


def _dealt(repairs: Sequence[Repair], count: int) -> list[list[int]]:
    """Deal repairs out to workers in turn, by their places; those that begin with one span go together."""
    groups: dict[object, list[int]] = {}
    for place, repair in enumerate(repairs):
        groups.setdefault((repair.plan.spans[0], repair.methods[0].model_dump_json()), []).append(place)
    hands: list[list[int]] = [[] for _ in range(count)]
    for group in groups.values():
        min(hands, key=len).extend(group)
    return [hand for hand in hands if hand]
