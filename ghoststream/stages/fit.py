"""Sequential fit: the operators of a plan, each fitted on the model repaired so far, in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from ghoststream.files import json_digest, require_writable
from ghoststream.operators import OperatorOptions, OperatorSet
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos, library_versions
from ghoststream.spans import PruningPlan
from ghoststream.stages.fitting import DENSE, FitMethod, StreamedFit, fitted_lane
from ghoststream.stages.select import read_plan
from ghoststream.stages.session import ComputeRequest, ModelOptions, ModelSession, TextOptions, dtype_name
from ghoststream.stages.solve import existing_operators
from ghoststream.statistics import DEFAULT_FOLDS, UNIFORM, RangePlan
from ghoststream.streaming import Lane, PassOptions, StreamedPass, make_batches
from ghoststream.text import TokenSet


def fit(
    model: str | Path,
    plan: PruningPlan | str | Path,
    *,
    calibration: str,
    out: Path,
    sequences: int = 128,
    length: int = 512,
    operator: str = "ghost",
    weights: str = UNIFORM,
    options: OperatorOptions | None = None,
    folds: int = DEFAULT_FOLDS,
    pack: bool = True,
    bos: Bos = "auto",
    progress: Progress | None = None,
    **compute: Unpack[ComputeRequest],
) -> OperatorSet:
    """Fit the operators of a plan one after another, in one pass over the model and without a store.

    The inputs of an operator are the states of the model repaired so far, the targets those of the dense model. For the
    first span that is what :func:`ghoststream.solve` fits; with several spans the later ones make up for what the earlier
    ones left, which is mostly, but not always, better. Nothing is kept of a run that is killed.

    Args:
        model: Local folder or hub id.
        plan: The plan, its file, or spans such as ``"5:7 13:19"``.
        calibration: Text specification; of a text with a standard split, the part to fit on.
        out: Operator file (safetensors) to write.
        sequences: Number of windows.
        length: Tokens of a window.
        operator: Operator family.
        weights: Token weights.
        options: Options of the operator.
        folds: Folds of whole sequences for the residual out of sample; 0 or 1 for none.
        pack: Whether documents are joined before they are cut into windows.
        bos: When the beginning-of-sequence token is put in front.
        progress: Who is told how far it is.
        **compute: See :class:`~ghoststream.stages.session.ComputeRequest`.

    Returns:
        The operators, with residuals in and out of sample in their diagnostics.

    Raises:
        PlanError: If the plan does not fit the model.
        OutputExistsError: If ``out`` holds something else.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        NumericsError: If a state or a solution is not finite.
        GhoststreamError: What opening the model or the text raises.

    Memory: that of the pass, the states of all sequences twice (three times while the lanes part), and what
    :func:`ghoststream.solve` states for one boundary.
    """
    method = FitMethod(operator, options or OperatorOptions(), weights)
    session = ModelSession(model, ModelOptions(**compute))
    wanted = read_plan(plan, session.skeleton.n_layers)
    text = TextOptions(calibration, sequences, length, pack, bos, part="fit")
    tokens = session.tokens(text)
    ranges = RangePlan.make(tokens.n_sequences, folds=folds)
    micro_batch = session.options.micro_batch or session.memory(length).choose_micro_batch()
    recipe = {
        "fit": "sequential",
        "text": text.recipe().to_json(),
        "tokens_digest": tokens.digest,
        "dtype": dtype_name(session.skeleton.dtype),
        "attention": session.skeleton.attention,
        "micro_batch": micro_batch,
        "range_sequences": ranges.range_sequences,
        "folds": ranges.n_folds,
        **method.to_json(),
    }
    metadata = {
        "base": session.fingerprint,
        "recipe": recipe,
        "recipe_digest": json_digest(
            {"recipe": recipe, "plan": wanted.to_json(), "model": session.fingerprint["digest"]}
        ),
        "versions": library_versions(),
    }
    found = existing_operators(out, str(metadata["recipe_digest"]))
    if found is not None:
        return found
    require_writable(out)
    fits = _run(session, tokens, wanted, method, ranges, micro_batch, progress or SilentProgress())
    boundaries = tuple(one.operator for one in fits if one.operator is not None)
    operators = OperatorSet(wanted, operator, boundaries, session.skeleton.hidden_size, metadata)
    operators.save(out)
    return operators


def _run(
    session: ModelSession,
    tokens: TokenSet,
    plan: PruningPlan,
    method: FitMethod,
    ranges: RangePlan,
    micro_batch: int,
    progress: Progress,
) -> list[StreamedFit]:
    last = plan.spans[-1].stop
    batches = make_batches(tokens.ids, tokens.mask, micro_batch)
    lane = fitted_lane("repaired", plan, method, ranges, tokens.mask, session, until=last)
    lanes = [Lane(DENSE, PruningPlan(plan.n_layers), until=last), lane]
    factory = session.memory(tokens.length).states_factory(batches)
    options = PassOptions(last_layer=last, progress=progress)
    StreamedPass(session.skeleton, batches, lanes, factory, options).run()
    return [one for one in lane.maps.values() if isinstance(one, StreamedFit)]
