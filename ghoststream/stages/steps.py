"""The steps of a recovery: in passes over the model, or from a store of its hidden states."""

from __future__ import annotations

from pathlib import Path

from ghoststream.errors import RequestError
from ghoststream.operators import OperatorSet
from ghoststream.options import AUTO, UNIFORM, Method, Recovery, Search, Storage
from ghoststream.progress import Progress
from ghoststream.selection import Selection, make_criterion
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.capture import capture_session
from ghoststream.stages.capturing.tap_store import require_taps
from ghoststream.stages.choosing.auto import named_method
from ghoststream.stages.choosing.criteria import MEASURED
from ghoststream.stages.choosing.fit import fit_in_passes
from ghoststream.stages.choosing.search import check_search, search_session
from ghoststream.stages.from_store.fit import fit_from_store, make_store_kind
from ghoststream.stages.from_store.select import select_from_store
from ghoststream.stages.select import require_criterion
from ghoststream.stages.session import ModelSession
from ghoststream.stages.way import Way, what_goes
from ghoststream.statistics import taps_of

_STORE_OPTIONS = "layers are chosen and operators fitted in passes over the model, without a store"


class Steps:
    """The steps of one recovery, in one folder. All that can be refused is refused when it is made.

    Args:
        session: The model.
        recovery: What to do.
        work: Folder of what is kept.
        progress: Who is told how far it is.

    Attributes:
        way: Which way the recovery goes.
        store: The store that was captured, if one was.

    Raises:
        RequestError: If options exclude one another, or one would not be used.
        PlanError: If the plan does not fit the model.
        UnsupportedModelError: If the model does not allow the features.
    """

    def __init__(self, session: ModelSession, recovery: Recovery, work: Path, progress: Progress) -> None:
        self._session, self._recovery, self._work, self._progress = session, recovery, work, progress
        self._text = recovery.calibration.to_calibrate()
        self.store: str | None = None
        n_layers = session.skeleton.n_layers
        self.way = Way(recovery, *what_goes(recovery, n_layers))
        if self.way.given is None and self.way.n_removed >= n_layers:
            asked = f"cannot remove {self.way.n_removed} of {n_layers} layers"
            msg = f"{asked}; at least one must go and one must survive"
            raise RequestError(msg)
        self._check()

    def choose(self) -> Selection:
        """Choose the layers."""
        search = self._recovery.search
        name = search.criterion or MEASURED
        out = self._work / f"plan-{name}-{self.way.n_removed}.json"
        if self.way.runs_model:
            selection = search_session(
                self._session,
                self.way.n_removed,
                self._text,
                search=search,
                method=self._recovery.method,
                out=out,
                progress=self._progress,
            )
        else:
            selection = select_from_store(
                self._capture(None),
                self.way.n_removed,
                model=lambda: self._session,
                criterion=name,
                reduction=self._recovery.reduction,
                out=out,
                progress=self._progress,
            )
        self._progress.log(f"{name} removes {selection.plan}")
        return selection

    def fit(self, selection: Selection) -> tuple[OperatorSet, Path]:
        """Fit the operators; return them and their file."""
        out, method, search = self._file(selection.plan), self._recovery.method, self._recovery.search
        if self.way.fits_in_passes:
            is_known = method.is_named or bool(selection.methods)
            used = ("folds",) if is_known else ("folds", "held_out")
            operators = fit_in_passes(
                self._session,
                selection,
                self._text,
                method=method,
                search=Search.make({name: getattr(search, name) for name in search.given(used)}),
                out=out,
                progress=self._progress,
            )
            return operators, out
        operators = fit_from_store(
            self.store or self._capture(self._needed_layers(selection.plan)),
            selection.plan,
            model=lambda: self._session,
            method=method,
            folds=search.folds,
            reduction=self._recovery.reduction,
            out=out,
            progress=self._progress,
        )
        return operators, out

    def _check(self) -> None:
        """Find before any work what cannot be done, and what would not be used."""
        recovery, skeleton = self._recovery, self._session.skeleton
        search, method = recovery.search, recovery.method
        if self.way.given is not None:
            search.refuse(Search.choosing, "the plan says which layers go")
            if self.way.given.methods or method.is_named:
                search.refuse(
                    ("held_out",), "nothing is measured, as it is known how each boundary is fitted"
                )
        elif self.way.runs_model:
            rule, _ = check_search(skeleton.n_layers, self.way.n_removed, search, method)
            if not rule.repairs and method.is_named:
                because = (
                    f"the criterion {search.criterion} measures on all windows, and an operator is named"
                )
                search.refuse(("held_out",), because)
        else:
            name = require_criterion(str(search.criterion), runs_model=False)
            search.refuse(Search.trying, f"the criterion {name} runs nothing")
            make_criterion(name).check(skeleton.n_layers, self.way.n_removed)
        if self.way.fits_in_passes:
            self._check_passes()
        else:
            search.refuse(("held_out",), "nothing is measured")
            self._check_taps(make_store_kind(method).method)

    def _check_passes(self) -> None:
        recovery, method = self._recovery, named_method(self._recovery.method)
        if method is not None:
            self._check_taps(method)
        if self.way.given is None and not self.way.runs_model:
            return
        recovery.refuse(("store",), _STORE_OPTIONS)
        recovery.storage.refuse(None, _STORE_OPTIONS)
        recovery.reduction.refuse(None, _STORE_OPTIONS)

    def _check_taps(self, method: Method) -> None:
        spans = (Span(1, 2),) if self.way.given is None else self.way.given.plan.spans
        require_taps(method.features, spans, self._session.skeleton, intercept=method.intercept)

    def _needed_layers(self, plan: PruningPlan) -> tuple[int, ...]:
        """Return the hidden states that a fit from a store reads.

        Those before the layer before a boundary are among them where that layer is run again.
        """
        method = self._recovery.method
        needed = {position for span in plan.spans for position in (span.start, span.stop)}
        if method.per_layer:
            needed |= {position for span in plan.spans for position in range(span.start, span.stop)}
        if taps_of(make_store_kind(method).features):
            needed |= {span.start - 1 for span in plan.spans if span.start > 0}
        return tuple(sorted(needed))

    def _capture(self, needed: tuple[int, ...] | None) -> str:
        """Capture the hidden states that are needed: all, unless the request says which."""
        recovery = self._recovery
        self.store = recovery.store or str(self._work / "store")
        layers = needed if recovery.storage.layers is None else recovery.storage.layers
        storage = Storage(layers=layers, store_dtype=recovery.storage.store_dtype)
        capture_session(self._session, self._text, self.store, storage, progress=self._progress)
        return self.store

    def _file(self, plan: PruningPlan) -> Path:
        method = self._recovery.method
        parts = (
            method.operator or AUTO,
            method.features if method.features != "hidden" else "",
            method.token_weights if method.token_weights != UNIFORM else "",
        )
        spans = "_".join(f"{span.start}-{span.stop}" for span in plan.spans)
        return self._work / f"{'-'.join(part for part in parts if part)}-{spans}.safetensors"
