"""Recover: choose layers, fit operators and export in one call, each step of which continues where it was stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ghoststream.errors import OutputExistsError, RequestError
from ghoststream.files import differences, disk_errors
from ghoststream.operators import OperatorOptions, OperatorSet
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos
from ghoststream.recovery import ExportReport, load_recovered
from ghoststream.recovery.provenance import PROVENANCE_NAME
from ghoststream.selection import make_criterion
from ghoststream.spans import PruningPlan
from ghoststream.stages.export import export
from ghoststream.stages.recovery_flow import CalibrationRequest, ChoiceRequest, RecoveryFlow, RepairRequest
from ghoststream.stages.repair.auto import AUTO
from ghoststream.stages.searching.search import SEARCH_CRITERIA
from ghoststream.stages.select import read_plan
from ghoststream.stages.session import ComputeRequest, ModelOptions, ModelSession
from ghoststream.statistics import UNIFORM


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What a recovery did and where everything is.

    Attributes:
        model: What the user called the model.
        export: Sizes before and after.
        operators: The operators, with residuals in and out of sample in their diagnostics.
        chosen_by: The selection criterion, or ``"given"``.
        store: The activation store; None where operators were fitted in passes over the model.
        operators_file: The operator file.
    """

    model: str
    export: ExportReport
    operators: OperatorSet
    chosen_by: str
    store: str | None
    operators_file: Path

    @property
    def plan(self) -> PruningPlan:
        """The removed layers."""
        return self.operators.plan

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "model": self.model,
            "plan": self.plan.to_json(),
            "chosen_by": self.chosen_by,
            "operator": self.operators.kind,
            "diagnostics": self.operators.diagnostics,
            "warnings": list(self.operators.warnings),
            "export": self.export.to_json(),
            "store": self.store,
            "operators_file": str(self.operators_file),
        }

    def to_text(self) -> str:
        """Return the report as lines for a reader."""
        sizes = self.export
        lines = [
            f"removed {self.plan} ({self.plan.n_removed} of {self.plan.n_layers} layers, chosen: {self.chosen_by})",
            f"  parameters  {sizes.parameters_before:,} -> {sizes.parameters_after:,}",
            f"  bytes       {sizes.bytes_before:,} -> {sizes.bytes_after:,}",
        ]
        for span, diagnostics in self.operators.diagnostics.items():
            inside, outside = (
                diagnostics.get(key) for key in ("relative_residual", "relative_residual_out_of_sample")
            )
            lines.append(
                f"  {span}  relative residual {_figure(inside)} in sample, {_figure(outside)} out of sample"
            )
        lines += [f"  warning: {warning}" for warning in self.operators.warnings]
        lines += [
            f"  checkpoint  {sizes.out}",
            f"  operators   {self.operators_file}",
        ]
        lines += [f"  store       {self.store}"] if self.store is not None else []
        return "\n".join(lines)


