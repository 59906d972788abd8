"""The work of a stage that workers share: what the machine with most of it does, and what all of them do.

Workers of a machine share its disk, its bus, its processors and their writer. Each reads all weights. They go
through the layers side by side, so that the page cache gives to all what the disk gave to the first; a
checkpoint that does not fit the memory is read past the page cache, by each for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ghoststream.costs import PassCost
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.needs import Route
from ghoststream.stages.estimation.pass_needs import PassNeeds
from ghoststream.stages.estimation.shares import Share, on_worker
from ghoststream.stages.estimation.work import Work, pass_work, reading


@dataclass(frozen=True)
class StageWork:
    """Work of a stage.

    Attributes:
        timed: What one machine does: the one that has most, with what this process does before and behind.
        whole: What all machines do.
    """

    timed: Work
    whole: Work

    @classmethod
    def alone(cls, work: Work) -> StageWork:
        """Say that one process does it."""
        return cls(work, work)

    def __add__(self, other: StageWork) -> StageWork:
        return StageWork(self.timed + other.timed, self.whole + other.whole)


def passes_over(job: Job, passes: Iterable[PassCost], place: PassNeeds) -> StageWork:
    """Return the work of passes that choose layers or fit operators; candidates are shared."""
    found = StageWork.alone(Work())
    for one in passes:
        if not (job.crew.is_shared and one.groups):
            found += StageWork.alone(pass_work(job, one))
            continue
        active = min(job.crew.count, one.groups)
        alone = PassCost(0.0, 0.0) if one.alone is None else one.alone
        repeated = pass_work(job, replace(alone, last=one.last)) * (active - 1)
        own = pass_work(on_worker(job), one.of_worker(job.crew.count))
        found += _together(job, own, active, pass_work(job, one) + repeated, place)
        found += StageWork.alone(Work(rounds=1))
    return found


def rows_of(
    job: Job, step: int, work: Callable[[Job], Work], last: int | None, place: PassNeeds
) -> StageWork:
    """Return the work of one pass whose sequences are shared.

    Args:
        job: The recovery.
        step: Of how many sequences shares are.
        work: Says the work of the pass.
        last: The pass ends with ``h[last]``; None for the whole model.
        place: Memory of the pass.
    """
    if not job.crew.is_shared:
        return StageWork.alone(work(job))
    share = Share.of_rows(job, step)
    whole = work(job) + reading(job, last) * (share.active - 1)
    found = _together(job, work(share.job), share.active, whole, place)
    return found + started(job) + StageWork.alone(Work(rounds=1))


def summed(route: Route, place: PassNeeds) -> StageWork:
    """Return the work of a fit whose sequences are shared: this process solves."""
    job, fit = route.job, route.shared_fit
    found = StageWork.alone(Work())
    for one in route.rounds:
        whole = pass_work(job, one)
        repeated = reading(job, one.last) * (fit.share.active - 1)
        own = replace(pass_work(fit.share.job, one), solved=0.0)
        found += _together(job, own, fit.share.active, replace(whole, solved=0.0) + repeated, place)
        here = Work(solved=whole.solved, rounds=1, sent=one.fits * fit.sent_bytes)
        found += StageWork.alone(here)
    return found


def started(job: Job) -> StageWork:
    """Return the start of the processes of several devices; workers of a cluster are there."""
    return StageWork.alone(Work(crews=float(job.crew.is_shared and not job.crew.is_cluster)))


def compared(job: Job, passes: Iterable[PassCost], last: int | None = None) -> StageWork:
    """Return what this process reads to compare weights with those of the workers: what it has not run."""
    if not job.crew.is_shared:
        return StageWork.alone(Work())
    own = (job.sizes.pass_bytes(one.last) for one in passes if not one.groups)
    return StageWork.alone(Work(read=max(0, job.sizes.pass_bytes(last) - max(own, default=0))))


def _together(job: Job, one: Work, active: int, whole: Work, place: PassNeeds) -> StageWork:
    machine, among = job.machine, job.crew.on_a_host(active)
    is_cached = job.sizes.checkpoint_bytes <= machine.host_memory
    on_host = among / machine.side_by_side(among)
    layers = 1.0 if machine.has_device else on_host
    # The tasks of all workers of a machine keep more of its processors at work than those of one.
    tasks = machine.at_work(place.tasks) / machine.at_work(among * place.tasks)
    fits = place.fits_on_device
    timed = replace(
        one,
        read=one.read * (1 if is_cached else among),
        written=one.written * among,
        stored=one.stored * among,
        weights=one.weights * among,
        crossed=one.crossed * among,
        flops=one.flops * layers,
        attended=one.attended * layers,
        moved=one.moved * layers,
        summed=one.summed * (1.0 if fits else on_host * tasks),
        solved=one.solved * (1.0 if fits and job.kind.solves_on_device else on_host),
    )
    return StageWork(timed, whole)
