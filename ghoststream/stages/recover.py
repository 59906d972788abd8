"""Recover: choose layers, fit operators, train them if asked to, export, measure; each step goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.hub import MODEL
from ghoststream.errors import MismatchError, RequestError
from ghoststream.evaluation import EvaluationReport
from ghoststream.files import StagingFolder, differences, disk_errors, require_path
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Method, Recovery, Resume, Search, Text, TextLike, Training
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recovery import ExportReport
from ghoststream.recovery.forms import WriteRequest, find_form
from ghoststream.recovery.notes import CardNotes
from ghoststream.recovery.training import told_training, training_of
from ghoststream.spans import PruningPlan
from ghoststream.stages.measuring.evaluate import evaluate_session
from ghoststream.stages.run_estimate import expected
from ghoststream.stages.run_record import NAME, RecordedProgress, recorded, work_folder
from ghoststream.stages.session import ModelSession
from ghoststream.stages.sharing import on_first_device, scratch_beside
from ghoststream.stages.steps import Steps


@dataclass(frozen=True, slots=True, repr=False)
class RecoveryReport:
    """What a recovery did and where everything is.

    Attributes:
        name: Name of the job.
        model: What the user called the model.
        export: Sizes before and after.
        operators: The operators, with residuals in and out of sample in their diagnostics.
        chosen_by: The criterion, or ``"given"``.
        store: The activation store; None where nothing was captured.
        operators_file: The operators file.
        evaluation: Figures of the base and the recovered model, if they were asked for.
    """

    name: str
    model: str
    export: ExportReport
    operators: OperatorSet
    chosen_by: str
    store: str | None
    operators_file: Path
    evaluation: EvaluationReport | None = None

    @property
    def plan(self) -> PruningPlan:
        """The removed layers."""
        return self.operators.plan

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "name": self.name,
            "model": self.model,
            "plan": self.plan.to_json(),
            "chosen_by": self.chosen_by,
            "operator": self.operators.kind,
            "trained": training_of(self.operators.metadata.get("recipe")),
            "diagnostics": self.operators.diagnostics,
            "warnings": list(self.operators.warnings),
            "export": self.export.to_json(),
            "store": self.store,
            "operators_file": str(self.operators_file),
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
        }

    def __repr__(self) -> str:
        """What a notebook shows."""
        return self.to_text()

    def to_text(self) -> str:
        """Return the report as lines for a reader."""
        sizes = self.export
        lines = [
            (
                f"removed {self.plan} ({self.plan.n_removed} of {self.plan.n_layers} layers, chosen: "
                f"{self.chosen_by})"
            ),
            f"  parameters  {sizes.parameters_before:,} -> {sizes.parameters_after:,}",
            f"  bytes       {sizes.bytes_before:,} -> {sizes.bytes_after:,}",
        ]
        for one in self.operators.boundaries:
            fit = one.diagnostics.get("fitted") or one.diagnostics
            inside, outside = (
                fit.get(key) for key in ("relative_residual", "relative_residual_out_of_sample")
            )
            lines.append(
                f"  {one.span}  {one.form}, {one.features}: relative residual {_figure(inside)} in sample, "
                f"{_figure(outside)} out of sample"
            )
        lines += self._on_training()
        lines += [f"  warning: {warning}" for warning in self.operators.warnings]
        lines += [
            f"  checkpoint  {sizes.out}",
            f"  operators   {self.operators_file}",
        ]
        lines += [f"  store       {self.store}"] if self.store is not None else []
        if self.evaluation is not None:
            rows = self.evaluation.rows
            lines += [
                f"  perplexity  {row.perplexity:.2f} +- {row.standard_error:.3f} (loss)  {row.model}"
                for row in rows
            ]
        return "\n".join(lines)

    def _on_training(self) -> list[str]:
        recipe = self.operators.metadata.get("recipe")
        if training_of(recipe) is None:
            return []
        figures = self.operators.operators[0].diagnostics
        before, after = figures["held_out_divergence_before"], figures["held_out_divergence"]
        return [
            f"  trained     {told_training(recipe, figures)}",
            f"  divergence  {before:.4g} -> {after:.4g} nats a token from the base, held out",
        ]


def recover(
    model: str | Path,
    *,
    remove: int | str | Path | PruningPlan,
    calibration: TextLike,
    out: str | Path,
    search: Search | None = None,
    method: Method | None = None,
    distill: Training | None = None,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> RecoveryReport:
    """Remove layers from a model, repair the gaps in closed form, and write a checkpoint that loads.

    By default candidates are repaired and measured on held-out windows of the text, and so are ways to
    repair: passes over the model, and no store. A criterion that reads hidden states captures them first; an
    operator that is named is then fitted from the same store. The paper's own method is the criterion
    ``streamline-published`` with the operator ``ghost``: one pass.

    This is :func:`run` of a :class:`~ghoststream.options.Recovery`, which has more options, such as where a
    store goes.

    Args:
        model: Local folder or hub id.
        remove: How many layers to remove, chosen by ``search.criterion``; or which: a plan, its file, or
            spans such as ``13:19``. Then only the hidden states at its boundaries are captured.
        calibration: Text to calibrate on, or its specification, or those of several.
        out: Folder of the recovered checkpoint. Everything else is kept in ``<out>.work``.
        search: How layers are chosen, and what is held out.
        method: How boundaries are repaired.
        distill: How operators, and norms behind the first span, are trained after they were fitted
            (:func:`ghoststream.distill`); nothing is trained if ``None``.
        compute: How the model is opened and run. Several devices, such as ``cuda:0,cuda:1``, take shares of
            every pass over the model, in a process each; no bit depends on their number. Training is done by
            the first of them.
        progress: Who is told how far it is.

    Raises:
        RequestError: If too many layers are to go, or an option is given that would not be used.
        OutputExistsError: If ``out`` holds something else.
        GhoststreamError: What the steps raise.

    Memory: the largest of what its steps state.
    """
    require_path(model, MODEL)
    request = {
        "model": str(model),
        "remove": str(remove) if isinstance(remove, Path) else remove,
        "calibration": Text.of(calibration),
        "search": search or Search(),
        "method": method or Method(),
        "distill": distill,
        "compute": compute or Compute(),
    }
    return run(Recovery.make(request), out, progress=progress)


def run(
    recovery: Recovery,
    out: str | Path,
    *,
    resume: Resume = "auto",
    measure: bool = False,
    progress: Progress | None = None,
) -> RecoveryReport:
    """Do what a :class:`~ghoststream.options.Recovery` says: what :func:`recover` and pipeline files come to.

    The model is opened, fingerprinted and its text tokenised once. Plan, operators, store and figures are
    kept in ``<out>.work``, so that the same call continues after an interruption and takes what is finished
    as it is. ``run.json`` there says how far it is (:mod:`ghoststream.stages.run_record`).

    Args:
        recovery: What to do.
        out: Folder of the recovered checkpoint.
        resume: Whether an earlier attempt is gone on with: if there is one, in any case, or not at all.
        measure: Whether the machine is measured for two seconds first, so that the record has times that
            were expected beside those that were taken.
        progress: Who is told how far it is.

    Raises:
        RequestError: If no model is named, an option is given that would not be used, or there is no earlier
            attempt, or one, or one of another request, against ``resume``.
        OutputExistsError: If ``out`` holds something else.
        BusyError: If another process is writing it.
        GhoststreamError: What the steps raise.

    Memory: the largest of what its steps state.
    """
    progress = progress or SilentProgress()
    if recovery.model is None:
        msg = f"{recovery.name} names no model; give one with --model, or as `model` in the file"
        raise RequestError(msg)
    require_path(out, "the place of the result (out)")
    out = Path(out) if Path(out).name else Path(out).resolve()
    _require_resumable(out, resume)
    with recorded(recovery.name, work_folder(out) / NAME, progress) as watched:
        return _run(recovery, recovery.model, out, watched, resume=resume, measure=measure)


def _require_resumable(out: Path, resume: Resume) -> None:
    begun = (work_folder(out) / NAME).is_file()
    if resume == "required" and not begun:
        msg = f"there is no earlier attempt at {out} to go on with; leave --resume required out to begin one"
        raise RequestError(msg)
    if resume == "never" and begun:
        msg = (
            f"{work_folder(out)} holds an earlier attempt at {out}, which --resume never forbids to go on "
            "with; move it away, or choose another place"
        )
        raise RequestError(msg)


def _compared(
    earlier: dict[str, Any] | None, asked: dict[str, Any], out: Path, resume: Resume, progress: Progress
) -> dict[str, Any]:
    """Return what is asked for; what an earlier attempt was asked for must be the same, or a line says so."""
    changed = differences(earlier, asked) if earlier else []
    if changed:
        said = f"the earlier attempt at {out} is of another request ({'; '.join(changed)})"
        if resume == "required":
            msg = f"{said}; give that request again, or leave --resume required out to begin this one"
            raise MismatchError(msg)
        progress.log(said)
    return asked


def _run(
    recovery: Recovery,
    model: str,
    out: Path,
    progress: RecordedProgress,
    *,
    resume: Resume,
    measure: bool,
) -> RecoveryReport:
    compute = scratch_beside(on_first_device(recovery.compute), out, recovery.reduction.scheduler)
    session = ModelSession(model, compute)
    steps = Steps(session, recovery, out, progress)
    place = StagingFolder(out)
    with place.lock:
        # Looked at again: another process may have written it before the lock.
        steps.check_place()
        place.work.require_own()
        steps.prepare()
        with disk_errors(steps.work):
            steps.work.mkdir(parents=True, exist_ok=True)
        record, is_finished = progress.record, out.is_dir() and any(out.iterdir())
        record.request = _compared(record.request, steps.request, out, resume, progress)
        if not is_finished or recovery.evaluate is not None or record.attempts == 1:
            # Otherwise there is nothing to do, and nothing is changed.
            record.command, record.estimate = expected(
                session, recovery, out, measure=measure, progress=progress
            )
            progress.begin()
        selection = steps.way.given or steps.choose()
        operators, file = steps.train(*steps.fit(selection))
        progress.enter("export")
        exported = find_form(recovery.form).write(
            WriteRequest(
                skeleton=session.skeleton,
                operators=operators,
                out=out,
                fingerprint=session.fingerprint,
                notes=CardNotes.of(recovery, selection, is_given=steps.way.given is not None),
                lock=place.lock,
                progress=progress,
                gguf_type=recovery.gguf_type,
            )
        )
        if recovery.evaluate is not None:
            progress.enter("evaluate")
        evaluation = _evaluate(session, recovery, out, steps, progress)
    chosen_by = selection.criterion if steps.way.given is None else "given"
    return RecoveryReport(
        recovery.name, session.name, exported, operators, chosen_by, steps.store, file, evaluation
    )


def _evaluate(
    session: ModelSession, recovery: Recovery, out: Path, steps: Steps, progress: Progress
) -> EvaluationReport | None:
    if recovery.evaluate is None:
        return None
    text, file = recovery.evaluate.to_evaluate(), steps.work / "evaluation.json"
    return evaluate_session(session, [out], text, out=file, progress=progress, shared=steps.shared)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else "unknown"
