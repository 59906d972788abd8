"""The steps of a recovery: from passes over the model, or from a store of its hidden states."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghoststream.operators import OperatorSet, make_operator
from ghoststream.options import Method
from ghoststream.progress import Progress
from ghoststream.recipe import Bos
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.capturing.tap_store import BaseModel, wanted_taps
from ghoststream.stages.repair.auto import AUTO, require_no_options
from ghoststream.stages.repair.fit import fit
from ghoststream.stages.repair.methods import FitMethod
from ghoststream.stages.searching.search import SEARCH_CRITERIA, search
from ghoststream.stages.select import select
from ghoststream.stages.session import ComputeRequest, ModelSession
from ghoststream.stages.solve import solve
from ghoststream.stages.solve_request import asked_method
from ghoststream.statistics import UNIFORM, taps_of


@dataclass(frozen=True)
class CalibrationRequest:
    """The text; the fields are those of :func:`ghoststream.recover`."""

    calibration: str
    sequences: int
    length: int
    pack: bool
    bos: Bos


@dataclass(frozen=True)
class ChoiceRequest:
    """How layers and ways to repair are chosen; the fields are those of :func:`ghoststream.recover`."""

    criterion: str
    max_spans: int | None
    held_out: int | None


@dataclass(frozen=True)
class RepairRequest:
    """How boundaries are repaired; the fields are those of :func:`ghoststream.recover`."""

    operator: str
    options: Method
    weights: str

    @property
    def features(self) -> str:
        """Name of the features that the operator reads."""
        return make_operator(asked_method(self.operator, self.options, self.weights)).features

    @property
    def name(self) -> str:
        """Part of a file name."""
        parts = (
            self.operator,
            self.options.features if self.options.features != "hidden" else "",
            self.weights if self.weights != UNIFORM else "",
        )
        return "-".join(part for part in parts if part)

    def check(self, session: ModelSession, plan: PruningPlan | None, criterion: str) -> bool:
        """Find before any work that the operator cannot be had.

        Args:
            session: The model.
            plan: The plan, if it is known.
            criterion: What chooses it otherwise.

        Returns:
            Whether operators are fitted in passes over the model, and not from a store.

        Raises:
            RequestError: If options exclude one another.
            UnsupportedModelError: If the model does not allow the features.
        """
        if self.operator == AUTO:
            require_no_options(self.weights, self.options)
            return True
        spans = (Span(1, 2),) if plan is None else plan.spans
        base = BaseModel(session.root, trust_remote_code=session.options.trust_remote_code)
        wanted_taps(self.features, spans, base, intercept=self.options.intercept)
        if plan is not None or criterion not in SEARCH_CRITERIA:
            return False
        FitMethod(self.operator, self.options, self.weights)
        return True

    def needed_layers(self, plan: PruningPlan) -> tuple[int, ...]:
        """Return the hidden states that a fit from a store reads.

        Those before the layer before a boundary are among them where that layer is run again.
        """
        needed = {position for span in plan.spans for position in (span.start, span.stop)}
        if self.options.per_layer:
            needed |= {position for span in plan.spans for position in range(span.start, span.stop)}
        if taps_of(self.features):
            needed |= {span.start - 1 for span in plan.spans if span.start > 0}
        return tuple(sorted(needed))


@dataclass
class RecoveryFlow:
    """The steps of one recovery, in one folder.

    Attributes:
        model: What the user called the model.
        session: The same, opened.
        work: Folder of what is kept.
        text: The text.
        choice: How layers and ways to repair are chosen.
        repair: How boundaries are repaired.
        compute: How the model is run.
        store: Where a store is made; in ``work`` if ``None``.
        scheduler: Dask scheduler address or client for reductions.
        store_dtype: Dtype of stored states.
        progress: Who is told how far it is.
        captured: The store that was made.
    """

    model: str | Path
    session: ModelSession
    work: Path
    text: CalibrationRequest
    choice: ChoiceRequest
    repair: RepairRequest
    compute: ComputeRequest
    store: str | Path | None
    scheduler: Any
    store_dtype: str | None
    progress: Progress
    captured: str | None = None

    def choose(self, n_removed: int) -> tuple[PruningPlan, Path]:
        """Choose the layers; return the plan and its file."""
        criterion = self.choice.criterion
        out = self.work / f"plan-{criterion}-{n_removed}.json"
        if criterion in SEARCH_CRITERIA:
            plan = search(
                self.model,
                n_removed,
                criterion=criterion,
                max_spans=self.choice.max_spans,
                held_out=self.choice.held_out,
                operator=self.repair.operator,
                weights=self.repair.weights,
                options=self.repair.options,
                out=out,
                progress=self.progress,
                **asdict(self.text),
                **self.compute,
            ).plan
        else:
            self._capture(None)
            plan = select(
                str(self.captured),
                n_removed,
                criterion=criterion,
                out=out,
                model=self.session.root,
                trust_remote_code=self.session.options.trust_remote_code,
                scheduler=self.scheduler,
                progress=self.progress,
            ).plan
        self.progress.log(f"{criterion} removes {plan}")
        return plan, out

    def fit(self, plan: PruningPlan, source: PruningPlan | str | Path | None) -> tuple[OperatorSet, Path]:
        """Fit the operators in passes over the model; ``source`` may be a plan file that says how."""
        out = self._file(plan)
        operators = fit(
            self.model,
            plan if source is None else source,
            operator=self.repair.operator,
            weights=self.repair.weights,
            options=self.repair.options,
            held_out=self.choice.held_out,
            out=out,
            progress=self.progress,
            **asdict(self.text),
            **self.compute,
        )
        return operators, out

    def solve(self, plan: PruningPlan) -> tuple[OperatorSet, Path]:
        """Fit the operators from the store."""
        if self.captured is None:
            self._capture(self.repair.needed_layers(plan))
        out = self._file(plan)
        operators = solve(
            str(self.captured),
            plan,
            operator=self.repair.operator,
            options=self.repair.options,
            weights=self.repair.weights,
            out=out,
            model=self.session.root,
            trust_remote_code=self.session.options.trust_remote_code,
            device=self.session.options.device,
            scheduler=self.scheduler,
            progress=self.progress,
        )
        return operators, out

    def _capture(self, layers: tuple[int, ...] | None) -> None:
        self.captured = str(self.store) if self.store is not None else str(self.work / "store")
        capture(
            self.model,
            store=self.captured,
            layers=layers,
            store_dtype=self.store_dtype,
            progress=self.progress,
            **asdict(self.text),
            **self.compute,
        )

    def _file(self, plan: PruningPlan) -> Path:
        spans = "_".join(f"{span.start}-{span.stop}" for span in plan.spans)
        return self.work / f"{self.repair.name}-{spans}.safetensors"
