"""Choosing the layers to remove: from a store, or by running the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ghoststream.activations import StoreRef
from ghoststream.options import Compute, Method, Reduction, Search, Source
from ghoststream.progress import Progress, SilentProgress
from ghoststream.selection import Selection, make_criterion
from ghoststream.spans import Span
from ghoststream.stages.capturing.replay import session_of
from ghoststream.stages.choosing.checks import check_search, require_criterion
from ghoststream.stages.choosing.criteria import MEASURED
from ghoststream.stages.choosing.search import search_session
from ghoststream.stages.choosing.writable import example_plan
from ghoststream.stages.from_store.evidence import Opener
from ghoststream.stages.from_store.select import PUBLISHED, select_from_store
from ghoststream.stages.refusals import check_model
from ghoststream.stages.session import ModelSession
from ghoststream.stages.sharing import on_first_device, scratch_beside
from ghoststream.stages.workers import Shared


def select(
    remove: int,
    source: Source,
    *,
    search: Search | None = None,
    method: Method | None = None,
    compute: Compute | None = None,
    reduction: Reduction | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Choose which layers to remove, and write the plan if ``out`` is given.

    From a store, criteria that read hidden states or weights (:mod:`ghoststream.selection`) are quick, and
    the model is run no more. From a text, criteria that run the model
    (:mod:`ghoststream.stages.choosing.criteria`) say what it loses: with ``measured``, the default,
    candidates are repaired and measured on held-out windows, all of a step in one read of the weights.

    The same request again returns what is in ``out``. A killed one goes on with the figures that it has.

    Args:
        remove: How many layers.
        source: A store, or a model and a text to calibrate on. Nothing else is looked at.
        search: Criterion, and how much it tries.
        method: How candidates are repaired, where they are; by default ``auto``.
        compute: How the model is opened and run. Several devices, such as ``cuda:0,cuda:1``, take shares of
            the candidates that are measured, in a process each.
        reduction: Where statistics of a store are reduced. Workers of its ``scheduler`` take shares of the
            candidates where the model is run.
        out: Plan file (JSON) to write.
        progress: Who is told how far it is.

    Raises:
        RequestError: If the criterion is unknown, cannot remove so many layers or does not read this source,
            the numbers do not fit the model or the text, or an option is given that would not be used.
        OutputExistsError: If ``out`` holds something else.
        BusyError: If another process is writing it.
        StoreError: If a hidden state that is needed is not in the store.
        MismatchError: If the store is not of the model that was given.
        NumericsError: If a hidden state or a solution is not finite.
        BudgetError, DiskFullError: If memory or disk does not suffice.

    Memory: from a store what the criterion's docstring states, once for each worker thread; from a text that
    of :func:`~ghoststream.stages.choosing.measured.measure_repairs`.
    """
    search, method = search or Search(), method or Method()
    compute, reduction = compute or Compute(), reduction or Reduction()
    progress = progress or SilentProgress()
    if source.store is not None:
        name = require_criterion(search.criterion or PUBLISHED, runs_model=False)
        search.refuse(set(Search.model_fields) - {"criterion"}, f"the criterion {name} runs nothing")
        method.refuse(None, f"the criterion {name} does not fit operators")
        if not make_criterion(name).reads_weights:
            source.refuse(("model",), f"the criterion {name} reads no weights")
        return select_from_store(
            str(source.store),
            remove,
            model=opener(source, compute),
            criterion=name,
            reduction=reduction,
            out=out,
            progress=progress,
        )
    name = require_criterion(search.criterion or MEASURED, runs_model=True)
    reduction.refuse(set(Reduction.model_fields) - {"scheduler"}, "no store is read")
    shared = Shared.asked(compute, reduction.scheduler)
    session = ModelSession(
        str(source.model), scratch_beside(on_first_device(compute), out, reduction.scheduler)
    )
    n_layers = session.skeleton.n_layers
    rule, named = check_search(n_layers, remove, search, method)
    if not rule.repairs:
        method.refuse(None, f"the criterion {name} repairs nothing")
        search.refuse(
            ("held_out", "folds"), f"the criterion {name} repairs nothing, and measures on all windows"
        )
    check_model(session, named, (Span(1, 2),), example_plan(session.skeleton, remove, search))
    assert source.calibration is not None
    text = source.calibration.to_calibrate()
    return search_session(
        session,
        remove,
        text,
        search=search,
        method=method,
        out=out,
        progress=progress,
        shared=shared,
    )


def opener(source: Source, compute: Compute, *, used: Iterable[str] = ()) -> Opener | None:
    """Return what opens the model of a store, if one was given.

    Args:
        source: Store and model.
        compute: How it is opened and run.
        used: Options that serve without a model too.

    Raises:
        RequestError: If options are given for a model that is not.
    """
    if source.model is None:
        compute.refuse(set(Compute.model_fields).difference(used), "no model is given")
        return None
    store, model = str(source.store), source.model
    return lambda: session_of(StoreRef.of(store).open(), model, compute)
