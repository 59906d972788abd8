"""What one worker takes of a recovery that several share, as the run deals it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ghoststream.costs import Need, PassCost
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.stages.choosing.division import dealt_ranges, touched
from ghoststream.stages.choosing.passes import last_fit, shared_fit
from ghoststream.stages.choosing.room import FitBytes
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.pass_needs import PassNeeds
from ghoststream.stages.sharing import dealt_rows
from ghoststream.statistics import Ranges
from ghoststream.statistics.fold_sums import FoldSums
from ghoststream.statistics.ranges import SequenceRange


@dataclass(frozen=True)
class Share:
    """A stage as the worker does it that has most.

    Attributes:
        job: The recovery as that worker sees it: its sequences, and its part of the memory.
        active: Workers that have something to do.
    """

    job: Job
    active: int = 1

    @classmethod
    def of_rows(cls, job: Job, step: int) -> Share:
        """Deal out sequences in runs of whole ``step``."""
        if not job.crew.is_shared:
            return cls(job)
        rows = dealt_rows(job.crew.count, job.sequences, step)
        return cls(of_sequences(on_worker(job), max(stop - start for start, stop in rows)), len(rows))

    def needs(self, place: PassNeeds, crew_of: Job) -> PassNeeds:
        """Return what all workers of one machine take, and where the states of all workers lie.

        Args:
            place: What the pass of this worker takes.
            crew_of: The whole recovery.
        """
        crew = crew_of.crew
        if not crew.is_shared:
            return place
        among = crew.on_a_host(self.active)
        needs = {name: _together(name, need, among, crew_of) for name, need in place.needs.items()}
        states = {where: self.active * n_bytes for where, n_bytes in place.states.items()}
        peak = place.peak if crew_of.machine.has_device else among * place.peak
        return replace(place, needs=needs, states=states, peak=peak)


def on_worker(job: Job) -> Job:
    """Return a recovery as a worker does it: those of one machine share its memory evenly."""
    crew, compute = job.crew, job.recovery.compute
    given: dict[str, int] = {"micro_batch": job.micro_batch}
    among = crew.on_a_host(crew.count)
    if among > 1:
        given["host_memory"] = (compute.host_memory or job.machine.host_memory * 9 // 10) // among
    recovery = job.recovery.model_copy(update={"compute": compute.model_copy(update=given)})
    return replace(job, recovery=recovery, whole=job.whole or job)


def of_sequences(job: Job, sequences: int) -> Job:
    """Return a recovery with so many sequences."""
    text = job.text.model_copy(update={"sequences": sequences})
    return replace(job, recovery=job.recovery.model_copy(update={"calibration": text}))


@dataclass(frozen=True)
class SharedFit:
    """A fit whose sequences workers share; this process merges their sums, and solves.

    Attributes:
        job: The recovery.
    """

    job: Job

    @cached_property
    def ranges(self) -> Ranges:
        """How the sequences are divided: all of them serve to fit."""
        return Ranges.make(self.job.sequences, folds=self.job.recovery.search.folds)

    @cached_property
    def share(self) -> Share:
        """The share of the worker that has most."""
        job, size = self.job, self.job.micro_batch
        n_sequences = max(touched(own, job.sequences, size) for own in self._dealt)
        return Share(of_sequences(on_worker(job), n_sequences), len(self._dealt))

    @property
    def rounds(self) -> tuple[PassCost, ...]:
        """The passes of all workers; one, as of a single span, where nobody knows yet which layers go."""
        job = self.job
        given = None if job.given is None else job.given.plan.spans
        if given is None:
            return (last_fit(job.search_shape, job.tap_width),)
        return shared_fit(job.search_shape, job.tap_width, given, self._dense(given))

    @property
    def sent_bytes(self) -> int:
        """Bytes of the sums that all workers send for one boundary."""
        return self._nodes * self._bytes.state

    def merging(self, workers: int, *, solves_here: bool) -> Need:
        """Return the memory of this process in the round that has most boundaries.

        Args:
            workers: Bytes of the workers of its machine, which have gone back when it solves.
            solves_here: Whether boundaries are solved on the host.
        """
        sent = max(one.fits for one in self.rounds) * self.sent_bytes
        solving = self.job.fit_cost(self.job.kind, 0.0).memory
        formula = f"{self._nodes} sums of {self._bytes.state:,} a boundary from {self.share.active} workers"
        beside = max(workers, solving.n_bytes * solves_here)
        if solves_here and beside == solving.n_bytes:
            formula += f" + {solving.formula} to fit"
        elif beside:
            formula += " + the workers"
        return Need(sent + beside, formula, self.job.machine.host_memory)

    @cached_property
    def _dealt(self) -> Sequence[tuple[SequenceRange, ...]]:
        rows = dealt_rows(self.job.crew.count, self.job.sequences, self.job.micro_batch)
        return dealt_ranges(self.ranges, rows)

    @cached_property
    def _nodes(self) -> int:
        count = 0
        for own in self._dealt:
            sums: FoldSums[None] = FoldSums(lambda left, right: left)
            for one in own:
                sums.add(one, None)
            count += len(sums.nodes)
        return count

    @property
    def _bytes(self) -> FitBytes:
        return self.job.fit_bytes(self.job.kind)

    def _dense(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        """Return the spans behind the first whose operators read dense states."""
        given = self.job.given
        known: Sequence[Method] = () if given is None else given.methods
        methods = known or (self.job.recovery.method,) * len(spans)
        return tuple(span for span, one in zip(spans[1:], methods[1:], strict=True) if one.inputs == "dense")


def _together(name: str, need: Need, among: int, job: Job) -> Need:
    """Return what the workers of a machine need together; a device is one worker's."""
    if name == "device memory":
        return replace(need, formula=f"{need.formula}, on each device")
    if among == 1:
        return need
    available = need.available
    if name.startswith("memory"):
        limit = job.machine.host_memory * 9 // 10
        available = min(job.recovery.compute.host_memory or limit, job.machine.host_memory)
    return Need(among * need.n_bytes, f"{among} x ({need.formula})", available)
