"""The operators of a plan fitted in one pass, by default each on the model repaired so far: the sequential fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ghoststream.files import json_digest, require_writable
from ghoststream.operators import BoundaryOperator, OperatorOptions, OperatorSet
from ghoststream.options import dtype_name
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos, library_versions
from ghoststream.spans import PruningPlan
from ghoststream.stages.operators_file import existing_operators
from ghoststream.stages.repair.auto import AUTO, LATER_METHODS, SCREEN, named_method
from ghoststream.stages.repair.fitting import DENSE, FittedLanes, StreamedFit
from ghoststream.stages.repair.measured import divide
from ghoststream.stages.repair.methods import Inputs, Repair
from ghoststream.stages.searching.result import read_repair
from ghoststream.stages.searching.steps import MeasuredSteps, Trial
from ghoststream.stages.select import read_plan
from ghoststream.stages.session import ComputeRequest, ModelOptions, ModelSession, TextOptions
from ghoststream.statistics import DEFAULT_FOLDS, UNIFORM, Ranges
from ghoststream.streaming import Lane, PassOptions, StreamedPass, make_batches
from ghoststream.text import TokenSet


def fit(
    model: str | Path,
    plan: PruningPlan | str | Path,
    *,
    calibration: str,
    out: str | Path,
    sequences: int = 128,
    length: int = 512,
    held_out: int | None = None,
    operator: str = AUTO,
    weights: str = UNIFORM,
    options: OperatorOptions | None = None,
    inputs: Inputs = "repaired",
    folds: int = DEFAULT_FOLDS,
    pack: bool = True,
    bos: Bos = "auto",
    progress: Progress | None = None,
    **compute: Unpack[ComputeRequest],
) -> OperatorSet:
    """Fit the operators of a plan one after another, in one pass over the model and without a store.

    The inputs of an operator are the states of the model repaired so far, the targets those of the dense model. For the
    first span that is what :func:`ghoststream.solve` fits; with several spans the later ones make up for what the earlier
    ones left, which is mostly, but not always, better (``inputs``).

    With ``auto`` each boundary is fitted as a search chose it, where the plan is the file of one; otherwise in each of the
    ways of :data:`~ghoststream.stages.repair.auto.METHODS` (behind another boundary
    :data:`~ghoststream.stages.repair.auto.LATER_METHODS`), of which the one is taken that leaves the lowest loss on held-out
    windows of the text: a pass more for each span. Then all windows serve to fit.

    Nothing is kept of a run that is killed but the figures of ``auto``.

    Args:
        model: Local folder or hub id.
        plan: The plan, its file, or spans such as ``"5:7 13:19"``.
        calibration: Text specification; of a text with a standard split, the part to fit on.
        out: Operator file (safetensors) to write.
        sequences: Number of windows.
        length: Tokens of a window.
        held_out: How many windows, the last ones, ``auto`` measures on; a quarter if ``None``.
        operator: Operator family, or ``auto``.
        weights: Token weights; ``auto`` has its own.
        options: Options of the operator; ``auto`` has its own.
        inputs: Whose states later operators are fitted on: ``repaired``, the model's repaired so far, or ``dense``, as
            :func:`ghoststream.solve` does. ``auto`` tries both.
        folds: Folds of whole sequences for the residual out of sample; 0 or 1 for none.
        pack: Whether documents are joined before they are cut into windows.
        bos: When the beginning-of-sequence token is put in front.
        progress: Who is told how far it is.
        **compute: See :class:`~ghoststream.stages.session.ComputeRequest`.

    Returns:
        The operators, with residuals in and out of sample in their diagnostics, and with ``auto`` what was tried and the loss
        above the dense model's on the held-out windows.

    Raises:
        PlanError: If the plan does not fit the model.
        RequestError: If options cannot be honoured, or the text gives too little to hold some out.
        UnsupportedModelError: If the model does not allow the features.
        OutputExistsError: If ``out`` holds something else.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        NumericsError: If a state or a solution is not finite.
        GhoststreamError: What opening the model or the text raises.

    Memory: that of the pass, the states of all sequences twice (three times while the lanes part), and what
    :func:`ghoststream.solve` states for one boundary; while ``auto`` measures, that of
    :func:`~ghoststream.stages.repair.measured.measure_repairs`.
    """
    out = Path(out)
    given = named_method(operator, weights, options, inputs)
    session = ModelSession(model, ModelOptions(**compute))
    wanted = read_plan(plan, session.skeleton.n_layers)
    repair = _given_repair(plan, wanted) if given is None else Repair.alike(wanted, given)
    text = TextOptions(calibration, sequences, length, pack, bos, part="fit")
    tokens = session.tokens(text)
    division = _Division.make(session, tokens, folds, held_out=held_out, choosing=repair is None)
    recipe = {
        "stage": "fit",
        "text": text.recipe().to_json(),
        "tokens_digest": tokens.digest,
        "dtype": dtype_name(session.skeleton.dtype),
        "attention": session.skeleton.attention,
        **division.to_json(),
        "operator": operator,
        "methods": [method.to_json() for method in (LATER_METHODS if repair is None else repair.methods)],
    }
    digest = json_digest({"recipe": recipe, "plan": wanted.to_json(), "model": session.fingerprint["digest"]})
    found = existing_operators(out, digest)
    if found is not None:
        return found
    require_writable(out)
    metadata: dict[str, Any] = {
        "base": session.fingerprint,
        "recipe": recipe,
        "recipe_digest": digest,
        "versions": library_versions(),
    }
    tell = progress or SilentProgress()
    if repair is None:
        trial = Trial(session, tokens, division.fitting, division.micro_batch, tell)
        steps = MeasuredSteps(trial, {"digest": digest}, out, None)
        repair, metadata["chosen"] = _choose(wanted, steps, tell)
    else:
        steps = None
    fits = _run(session, tokens, repair, division, tell)
    operators = OperatorSet(wanted, operator, tuple(fits), session.skeleton.hidden_size, metadata)
    operators.save(out)
    if steps is not None:
        steps.forget()
    return operators


@dataclass(frozen=True)
class _Division:
    """How the sequences are divided: all of them to fit on, and those that ``auto`` fits on to measure on the others."""

    micro_batch: int
    ranges: Ranges
    fitting: Ranges | None

    @classmethod
    def make(
        cls, session: ModelSession, tokens: TokenSet, folds: int, *, held_out: int | None, choosing: bool
    ) -> _Division:
        ranges = Ranges.make(tokens.n_sequences, folds=folds)
        if choosing:
            micro_batch, n_fit = divide(session, tokens, held_out)
            return cls(micro_batch, ranges, Ranges.make(n_fit, folds=folds))
        chosen = session.options.micro_batch or session.memory(tokens.length).choose_micro_batch()
        return cls(chosen, ranges, None)

    def to_json(self) -> dict[str, Any]:
        """Return what of it can change a bit of the operators."""
        chosen_on = (
            None if self.fitting is None else {"from": self.fitting.n_sequences, "screen": SCREEN.to_json()}
        )
        return {
            "micro_batch": self.micro_batch,
            "range_sequences": self.ranges.range_sequences,
            "folds": self.ranges.n_folds,
            "chosen_on": chosen_on,
        }


def _given_repair(plan: PruningPlan | str | Path, wanted: PruningPlan) -> Repair | None:
    """Return what the plan's file says of how it is repaired, if it does."""
    found = None if isinstance(plan, PruningPlan) else read_repair(Path(plan))
    return found if found is not None and found.plan == wanted else None