def recover(
    model: str | Path,
    *,
    remove: int | None = None,
    plan: PruningPlan | str | Path | None = None,
    calibration: str,
    out: str | Path,
    sequences: int = 128,
    length: int = 512,
    criterion: str = "measured",
    max_spans: int | None = None,
    held_out: int | None = None,
    operator: str = AUTO,
    options: OperatorOptions | None = None,
    weights: str = UNIFORM,
    store: str | Path | None = None,
    scheduler: Any = None,
    store_dtype: str | None = None,
    pack: bool = True,
    bos: Bos = "auto",
    progress: Progress | None = None,
    **compute: Unpack[ComputeRequest],
) -> RecoveryReport:
    """Remove layers from a model, repair the gaps in closed form, and write a checkpoint that loads.

    By default candidates are repaired and measured on held-out windows of the text (:func:`ghoststream.search`), and so are
    ways to repair (:func:`ghoststream.fit`): passes over the model, and no store. A criterion that reads hidden states
    captures them first; an operator that is named is then solved from the same store. The paper's published method is
    ``criterion`` ``streamline-published`` with ``operator`` ``ghost``: one pass.

    Everything but the checkpoint is kept in ``<out>.work`` (the store unless ``store`` names another place, the
    plan, the operators), so that the same call continues after an interruption.

    Args:
        model: Local folder or hub id.
        remove: How many layers to remove, chosen by ``criterion``; or give ``plan``.
        plan: Layers to remove: a plan, its file, or spans such as ``13:19``. Only the hidden states at its
            boundaries are then captured.
        calibration: Text specification.
        out: Folder of the recovered checkpoint.
        sequences: Number of windows.
        length: Tokens of a window.
        criterion: Selection criterion: of :func:`ghoststream.search`, or of :func:`ghoststream.select`.
        max_spans: For the criterion ``measured``, see :func:`ghoststream.search`.
        held_out: How many of the windows, the last ones, are measured on where something is measured; a quarter if ``None``.
        operator: Operator family, or ``auto``.
        options: Options of the operator; ``auto`` has its own.
        weights: Token weights of the fit, see :func:`ghoststream.solve`; ``auto`` has its own.
        store: Path or URL of the store, where one is made.
        scheduler: Dask scheduler address or client for the reductions over it.
        store_dtype, pack, bos: See :func:`ghoststream.capture`.
        progress: Who is told how far it is.
        **compute: See :class:`~ghoststream.stages.session.ComputeRequest`.

    Raises:
        RequestError: If neither or both of ``remove`` and ``plan`` are given, or too many layers are to go.
        OutputExistsError: If ``out`` holds something else.
        GhoststreamError: What the stages raise.

    Memory: the largest of what its stages state.
    """
    out = Path(out) if Path(out).name else Path(out).resolve()
    work = out.with_name(f"{out.name}.work")
    repair = RepairRequest(operator, options or OperatorOptions(), weights)
    text = CalibrationRequest(calibration, sequences, length, pack, bos)
    session = ModelSession(model, ModelOptions(**compute))
    choice = ChoiceRequest(criterion, max_spans, held_out)
    given = _check_request(session.skeleton.n_layers, remove, plan, choice)
    n_removed = int(remove or 0) if given is None else given.n_removed
    _check_output(out, session.fingerprint["digest"], operator, n_removed, given)
    in_passes = repair.check(session, given, criterion)
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    flow = RecoveryFlow(
        model,
        session,
        work,
        text,
        choice,
        repair,
        compute,
        store,
        scheduler,
        store_dtype,
        progress or SilentProgress(),
    )
    chosen, source = (given, plan) if given is not None else flow.choose(n_removed)
    operators, file = flow.fit(chosen, source) if in_passes else flow.solve(chosen)
    exported = export(session.root, operators, out, progress=flow.progress)
    return RecoveryReport(
        session.name,
        exported,
        operators,
        criterion if given is None else "given",
        flow.captured,
        file,
    )


def _check_request(
    n_layers: int, remove: int | None, plan: PruningPlan | str | Path | None, choice: ChoiceRequest
) -> PruningPlan | None:
    if (remove is None) == (plan is None):
        msg = "say either how many layers to remove or which plan to follow, and not both"
        raise RequestError(msg)
    if remove is not None and not 1 <= remove < n_layers:
        msg = f"cannot remove {remove} of {n_layers} layers; at least one must go and one must survive"
        raise RequestError(msg)
    if choice.max_spans is not None and (plan is not None or choice.criterion != "measured"):
        msg = "the number of spans is a choice of the criterion measured; leave it out"
        raise RequestError(msg)
    if remove is not None and choice.criterion not in SEARCH_CRITERIA:
        make_criterion(choice.criterion).check(n_layers, remove)
    return None if plan is None else read_plan(plan, n_layers)


def _check_output(out: Path, base: str, operator: str, n_removed: int, plan: PruningPlan | None) -> None:
    """Find what can be found before the pass that would make the export fail after it; export checks the rest."""
    if out.exists() and not out.is_dir():
        msg = f"{out} is a file, a folder was to be made there; choose another place"
        raise OutputExistsError(msg)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / PROVENANCE_NAME).is_file():
        msg = f"{out} is not empty; choose another folder, or move what is there away"
        raise OutputExistsError(msg)
    found = load_recovered(out)
    if found is None:
        return
    asked = {"base": base, "operator": operator, "layers removed": n_removed}
    there = {
        "base": found.base.get("digest"),
        "operator": found.kind,
        "layers removed": found.plan.n_removed,
    }
    if plan is not None:
        asked["plan"], there["plan"] = plan.to_json(), found.plan.to_json()
    changed = differences(there, asked)
    if changed:
        msg = (
            f"{out} holds the recovered checkpoint of another request ({'; '.join(changed)});"
            " choose another folder, or move it away"
        )
        raise OutputExistsError(msg)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else "unknown"
