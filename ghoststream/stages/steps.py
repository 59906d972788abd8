"""The steps of a recovery: in passes over the model, or from a store of its hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghoststream.operators import OperatorSet
from ghoststream.options import AUTO, UNIFORM, Recovery, Search, Storage
from ghoststream.recovery.notes import request_of
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from ghoststream.stages.capturing.capture import capture_session, capture_shared
from ghoststream.stages.choosing.criteria import MEASURED
from ghoststream.stages.choosing.fit import fit_in_passes
from ghoststream.stages.choosing.material import Division
from ghoststream.stages.choosing.search import search_session
from ghoststream.stages.choosing.ways import Ways
from ghoststream.stages.distillation.distill import distill_session
from ghoststream.stages.distillation.schedule import Schedule
from ghoststream.stages.from_store.fit import fit_from_store
from ghoststream.stages.from_store.select import select_from_store
from ghoststream.stages.output import NamedByRequest
from ghoststream.stages.refusals import check_export, check_form, check_place, check_recovery
from ghoststream.stages.run_record import RecordedProgress, work_folder
from ghoststream.stages.session import ModelSession
from ghoststream.stages.way import Way, what_goes
from ghoststream.stages.workers import Shared
from ghoststream.statistics.devices import sums_device


class Steps:
    """The steps of one recovery. All that can be refused is refused when it is made, and by :meth:`prepare`.

    Args:
        session: The model.
        recovery: What to do.
        out: Folder of the recovered checkpoint.
        progress: Who is told how far it is, and records the stages.

    Attributes:
        way: Which way the recovery goes.
        work: Folder of what is kept beside the checkpoint.
        store: The store that was captured, if one was.

    Raises:
        RequestError: If options exclude one another, or one would not be used.
        PlanError: If the plan does not fit the model.
        UnsupportedModelError: If the model cannot be pruned, or does not allow the features.
        OutputExistsError: If ``out`` holds something else.
    """

    def __init__(
        self, session: ModelSession, recovery: Recovery, out: Path, progress: RecordedProgress
    ) -> None:
        self._session, self._recovery, self._progress = session, recovery, progress
        self.work = work_folder(out)
        self._text = recovery.calibration.to_calibrate()
        self.store: str | None = None
        sizes = session.sizes
        self.way = Way(recovery, *what_goes(recovery, sizes.n_layers))
        self._ways = Ways.of(recovery.form, sizes.model_type)
        check_recovery(self.way, sizes, session.memory(self._text.length).choose_micro_batch)
        check_export(session.skeleton, self.way.plan(session.skeleton))
        check_form(self.way, session.skeleton)
        self._out = out
        self.check_place()

    def check_place(self) -> None:
        """Check that the recovered checkpoint can be written, or is there already.

        Raises:
            OutputExistsError: If the place is taken.
            RequestError: If it cannot be written to.
            ArtifactError: If a recovered checkpoint is there that is damaged.
        """
        check_place(self._out, self.way, lambda: str(self._session.fingerprint["digest"]))

    def prepare(self) -> None:
        """Read all texts, so that none is found to be missing or too short behind a pass.

        Raises:
            InputNotFoundError, TextError: If a text, or the tokenizer, cannot be read or gives too little.
            RequestError: If windows cannot be parted as they are to be.
        """
        tokens = self._session.tokens(self._text, self._progress)
        if self.way.measures:
            Division.make(self._session, tokens, self._recovery.search)
        if self._recovery.distill is not None:
            Schedule.of(self._recovery.distill, tokens.n_sequences)
        if self._recovery.evaluate is not None:
            self._session.tokens(self._recovery.evaluate.to_evaluate(), self._progress)

    @property
    def request(self) -> dict[str, Any]:
        """What is asked for and can change a bit of the checkpoint, as JSON data; texts were read before."""
        found = request_of(self._recovery, self.way.given)
        found.pop("evaluate", None)
        tokens = self._session.tokens(self._text, self._progress)
        return {**found, "model": self._session.fingerprint["digest"], "tokens": tokens.digest}

    @property
    def shared(self) -> Shared | None:
        """How passes over the model are shared; None where one process runs them."""
        recovery = self._recovery
        if not self.way.shares_passes:
            return None
        scratch = {"scratch": self._session.compute.scratch}
        return Shared(recovery.compute.model_copy(update=scratch), recovery.reduction.scheduler)

    def choose(self) -> Selection:
        """Choose the layers."""
        search = self._recovery.search
        name = search.criterion or MEASURED
        out = self.work / f"plan-{name}-{self.way.n_removed}.json"
        if self.way.runs_model:
            self._progress.enter("search")
            selection = search_session(
                self._session,
                self.way.n_removed,
                self._text,
                search=search,
                method=self._recovery.method,
                out=out,
                progress=self._progress,
                ways=self._ways,
                shared=self.shared,
            )
        else:
            store = self._capture(None)
            self._progress.enter("select")
            selection = select_from_store(
                store,
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
        self._session.expect(selection.base, "the plan was chosen")
        if self.way.fits_in_passes:
            is_known = method.is_named or bool(selection.methods)
            self._progress.enter("fit")
            used = ("folds",) if is_known else ("folds", *Search.measuring)
            operators = fit_in_passes(
                self._session,
                selection,
                self._text,
                method=method,
                search=Search.make({name: getattr(search, name) for name in search.given(used)}),
                out=out,
                progress=self._progress,
                ways=self._ways,
                shared=self.shared,
            )
            return operators, out.of(operators.digest)
        store = self.store or self._capture(self.way.needed_layers(selection.plan))
        self._progress.enter("solve")
        operators = fit_from_store(
            store,
            selection.plan,
            model=lambda: self._session,
            method=method,
            folds=search.folds,
            reduction=self._recovery.reduction,
            device=sums_device(
                self._session.compute.device, elsewhere=self._recovery.reduction.scheduler is not None
            ),
            out=out,
            progress=self._progress,
        )
        return operators, out.of(operators.digest)

    def train(self, operators: OperatorSet, fitted: Path) -> tuple[OperatorSet, Path]:
        """Train the operators where that is asked for; return those that are written, and their file.

        Args:
            operators: What was fitted.
            fitted: Their file.
        """
        training = self._recovery.distill
        if training is None:
            return operators, fitted
        self._progress.enter("distill")
        out = NamedByRequest(self.work / f"trained-{_joined(operators.plan)}.safetensors")
        trained = distill_session(
            self._session, operators, self._text, training=training, out=out, progress=self._progress
        )
        return trained, out.of(trained.digest)

    def _capture(self, needed: tuple[int, ...] | None) -> str:
        """Capture the hidden states that are needed: all, unless the request says which."""
        recovery = self._recovery
        self._progress.enter("capture")
        self.store = recovery.store or str(self.work / "store")
        layers = needed if recovery.storage.layers is None else recovery.storage.layers
        storage = Storage(layers=layers, store_dtype=recovery.storage.store_dtype)
        if self.shared is None:
            capture_session(self._session, self._text, self.store, storage, progress=self._progress)
        else:
            capture_shared(
                self._session, self._text, self.store, storage, self.shared, progress=self._progress
            )
        return self.store

    def _file(self, plan: PruningPlan) -> NamedByRequest:
        # Another request may come to the same spans, which only a search shows.
        method = self._recovery.method
        parts = (
            method.operator or AUTO,
            method.features if method.features != "hidden" else "",
            method.token_weights if method.token_weights != UNIFORM else "",
        )
        name = "-".join(part for part in parts if part)
        return NamedByRequest(self.work / f"{name}-{_joined(plan)}.safetensors")


def _joined(plan: PruningPlan) -> str:
    return "_".join(f"{span.start}-{span.stop}" for span in plan.spans)