def _choose(
    plan: PruningPlan, steps: MeasuredSteps, progress: Progress
) -> tuple[Repair, Sequence[Mapping[str, Any]]]:
    ((repair, best),) = steps.refine([Repair.alike(plan, SCREEN)])
    progress.log(f"{repair.name}: loss {best['gap']:+.4f} against the dense model on held-out windows")
    return repair, steps.rows()


def _run(
    session: ModelSession,
    tokens: TokenSet,
    repair: Repair,
    division: _Division,
    progress: Progress,
) -> list[BoundaryOperator]:
    plan = repair.plan
    last = plan.spans[-1].stop
    batches = make_batches(tokens.ids, tokens.mask, division.micro_batch)
    fitted = FittedLanes(division.ranges, tokens.mask, session)
    lane = fitted.lane("repaired", repair, until=last)
    lanes = [Lane(DENSE, PruningPlan(plan.n_layers), until=last), *fitted.helpers(), lane]
    factory = session.memory(tokens.length).states_factory(batches)
    options = PassOptions(last_layer=last, progress=progress)
    StreamedPass(session.skeleton, batches, lanes, factory, options).run()
    fits = [one for one in lane.maps.values() if isinstance(one, StreamedFit)]
    return [one.operator for one in fits if one.operator is not None]
