"""The sums of an estimate: what memory and disk a recovery takes, and where its hidden states lie.

Letters are those of :mod:`ghoststream.costs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ghoststream.costs import Cost, Need, PassCost
from ghoststream.operators import OperatorKind, make_operator
from ghoststream.selection import make_criterion
from ghoststream.stages.choosing.criteria import MEASURED, make_search_criterion
from ghoststream.stages.choosing.passes import last_fit, refining
from ghoststream.stages.choosing.ways import REFIT
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.pass_needs import Fits, PassNeeds, logit_bytes, pass_needs
from ghoststream.stages.estimation.report import SweepCost
from ghoststream.stages.estimation.shares import Share, SharedFit, on_worker
from ghoststream.stages.estimation.training import TrainingCost

_EXPORT_BYTES = 176 * 2**20
"""Copies on their way (144 MiB past the page cache), the model without its weights, and its tokenizer."""


@dataclass(frozen=True)
class Route:
    """What the stages of a recovery say that they take.

    Attributes:
        job: The recovery.
        fit: Fitting one boundary.
        selection: Choosing layers from a store, if they are.
        searching: Passes in which layers are chosen.
        fitting: Passes in which operators are fitted; where these are shared, in which ways are compared.
        rounds: Passes of a fit whose sequences are shared.
        sweeps: Sweeps over the store.
    """

    job: Job
    fit: Cost
    selection: Cost | None
    searching: tuple[PassCost, ...]
    fitting: tuple[PassCost, ...]
    rounds: tuple[PassCost, ...] = ()
    sweeps: tuple[SweepCost, ...] = ()

    @classmethod
    def of(cls, job: Job) -> Route:
        """Ask operator and criterion what they take."""
        search, shape = job.recovery.search, job.search_shape
        searching: tuple[PassCost, ...] = ()
        fitting: tuple[PassCost, ...] = ()
        rounds: tuple[PassCost, ...] = ()
        selection = None
        if job.runs_model:
            searching = make_search_criterion(search.criterion or MEASURED).cost(shape)
        elif job.reads_store:
            selection = make_criterion(str(search.criterion)).cost(job.selection_shape)
        if job.fits_in_passes:
            known = job.given is not None and bool(job.given.methods)
            chosen = () if job.runs_model or known else refining(shape, n_spans=len(job.spans), plans=1)
            if job.crew.is_shared:
                fitting, rounds = chosen, SharedFit(job).rounds
            else:
                spans = None if job.given is None else job.given.plan.spans
                fitting = (*chosen, last_fit(shape, job.tap_width, job.recovery.method.refit, spans))
        return cls(job, job.fit_cost(job.kind), selection, searching, fitting, rounds)

    @property
    def training(self) -> TrainingCost | None:
        """What training the operators takes; None where they are only fitted."""
        asked = self.job.recovery.distill
        return None if asked is None else TrainingCost(self.job, asked, self.fit, self._fits_by)

    def passes(self) -> dict[str, PassNeeds]:
        """Return what the passes of each stage take: the one of them that has most states to keep."""
        job, found = self.job, {}
        if job.captures:
            share = Share.of_rows(job, job.stored.share_step)
            buffers = share.job.stored.writer_bytes
            place = pass_needs(share.job, "capture", job.sizes.hidden, buffers=buffers)
            found["capture"] = share.needs(place, job)
        if self.searching:
            found["search"] = self.largest("search", self.searching)
        if job.fits_in_passes:
            found["fit"] = self.largest("fit", self.fitting)
        if self.training is not None:
            found["distill"] = self.training.place()
        if job.measuring is not None:
            share = Share.of_rows(job.measuring, job.measuring.micro_batch)
            place = pass_needs(share.job, "evaluate", 2 * job.sizes.hidden, logits=logit_bytes(job))
            found["evaluate"] = share.needs(place, job)
        return found

    def largest(self, name: str, passes: Sequence[PassCost]) -> PassNeeds:
        """Return what passes take: those that one process runs, or those of a worker, if that is more."""
        job, places = self.job, []
        shared = tuple(one for one in passes if one.groups) if job.crew.is_shared else ()
        alone = tuple(one for one in passes if one not in shared)
        if alone:
            states, fits = max(one.states for one in alone), any(one.fits for one in alone)
            places.append(pass_needs(job, name, states, fits=self.fits if fits else None))
        count = job.crew.count
        if shared:
            share = Share(on_worker(job), min(count, max(one.groups for one in shared)))
            states = max(one.of_worker(count).states for one in shared)
            place = pass_needs(share.job, name, states, fits=self._fits(share.job))
            places.append(share.needs(place, job))
        if name == "fit" and self.rounds:
            share, states = self.shared_fit.share, max(one.states for one in self.rounds)
            place = pass_needs(share.job, name, states, fits=self._fits(on_worker(job)))
            places.append(share.needs(place, job))
        return max(places, key=lambda one: sum(need.n_bytes for need in one.needs.values()))

    @property
    def shared_fit(self) -> SharedFit:
        """The fit, as workers share it."""
        return SharedFit(self.job)

    @property
    def fits(self) -> Fits:
        """Memory of fitting one boundary, or one of the maps behind it."""
        return self._fits(self.job)

    def _fits(self, job: Job) -> Fits:
        refit = () if job.refit_cost is None else (make_operator(REFIT),)
        return self._fits_by(job.kind, *refit, job=job)

    def _fits_by(self, *kinds: OperatorKind, job: Job | None = None) -> Fits:
        """Return the memory of the largest of some fits."""
        sizes = [(job or self.job).fit_bytes(kind) for kind in kinds]
        on_host = max(sizes, key=lambda one: one.host)
        on_device = max(sizes, key=lambda one: one.device)
        return Fits(
            Need(on_device.device, on_device.device_formula),
            Need(on_host.host, on_host.formula),
            Need(max(one.beside for one in sizes), "the sums of the folds"),
            on_host.tasks,
        )


def all_needs(route: Route, *, store: Path | None, out: Path) -> dict[str, Need]:
    """Return what memory and disk a recovery takes, against what is free.

    Args:
        route: Its stages, with their sweeps.
        store: Local place of the store; ``None`` if it is remote.
        out: Where the export goes.
    """
    job, machine = route.job, route.job.machine
    host, disk = machine.host_memory, machine.free_disk(out)
    needs: dict[str, Need] = {}
    places = route.passes()
    for one in places.values():
        needs |= {name: need for name, need in one.needs.items() if _is_more(need, needs.get(name))}
    if route.rounds:
        solves_here = not (places["fit"].fits_on_device and job.kind.solves_on_device)
        workers = 0 if job.crew.is_cluster else needs["memory, fit"].n_bytes
        needs["memory, merge"] = route.shared_fit.merging(workers, solves_here=solves_here)
    if route.selection is not None:
        needs["memory, select"] = _against(route.selection.memory, host)
        if route.selection.disk is not None:
            needs["disk, select"] = _against(route.selection.disk, disk)
    if not job.fits_in_passes:
        needs["memory, solve"] = _against(_solving(route), host)
        if job.reads_taps:
            n_bytes = job.n_tokens * job.input_width(job.kind) * job.sizes.itemsize
            needs["disk, taps"] = Need(n_bytes, "S T p b a boundary, while solving", disk)
    if job.captures:
        copied = f" + {job.stored.n_copies} S T C b to go on from" * bool(job.stored.n_copies)
        needs["disk, store"] = Need(
            job.stored.n_bytes + job.stored.n_copies * job.stored.computed_bytes,
            f"{job.stored.n_positions} S T C b{copied}",
            machine.free_disk(store),
        )
    if route.training is not None:
        needs |= route.training.needs(out)
    parts = len(job.spans) * route.fit.write_bytes
    needs["memory, export"] = Need(_EXPORT_BYTES + parts, "176 MiB and the operators", host)
    needs["disk, export"] = Need(job.export_bytes, "checkpoint - N layers + operator", disk)
    return needs


def _is_more(need: Need, known: Need | None) -> bool:
    return known is None or need.n_bytes > known.n_bytes


def _solving(route: Route) -> Need:
    """Return the larger of what a fit takes and what a task of one worker takes, as the engine counts it."""
    task = max((cost.task_bytes for cost in route.sweeps if cost.stage == "solve"), default=0)
    fitting = route.fit.memory
    formula = f"max({fitting.formula} to fit, {task:,} to reduce with one worker)"
    return Need(max(fitting.n_bytes, task), formula)


def _against(need: Need, free: int | None) -> Need:
    return Need(need.n_bytes, need.formula, free)
