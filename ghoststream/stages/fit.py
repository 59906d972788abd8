"""Fitting the operators of a plan: from a store, or in passes over the model."""

from __future__ import annotations

from pathlib import Path

from ghoststream.errors import RequestError
from ghoststream.operators import OperatorSet
from ghoststream.options import AUTO, Compute, Method, Reduction, Search, Source
from ghoststream.progress import Progress, SilentProgress
from ghoststream.selection import read_plan
from ghoststream.spans import PruningPlan
from ghoststream.stages.choosing.checks import named_method, require_shareable
from ghoststream.stages.choosing.fit import fit_in_passes
from ghoststream.stages.from_store.fit import fit_from_store
from ghoststream.stages.from_store.kind import make_store_kind
from ghoststream.stages.refusals import check_model
from ghoststream.stages.select import opener
from ghoststream.stages.session import ModelSession
from ghoststream.stages.sharing import on_first_device, require_one_device, scratch_beside
from ghoststream.stages.workers import Shared
from ghoststream.statistics import taps_of
from ghoststream.statistics.devices import sums_device

_DEVICE = ("device",)
"""What of the options of a model serves to reduce a store too."""


def fit(
    plan: PruningPlan | str | Path,
    source: Source,
    *,
    out: str | Path,
    method: Method | None = None,
    search: Search | None = None,
    compute: Compute | None = None,
    reduction: Reduction | None = None,
    progress: Progress | None = None,
) -> OperatorSet:
    """Fit one operator for each span of a plan, and write them to one file.

    From a store the operator is by default ``ghost``, and every one is fitted on the dense model's states.
    From a text they are fitted one after another in one pass: the inputs of an operator are the states of the
    model repaired so far, the targets those of the dense model. For the first span the two are the same, bit
    for bit; with several spans the later ones make up for what the earlier ones left, which is mostly, but
    not always, better (``method.inputs``). The operator is then by default ``auto``: each boundary is fitted
    as the plan's file says, or in each of several ways, of which held-out windows choose.

    The same request again, once finished, returns what is there.

    Args:
        plan: The plan, its file, or spans such as ``"5:7 13:19"``.
        source: A store, or a model and a text to calibrate on. With a store, its model is needed for features
            of the layer before a boundary only.
        out: Operators file (safetensors) to write.
        method: How boundaries are fitted.
        search: ``folds`` for the residual out of sample, and ``held_out`` and ``across_texts`` for ``auto``.
        compute: How the model is opened and run. Several devices, such as ``cuda:0,cuda:1``, take shares of
            the sequences, in a process each; no bit depends on their number.
        reduction: Where statistics of a store are reduced. Workers of its ``scheduler`` take shares of the
            sequences where the model is run.
        progress: Who is told how far it is.

    Returns:
        The operators, with residuals in and out of sample and warnings in their diagnostics; with ``auto``
        also what was tried and the loss above the dense model's on the held-out windows.

    Raises:
        PlanError: If the plan does not fit the model.
        RequestError: If an option is out of range, a name unknown, or an option is given that would not be
            used.
        GhoststreamError: What :func:`~ghoststream.stages.from_store.fit.fit_from_store` and
            :func:`~ghoststream.stages.choosing.fit.fit_in_passes` raise, which also state the memory.
    """
    method, search = method or Method(), search or Search()
    compute, reduction = compute or Compute(), reduction or Reduction()
    progress = progress or SilentProgress()
    search.refuse(Search.choosing, "the plan says which layers go")
    if source.store is not None:
        if method.operator == AUTO:
            msg = (
                "the operator auto is chosen by running the model; give --calibration in the place of --store"
            )
            raise RequestError(msg)
        require_one_device(compute)
        search.refuse(
            Search.measuring, "from a store nothing is measured; --folds are for residuals out of sample"
        )
        if not taps_of(make_store_kind(method).features):
            unread = "no layer is run again for these features"
            source.refuse(("model",), unread)
            compute.refuse(set(Compute.model_fields).difference(_DEVICE), unread)
        return fit_from_store(
            str(source.store),
            plan,
            model=opener(source, compute, used=_DEVICE),
            method=method,
            folds=search.folds,
            reduction=reduction,
            device=sums_device(compute.device, elsewhere=reduction.scheduler is not None),
            out=out,
            progress=progress,
        )
    reduction.refuse(set(Reduction.model_fields) - {"scheduler"}, "no store is read")
    shared = Shared.asked(compute, reduction.scheduler)
    session = ModelSession(
        str(source.model), scratch_beside(on_first_device(compute), out, reduction.scheduler)
    )
    selection = read_plan(plan, session.skeleton.n_layers)
    if shared is not None:
        require_shareable(method, selection.methods)
    check_model(session, named_method(method), selection.plan.spans, selection.plan)
    assert source.calibration is not None
    text = source.calibration.to_calibrate()
    return fit_in_passes(
        session,
        selection,
        text,
        method=method,
        search=search,
        out=out,
        progress=progress,
        shared=shared,
    )
