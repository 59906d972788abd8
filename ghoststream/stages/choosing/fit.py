"""The sequential fit: operators fitted in one pass, each on the model repaired so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import AUTO, Method, Search, Text
from ghoststream.progress import Progress
from ghoststream.recipe import library_versions
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from ghoststream.stages.choosing.auto import without_too_large
from ghoststream.stages.choosing.checks import named_method, require_shareable
from ghoststream.stages.choosing.fit_shares import SharedFit, fit_shares
from ghoststream.stages.choosing.fitted_lanes import FittedLanes
from ghoststream.stages.choosing.fitting import StreamedFit
from ghoststream.stages.choosing.material import Material
from ghoststream.stages.choosing.moments import DENSE
from ghoststream.stages.choosing.refitting import RefittedLayer, refitted_layers
from ghoststream.stages.choosing.repair import Repair, passing_method
from ghoststream.stages.choosing.trial import Trial
from ghoststream.stages.choosing.ways import EVERY, Ways
from ghoststream.stages.output import NamedByRequest, Output
from ghoststream.stages.session import ModelSession
from ghoststream.stages.workers import Shared, Workers, workers_of
from ghoststream.statistics import Ranges
from ghoststream.streaming import Lane, PassOptions, StreamedPass, make_batches
from ghoststream.text import TokenSet, recipe_of


def fit_in_passes(
    session: ModelSession,
    selection: Selection,
    text: Text,
    *,
    method: Method,
    search: Search,
    out: str | Path | NamedByRequest,
    progress: Progress,
    ways: Ways = EVERY,
    shared: Shared | None = None,
) -> OperatorSet:
    """Fit the operators of a plan one after another, in one pass over a model and without a store.

    See :func:`ghoststream.fit`. With ``auto`` each boundary is fitted as the selection says, where it does;
    otherwise in each of ``ways``, of which the one is taken that leaves the lowest loss on held-out windows:
    a pass more for each span. Then all windows serve to fit. Nothing is kept of a run that is killed but the
    figures of ``auto``.

    Workers of ``shared`` come when there is something to fit. They share the candidates that ``auto``
    measures, and the sequences of the fit: a pass for each boundary that reads the repaired stream
    (:mod:`ghoststream.stages.choosing.fit_shares`). No bit depends on their number.

    Raises:
        RequestError: If options cannot be honoured, or the text gives too little to hold some out.
        UnsupportedModelError: If the model does not allow the features.
        OutputExistsError: If ``out`` holds something else.
        BusyError: If another process is writing it.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        NumericsError: If a state or a solution is not finite.

    Memory: that of the pass, the states of all sequences twice (three times while the lanes part), and what
    the operator's ``cost`` states for one boundary; with ``refit`` the states twice more while a layer is
    fitted anew, with what enters its last linear map beside them, and what
    :class:`~ghoststream.stages.choosing.refitting.RefittedProjection` states; while ``auto`` measures, that
    of :func:`~ghoststream.stages.choosing.measured.measure_repairs`. With workers what
    :func:`~ghoststream.stages.choosing.fit_shares.fit_shares` states.
    """
    if shared is not None:
        require_shareable(method, selection.methods)
    repair = _known_repair(selection, named_method(method))
    if repair is not None:
        search.refuse(Search.measuring, "nothing is measured, as it is known how each boundary is fitted")
    tokens = session.tokens(text, progress)
    material = None if repair is not None else Material.read(session, text, search, progress)
    micro_batch = session.micro_batch(tokens.length) if material is None else material.division.micro_batch
    ranges = Ranges.make(tokens.n_sequences, folds=search.folds, turn=tokens.n_texts)
    work = _Fit(session, selection.plan, tokens, ranges, micro_batch, method, progress)
    request = {**work.to_json(), "text": recipe_of(text, tokens).to_json()}

    def place(ways: Ways) -> Output:
        return Output(out, {**request, **_repairing(repair, material, ways)}, "fit")

    if material is not None:
        ways = without_too_large(ways, material, place=place, load=OperatorSet.load, shared=shared)
    recipe, output = {**request, **_repairing(repair, material, ways)}, place(ways)
    metadata: dict[str, Any] = {"recipe": recipe, "recipe_digest": output.digest}
    metadata["versions"] = library_versions()
    with output.claimed(OperatorSet.load) as found:
        if found is not None:
            return found
        session.expect(selection.base, "the plan was chosen")
        with workers_of(shared, progress) as crew:
            if repair is None:
                assert material is not None
                trial = Trial(material, lanes=None, output=output, crew=crew, ways=ways)
                repair, metadata["chosen"] = _choose(selection.plan, trial)
            operators = work.run(repair, crew, metadata, saw_all=material is not None)
        operators.save(output.path)
    return operators


@dataclass(frozen=True)
class _Fit:
    """A fit on all windows of a text, with everything open."""

    session: ModelSession
    plan: PruningPlan
    tokens: TokenSet
    ranges: Ranges
    micro_batch: int
    method: Method
    progress: Progress

    def to_json(self) -> dict[str, Any]:
        """Return what of it can change a bit, for recipes."""
        return {
            "stage": "fit",
            "plan": self.plan.to_json(),
            "model": self.session.fingerprint["digest"],
            "tokens": self.tokens.digest,
            **self.session.describe(),
            "micro_batch": self.micro_batch,
            "range_sequences": self.ranges.range_sequences,
            "folds": self.ranges.n_folds,
            "operator": self.method.operator or AUTO,
            "refit": self.method.refit,
        }

    def run(
        self, repair: Repair, crew: Workers | None, metadata: dict[str, Any], *, saw_all: bool
    ) -> OperatorSet:
        """Fit each boundary as a repair says, here or by workers.

        Args:
            repair: How each boundary is fitted.
            crew: Workers that share the sequences.
            metadata: What the operators file says of the request; the base is added.
            saw_all: Whether the whole model was read before, to choose the repair.
        """
        session, progress = self.session, self.progress
        if self.method.given(("refit",)):
            repair = repair.refitted(self.method.refit)
        if crew is None:
            fits, replaced = _run(session, self.tokens, repair, self.ranges, self.micro_batch, progress)
        else:
            shared = SharedFit(self.tokens, repair, self.ranges, self.micro_batch)
            fits, replaced = fit_shares(crew, session, shared, progress), {}
        metadata["base"] = session.base(None if saw_all else _last(repair), progress)
        hidden, kind = session.skeleton.hidden_size, self.method.operator or AUTO
        return OperatorSet(self.plan, kind, tuple(fits), hidden, metadata, replaced)


def _known_repair(selection: Selection, method: Method | None) -> Repair | None:
    """Return how boundaries are fitted, where an operator is named or the plan's file says it."""
    if method is not None:
        return Repair.alike(selection.plan, method)
    # A file may have been edited by hand.
    methods = tuple(map(passing_method, selection.methods))
    return Repair(selection.plan, methods) if methods else None


