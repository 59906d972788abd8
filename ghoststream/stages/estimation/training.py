"""What training the operators takes: a pass of the dense model, then steps over the layers behind the gap.

Letters are those of :mod:`ghoststream.costs`; ``P`` are the parameters that are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ghoststream.costs import Cost, Need, PassCost
from ghoststream.operators import OperatorKind, make_operator
from ghoststream.options import Method, Training
from ghoststream.stages.choosing.criteria import MEASURED
from ghoststream.stages.distillation.schedule import LENGTHS, SAVE_SECONDS, Schedule
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.pass_needs import Fits, PassNeeds, logit_bytes, pass_needs
from ghoststream.stages.estimation.work import Work, fits_work, forward_work, pass_work, unpacked_of

_BYTES_TRAINED = 20
"""Of a parameter in memory: itself, the best one, its gradient, two moments."""

_BYTES_KEPT = 16
"""Of a parameter on disk: the same without its gradient."""

_WAY_BACK = 3
"""What autograd holds of a layer at work, in forwards beside the one that the pass counts."""

_PRODUCTS = 3.0
"""Arithmetic of a step, in passes forward: there, there again, and back through frozen weights."""


@dataclass(frozen=True)
class TrainingCost:
    """What a training of operators takes.

    Attributes:
        job: The recovery.
        training: What was asked for.
        fit: What fitting one boundary takes, whose result is trained.
        fits_of: Says what memory a pass takes for fits by some operator.
    """

    job: Job
    training: Training
    fit: Cost
    fits_of: Callable[[OperatorKind], Fits]

    @property
    def schedule(self) -> Schedule:
        """How the text is parted, and how many steps there are."""
        return Schedule.of(self.training, self.job.sequences)

    @property
    def kept(self) -> int:
        """Layers that a step runs: those behind the first span, and the one before it where it is read."""
        job = self.job
        start = job.first_removed - job.reads_taps
        return job.sizes.n_layers - start - job.n_removed

    @property
    def parameters(self) -> int:
        """Parameters P: of as many operators as there may be, and of two norms a layer and the final one."""
        norms = (2 * self.kept + 1) * self.job.sizes.hidden * (self.training.train == "operators+norms")
        return self._n_spans * self.fit.write_bytes // 4 + norms

    @property
    def _n_spans(self) -> int:
        job, search = self.job, self.job.recovery.search
        measures = job.runs_model and (search.criterion or MEASURED) == MEASURED
        return min(search.max_spans, job.n_removed) if measures else len(job.spans)

    @property
    def disk(self) -> Need:
        """What is kept until the operators are written: the dense model's knowledge, and the training."""
        known = f"S T (C b + {8 * self._top})"
        return Need(self._known_bytes + _BYTES_KEPT * self.parameters, f"{known} + {_BYTES_KEPT} P")

    @property
    def _top(self) -> int:
        return min(self.training.top, self.job.sizes.vocabulary)

    @property
    def _known_bytes(self) -> int:
        """What is kept of the dense model."""
        return self.job.n_tokens * (self.job.token_bytes + 8 * self._top)

    def needs(self, out: Path) -> dict[str, Need]:
        """Return what it needs beside the memory of its passes.

        Args:
            out: Where the export goes; what is kept lies beside it.
        """
        return {"disk, distill": replace(self.disk, available=self.job.machine.free_disk(out))}

    def place(self) -> PassNeeds:
        """Return what its passes take: those of the dense model and of a step, whichever takes more."""
        job, hidden = self.job, self.job.sizes.hidden
        micro_batch = self.job.recovery.compute.micro_batch or max(1, job.at_once // 4)
        micro_batch = min(micro_batch, self.training.batch) if self.schedule.steps else micro_batch
        step = _at(job, self.training.batch, micro_batch)
        way_back = _WAY_BACK * micro_batch * job.work_bytes + _BYTES_TRAINED * self.parameters
        # The inputs of all layers, the states on their way, and their gradient.
        found = (
            pass_needs(_at(job, job.sequences, micro_batch), "distill", hidden, logits=logit_bytes(job)),
            pass_needs(step, "distill", hidden * (self.kept + 2), way_back=way_back),
        )
        return max((*found, *self._boosting(micro_batch)), key=_total)

    def _boosting(self, micro_batch: int) -> tuple[PassNeeds, ...]:
        """Return what a round of boosting takes: it keeps what maps read and the gradients behind them."""
        job, n_spans = self.job, self._n_spans
        if not self.schedule.boost:
            return ()
        hidden, read = job.sizes.hidden, job.input_width(job.kind)
        states = hidden * (self.kept + 2) + n_spans * (read + hidden)
        # Of each parameter itself, the best one and its gradient.
        way_back = _WAY_BACK * micro_batch * job.work_bytes + 3 * n_spans * self.fit.write_bytes
        windows = _at(job, self.schedule.n_train, micro_batch)
        recovery = windows.recovery.model_copy(update={"method": self._boosted.method})
        windows, fits = replace(windows, recovery=recovery), self.fits_of(self._boosted)
        return (pass_needs(windows, "distill", states, way_back=way_back, fits=fits),)

    @property
    def _boosted(self) -> OperatorKind:
        """What a round fits at each boundary."""
        is_matrix = self.fit.write_bytes > 4 * self.job.sizes.hidden
        name = "least-squares" if is_matrix else "diagonal"
        return make_operator(Method(operator=name, features=self.job.kind.features))

    def work(self, seconds: float) -> Work:
        """Return its work; layers that fit the memory of the host are read from disk once.

        Args:
            seconds: How long it takes, about.
        """
        job, schedule = self.job, self.schedule
        share, held = schedule.batch / job.sequences, schedule.held_out / job.sequences
        fitted = schedule.n_train / job.sequences
        layers = self.kept / job.sizes.n_layers
        seen = schedule.steps * share + schedule.boost * fitted
        rounds, spans = schedule.boost, self._n_spans
        looks = schedule.n_checks + 2 + rounds * (spans * (1 + len(LENGTHS)) - 1)
        lanes = (_PRODUCTS * seen + held * looks) * layers
        reads = 2 * schedule.steps + rounds * (2 * spans + 1) + schedule.n_checks + 2
        n_bytes = sum(layer.stored_bytes for layer in job.sizes.layers[-self.kept :])
        is_cached = n_bytes <= job.machine.host_memory // 2
        widened = job.sizes.layer_bytes / max(1, job.sizes.stored_layer_bytes)
        unpacked = reads * unpacked_of(job, job.sizes.layers[-self.kept :])
        passes = Work(
            read=n_bytes * (1 if is_cached else reads),
            weights=n_bytes * reads * widened,
            unpacked=unpacked,
        )
        dense = pass_work(job, PassCost(job.sizes.hidden, 1.0, scored=1.0 + 2.0 * held))
        kept = Work(written=self._known_bytes, saved=self._saves(seconds) * _BYTES_KEPT * self.parameters)
        fits = fits_work(job, self._boosted, schedule.boost * self._n_spans, fitted)
        return dense + passes + forward_work(job, lanes, None) + fits + kept

    def _saves(self, seconds: float) -> int:
        """Return how often it is saved: at every look at held-out windows, and between two by the clock."""
        schedule = self.schedule
        between = max(1, schedule.n_checks - 1)
        in_time = int(seconds / between / SAVE_SECONDS)
        return schedule.n_checks + between * min(in_time, schedule.check - 1)


def _total(needs: PassNeeds) -> int:
    return sum(need.n_bytes for need in needs.needs.values())


def _at(job: Job, sequences: int, micro_batch: int) -> Job:
    """Return a recovery as passes over so many sequences see it."""
    recovery = job.recovery
    text = job.text.model_copy(update={"sequences": sequences})
    compute = recovery.compute.model_copy(update={"micro_batch": micro_batch})
    return replace(job, recovery=recovery.model_copy(update={"calibration": text, "compute": compute}))
