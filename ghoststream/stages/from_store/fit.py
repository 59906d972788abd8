"""Fitting the operators of a plan from the hidden states in a store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scipy

from ghoststream.checkpoint.contents import TensorDigests, other_model
from ghoststream.errors import MismatchError
from ghoststream.files import read_kept
from ghoststream.operators import (
    BoundaryOperator,
    OperatorKind,
    OperatorSet,
    fit_per_layer,
)
from ghoststream.options import Method, Reduction
from ghoststream.progress import Progress
from ghoststream.recipe import StoreFitRecipe, library_versions
from ghoststream.selection import Selection, read_plan
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.tap_store import WantedTaps, require_fit_memory, store_taps, wanted_taps
from ghoststream.stages.from_store.evidence import Opener
from ghoststream.stages.from_store.kind import make_store_kind
from ghoststream.stages.output import NamedByRequest, Output
from ghoststream.statistics import (
    DEFAULT_BLOCK_TOKENS,
    FoldedMoments,
    HiddenStateSource,
    Ranges,
    TapSource,
    base_of,
    open_source,
    store_digest,
    taps_of,
    texts_in,
)
from ghoststream.statistics.devices import device_kind, require_device
from ghoststream.statistics.sweeps import single_layers, span_groups


def fit_from_store(
    store_uri: str,
    plan: PruningPlan | str | Path,
    *,
    model: Opener | None,
    method: Method,
    folds: int,
    reduction: Reduction,
    device: str | None,
    out: str | Path | NamedByRequest,
    progress: Progress,
) -> OperatorSet:
    """Fit one operator for each span of a plan from a store; see :func:`ghoststream.fit`.

    Partial statistics and fitted boundaries are kept in ``<out>.partial`` until the file is written: killed
    at any moment, the same request finishes with the identical file and repeats at most one range or one
    boundary.

    Raises:
        PlanError: If the plan does not fit the store's model.
        RequestError: If an option is out of range, a name unknown, the operator defined without an option, or
            the device not there.
        OutputExistsError: If ``out`` holds something else.
        BusyError: If another process is writing it.
        StoreError: If a hidden state that is needed is not in the store (``per_layer`` needs those inside the
            spans).
        NumericsError: If a hidden state or a solution is not finite.
        UnsupportedModelError: If an operator on features of the layer before could not be absorbed into the
            model.
        MismatchError: If the store is of another model than the one given.
        CheckpointError: If plan and store were made of different weights, or a tensor is not what it was.
        BudgetError, DiskFullError: If taps or partial statistics do not fit the disk, or the moments of one
            span or the fit of a wide feature not the memory.

    Memory: with p features (``p = C``, or ``2 C`` for ``hidden+normed``), while reducing, for each worker
    thread one state of ``8 p^2`` bytes a start (a span for weights other than uniform) and ``8 p C`` a span
    and 4 blocks of 2,048 tokens in float64 (8 for such weights, ``2 p / C`` more for such features); while
    solving, what the operator's ``cost`` states, and the operators, ``4 p C`` bytes each. ``O(C)`` where the
    operator needs no Gram. Disk: at most ``log2(ranges) + 2`` states for each fold. ``per_layer`` multiplies
    the state by the layers of a span, and adds two ``8 p C`` while solving. With features of the layer
    before, ``p = I`` for ``mlp`` and ``C + I`` for ``hidden+mlp``, spans are reduced one after the other, so
    that there is one state; disk: ``S T p`` elements of compute dtype a span.
    """
    kind = make_store_kind(method)
    store = open_source(store_uri)
    ranges = Ranges.make(store.n_sequences, folds=folds, turn=texts_in(store))
    selection = read_plan(plan, store.n_layers)
    _require_same_base(selection, store, store_uri)
    job = _Job(store_uri, store, selection.plan, kind, ranges, reduction, device, progress)
    output = Output(out, job.request, "fit")
    # What cannot be is refused before a folder is made for the output.
    taps = None if output.path.exists() else _checked_taps(job, model)
    with output.claimed(OperatorSet.load) as found:
        if found is not None:
            return found
        return job.run(output, taps or _checked_taps(job, model))


@dataclass(frozen=True)
class _Job:
    """One request, and the steps that fulfil it."""

    uri: str
    store: HiddenStateSource
    plan: PruningPlan
    kind: OperatorKind
    ranges: Ranges
    reduction: Reduction
    device: str | None
    progress: Progress
    moments: dict[Span, FoldedMoments] = field(default_factory=dict)

    @property
    def recipe(self) -> StoreFitRecipe:
        """What decides every bit of the operators, but the plan."""
        device = self.kind.sums_on(self.device)
        return StoreFitRecipe(
            method=self.kind.method,
            device=None if device is None else device_kind(device),
            range_sequences=self.ranges.range_sequences,
            folds=self.ranges.n_folds,
            block_tokens=DEFAULT_BLOCK_TOKENS,
            store_digest=store_digest(self.store),
        )

    @property
    def request(self) -> dict[str, Any]:
        """What decides every bit of the operators."""
        return {**self.recipe.to_json(), "plan": self.plan.to_json()}

    @property
    def spans(self) -> tuple[Span, ...]:
        """Spans whose moments are needed."""
        per_layer = self.kind.method.per_layer
        return (
            *self.plan.spans,
            *(one for span in self.plan.spans if per_layer for one in single_layers(span)),
        )

    def run(self, output: Output, taps: WantedTaps | None) -> OperatorSet:
        """Reduce, solve and write."""
        stored = None
        if taps is not None:
            stored = store_taps(taps, self.uri, output.work, progress=self.progress)
        for spans in span_groups(self.spans, reads_taps=stored is not None):
            self.moments.update(self._reduce(spans, stored, output.work))
        metadata = {
            "base": base_of(self.store),
            "recipe": self.request,
            "recipe_digest": output.digest,
            "versions": {**library_versions(), "scipy": scipy.__version__},
        }
        boundaries = self._solve(output, metadata)
        operators = OperatorSet(
            self.plan, str(self.kind.method.operator), boundaries, self.store.hidden, metadata
        )
        operators.save(output.path)
        return operators

    def _reduce(
        self, spans: tuple[Span, ...], taps: TapSource | None, work: Path
    ) -> dict[Span, FoldedMoments]:
        return self.kind.reduce(
            self.uri,
            spans,
            self.ranges,
            self.reduction,
            taps=taps,
            device=self.device,
            workdir=work,
            progress=self.progress,
        )

    def _solve(self, output: Output, metadata: dict[str, Any]) -> tuple[BoundaryOperator, ...]:
        self.progress.start("solve", len(self.plan.spans), "boundaries")
        solved = []
        for span in self.plan.spans:
            solved.append(self._fit(span, output, metadata))
            self.progress.advance(1)
        self.progress.finish()
        for operator in solved:
            for warning in operator.diagnostics.get("warnings", ()):
                self.progress.log(f"warning: {warning}")
        return tuple(solved)

    def _fit(self, span: Span, output: Output, metadata: dict[str, Any]) -> BoundaryOperator:
        path = output.work / f"boundary-{output.short_digest}-{span.start}-{span.stop}.safetensors"
        plan = PruningPlan(self.plan.n_layers, (span,))
        kept = read_kept(OperatorSet.load, path)
        if kept is not None and (kept.digest, kept.plan) == (output.digest, plan):
            return kept.boundaries[0]
        if self.kind.method.per_layer:
            layers = [self.moments[layer] for layer in single_layers(span)]
            operator = fit_per_layer(self.kind, self.moments[span], layers)
        else:
            operator = self.kind.fit(self.moments[span])
        name = str(self.kind.method.operator)
        OperatorSet(plan, name, (operator,), self.store.hidden, metadata).save(path)
        return operator


def _require_same_base(selection: Selection, store: HiddenStateSource, store_uri: str) -> None:
    digests, captured = TensorDigests(Path(store_uri)), base_of(store)["tensors"]
    chosen = selection.base.get("tensors") or {}
    digests.expect(chosen, "the plan was chosen")
    digests.expect(captured, f"{store_uri} was captured")
    # A capture may have read fewer layers than a search, but some of the same.
    if chosen and captured and chosen.keys().isdisjoint(captured):
        raise MismatchError(other_model(store_uri, "the plan was chosen", min(chosen)))


def _checked_taps(job: _Job, model: Opener | None) -> WantedTaps | None:
    """Return what the model must compute again; its layers, memory and device are checked before any work."""
    kind = job.kind
    device = kind.sums_on(job.device)
    if device is not None and job.reduction.scheduler is None:
        require_device(device)
    if not taps_of(kind.features):
        return None
    session = None if model is None else model()
    wanted = wanted_taps(kind.features, job.spans, session, intercept=kind.method.intercept)
    if wanted is not None and not kind.needs_store:
        require_fit_memory(wanted, kind, job.store, job.reduction.memory)
    return wanted