def _repairing(repair: Repair | None, material: Material | None, ways: Ways) -> dict[str, Any]:
    if repair is not None:
        return {"methods": [one.to_json() for one in repair.methods]}
    assert material is not None
    chosen_on = {**material.division.to_json(), "screen": ways.screen.to_json()}
    return {**ways.recorded(), "chosen_on": chosen_on}


def _choose(plan: PruningPlan, trial: Trial) -> tuple[Repair, Sequence[Mapping[str, Any]]]:
    ((repair, best),) = trial.refine([Repair.alike(plan, trial.ways.screen)])
    found = f"loss {best['gap']:+.4f} nats a token against the dense model on held-out windows"
    trial.progress.log(f"{repair.name}: {found}")
    return repair, trial.rows()


def _run(
    session: ModelSession,
    tokens: TokenSet,
    repair: Repair,
    ranges: Ranges,
    micro_batch: int,
    progress: Progress,
) -> tuple[list[BoundaryOperator], dict[str, npt.NDArray[np.float32]]]:
    """Return the operators, and the weights behind gaps that were fitted anew by their names in the base."""
    plan, last = repair.plan, _last(repair)
    batches = make_batches(tokens.ids, tokens.mask, micro_batch)
    fitted = FittedLanes(ranges, tokens.mask, session)
    lane = fitted.lane("repaired", repair, until=last)
    lanes = [Lane(DENSE, PruningPlan(plan.n_layers), until=last), *fitted.helpers(), lane]
    factory = fitted.memory(progress).states_factory(batches)
    options = PassOptions(last_layer=last, progress=progress)
    StreamedPass(session.skeleton, batches, lanes, factory, options).run()
    fits = [one for one in lane.maps.values() if isinstance(one, StreamedFit)]
    refits = fitted.refits(lane)
    operators = [_with_refits(one.operator, repair, refits) for one in fits if one.operator is not None]
    parts = [part for refitted in refits.values() for part in refitted.parts]
    return operators, {part.projection.weight: part.weight.numpy() for part in parts}


def _last(repair: Repair) -> int:
    """Return the position up to which a pass that fits a repair runs."""
    span, method = repair.plan.spans[-1], repair.methods[-1]
    return max((span.stop, *(n + 1 for n in refitted_layers(repair.plan, span, method.refit))))


def _with_refits(
    operator: BoundaryOperator, repair: Repair, refits: Mapping[int, RefittedLayer]
) -> BoundaryOperator:
    """Note the figures of what was fitted anew behind a boundary beside those of its operator."""
    layers = refitted_layers(repair.plan, operator.span, repair.by_span[operator.span].refit)
    parts = [part for layer in layers for part in refits[layer].parts]
    if not parts:
        return operator
    figures = {part.projection.weight: part.figures for part in parts}
    return replace(operator, diagnostics={**operator.diagnostics, "refitted": figures})
