"""A recovery as far as its costs go: which way it takes, and the sizes that decide them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ghoststream.checkpoint.sizes import ModelSizes
from ghoststream.costs import (
    Cost,
    FitShape,
    SearchShape,
    SelectionShape,
    sequences_at_work,
    work_bytes_per_token,
)
from ghoststream.operators import OperatorKind, make_operator
from ghoststream.options import Method, Recovery, Text
from ghoststream.spans import Span
from ghoststream.stages.choosing.criteria import races
from ghoststream.stages.choosing.division import divided
from ghoststream.stages.choosing.room import FitBytes, LeftOut, largest_ranges
from ghoststream.stages.choosing.rounds import share_of_positions
from ghoststream.stages.choosing.ways import REFIT, Ways
from ghoststream.stages.estimation.crew import Crew
from ghoststream.stages.estimation.machine import Machine
from ghoststream.stages.estimation.room import room_of, too_large
from ghoststream.stages.estimation.stored import Stored
from ghoststream.stages.refusals import check_recovery
from ghoststream.stages.way import Way, what_goes
from ghoststream.statistics import Ranges, get_feature, taps_of
from ghoststream.statistics.features import STATE_TAP


@dataclass(frozen=True)
class Job(Way):
    """What is to be done, with which model.

    Attributes:
        sizes: The model.
        machine: Where it is done; of several, each.
        crew: Who runs the passes.
        whole: Of the share of a worker, the recovery, which decides how boundaries are fitted.
        out: Where the result goes, beside which states lie that fit no memory.
    """

    sizes: ModelSizes
    machine: Machine
    crew: Crew = field(default_factory=Crew)
    whole: Job | None = None
    out: Path = Path()

    @classmethod
    def make(cls, recovery: Recovery, sizes: ModelSizes, machine: Machine, cluster: int | None = None) -> Job:
        """Put a request, a model and a machine together.

        Args:
            recovery: The request.
            sizes: The model.
            machine: Where it is done.
            cluster: Workers of its cluster, which is not asked then.

        Raises:
            GhoststreamError: What :func:`~ghoststream.stages.refusals.check_recovery` raises, as `recover`
                would; and if the cluster does not answer.
        """
        job = cls(recovery, *what_goes(recovery, sizes.n_layers), sizes, machine)
        check_recovery(job, sizes, lambda: job.at_once)
        return replace(job, crew=Crew.of(job, cluster))

    @cached_property
    def text(self) -> Text:
        """The text to calibrate on."""
        return self.recovery.calibration.to_calibrate()

    @cached_property
    def measuring(self) -> Job | None:
        """The same with the text that the models are measured on; None if nobody knows how long that is."""
        asked = self.recovery.evaluate
        text = None if asked is None else asked.to_evaluate()
        if text is None or text.sequences is None:
            return None
        return replace(self, recovery=self.recovery.model_copy(update={"calibration": text}))

    @property
    def sequences(self) -> int:
        """Sequences S."""
        return self.text.sequences or 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the calibration text, padding included."""
        return self.sequences * self.text.length

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans that operators are fitted for: those of the plan, or one of as many layers."""
        return (Span(1, 1 + self.n_removed),) if self.given is None else self.given.plan.spans

    @property
    def first_removed(self) -> int:
        """The first layer that goes; where nobody knows yet which ones do, they are in the middle."""
        if self.given is not None:
            return self.given.plan.spans[0].start
        return (self.sizes.n_layers - self.n_removed) // 2

    @cached_property
    def kind(self) -> OperatorKind:
        """The operator; without a name that of what is tried whose fit takes most memory.

        Raises:
            RequestError: If options of the operator do not go together.
        """
        if self.whole is not None:
            return self.whole.kind
        if self.recovery.method.is_named:
            return make_operator(self.recovery.method)
        known = self.given.methods if self.given is not None and self.given.methods else self._fitted
        return max(map(make_operator, known), key=lambda kind: self.fit_cost(kind).memory.n_bytes)

    @property
    def tried(self) -> tuple[Method, ...]:
        """What is tried at a boundary, as far as the model allows it."""
        return self._possible(self.ways.first)

    @property
    def ways(self) -> Ways:
        """What ``auto`` tries."""
        return Ways.of(self.recovery.form, self.sizes.model_type)

    @property
    def races(self) -> bool:
        """Whether plans race."""
        return self.runs_model and races(self.recovery.search)

    @property
    def _fitted(self) -> tuple[Method, ...]:
        """What may be fitted in the end: a race compares fewer ways to repair."""
        return self._possible(self.ways.compared(races=self.races))

    def _possible(self, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        without = {one.features for one in self.left_out}
        if self.absorbs_nothing:
            without |= {one.features for one in methods if taps_of(one.features)}
        return tuple(one for one in methods if one.features not in without)

    @cached_property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What ``auto`` leaves out, as its fit cannot be held; the largest first."""
        if self.whole is not None:
            return self.whole.left_out
        return too_large(self) if self.measures and not self.recovery.method.is_named else ()

    @cached_property
    def fit_ranges(self) -> Ranges:
        """How the sequences that serve to fit are divided, at its largest."""
        if self.whole is not None:
            return self.whole.fit_ranges
        n_fit, search, compute = self.sequences, self.recovery.search, self.recovery.compute
        if self.measures:
            _, n_fit = divided(n_fit, search.held_out, compute.micro_batch, lambda: self.at_once)
        return largest_ranges(self.sequences, n_fit, folds=search.folds)

    def fit_bytes(self, kind: OperatorKind) -> FitBytes:
        """Return the memory that fitting one boundary in a pass takes."""
        return FitBytes.of(
            kind,
            self.fit_ranges,
            hidden=self.sizes.hidden,
            length=self.text.length,
            tap_width=self.input_width(kind) if taps_of(kind.features) else 0,
            room=room_of(self),
            processors=self.machine.processors,
        )

    @property
    def _tries_taps(self) -> bool:
        if self.recovery.method.is_named:
            return not self.absorbs_nothing
        return any(taps_of(one.features) for one in self._fitted)

    @property
    def absorbs_nothing(self) -> bool:
        """Whether no operator can be absorbed into most layers: some mixtures begin with dense layers."""
        refused = [bool(end.refusal) for end in self.sizes.mlp_ends]
        return 2 * sum(refused) > len(refused) or bool(self.sizes.refusal)

    def input_width(self, kind: OperatorKind) -> int:
        """Return the width of what the features of an operator are made of."""
        taps = taps_of(kind.features)
        return self.sizes.tap_width(taps) if taps else self.sizes.hidden

    def fit_cost(self, kind: OperatorKind, share: float = 1.0) -> Cost:
        """Return what fitting one boundary on a share of the text takes."""
        width = get_feature(kind.features).width(self.input_width(kind))
        tokens, folds = round(share * self.n_tokens), self.fit_ranges.n_folds
        return kind.cost(FitShape(self.sizes.hidden, width, tokens, folds))

    @cached_property
    def refit_cost(self) -> Cost | None:
        """What fitting one of the maps behind a gap anew takes; None where none is."""
        if not self.recovery.method.refit:
            return None
        width = self.sizes.tap_width(taps_of(REFIT.features))
        folds = self.fit_ranges.n_folds
        return make_operator(REFIT).cost(FitShape(self.sizes.hidden, width, self.n_tokens, folds))

    @property
    def reads_taps(self) -> bool:
        """Whether the operator reads taps of the layer before a boundary."""
        return bool(taps_of(self.kind.features))

    @property
    def tap_width(self) -> int:
        """Width of the taps that the operator reads beside the hidden state."""
        return self.sizes.tap_width([tap for tap in taps_of(self.kind.features) if tap != STATE_TAP])

    @property
    def exported_bytes(self) -> int:
        """Bytes of an operator in a checkpoint; of one on taps only the part on the hidden state stands."""
        taps = taps_of(self.kind.features)
        if not taps:
            return self.fit_cost(self.kind).write_bytes
        return 4 * self.sizes.hidden**2 if STATE_TAP in taps else 0

    @property
    def export_bytes(self) -> int:
        """Bytes of what is written."""
        if self.recovery.form == "adapter":
            return len(self.spans) * self.fit_cost(self.kind).write_bytes
        kept = self.sizes.checkpoint_bytes - self.n_removed * self.sizes.stored_layer_bytes
        return kept + len(self.spans) * self.exported_bytes

    @cached_property
    def stored(self) -> Stored:
        """What a capture keeps, if there is one."""
        return Stored(self)

    @property
    def work_bytes(self) -> int:
        """Bytes that a layer at work holds for one sequence."""
        sizes, length = self.sizes, self.text.length
        return length * work_bytes_per_token(
            widest=sizes.widest,
            hidden=sizes.hidden,
            itemsize=sizes.itemsize,
            heads=sizes.heads,
            length=length,
            scan=sizes.scan_bytes,
        )

    @cached_property
    def at_once(self) -> int:
        """Sequences that memory allows to be computed at once."""
        compute = self.recovery.compute
        free, given = self.machine.host_memory, compute.host_memory
        if self.machine.device_memory is not None:
            free, given = self.machine.device_memory, compute.device_memory
        limit = free * 9 // 10 if given is None else given
        limit -= 0 if self.machine.has_device else self.sizes.packed_bytes
        states = None if self.machine.device_memory is None else self.text.length * self.token_bytes
        return sequences_at_work(self.sizes.unit_bytes, self.work_bytes, self.text.length, limit, states)

    @property
    def token_bytes(self) -> int:
        """Bytes of the state of a token at compute type, ``C b``."""
        return self.sizes.hidden * self.sizes.itemsize

    @property
    def micro_batch(self) -> int:
        """Sequences that are computed at once."""
        return min(self.recovery.compute.micro_batch or self.at_once, self.sequences)

    @property
    def selection_shape(self) -> SelectionShape:
        """Sizes that a criterion of a store depends on."""
        sizes = self.sizes
        return SelectionShape(
            n_layers=sizes.n_layers,
            remove=self.n_removed,
            hidden=sizes.hidden,
            sequences=self.sequences,
            length=self.text.length,
            store_bytes=self.stored.n_bytes,
            layer_bytes=sizes.stored_layer_bytes,
            layer_elements=sizes.layer_elements,
        )

    @property
    def search_shape(self) -> SearchShape:
        """Sizes that a criterion which runs the model depends on."""
        return SearchShape(
            n_layers=self.sizes.n_layers,
            remove=self.n_removed,
            hidden=self.sizes.hidden,
            intermediate=self.sizes.intermediate if self._tries_taps else 0,
            sequences=self.sequences,
            length=self.text.length,
            search=self.recovery.search,
            tried=() if self.recovery.method.is_named else self.tried,
            tried_later=() if self.recovery.method.is_named else self._possible(self.ways.later),
            positions=share_of_positions(
                self.sizes.n_layers * self.sizes.layer_elements, self.sizes.vocabulary * self.sizes.hidden
            ),
        )
