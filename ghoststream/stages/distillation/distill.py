"""Distillation: the operators of a plan trained towards the dense model's logits, out of core.

Off unless asked for.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ghoststream.errors import RequestError
from ghoststream.evaluation.objectives import default_loss_tokens
from ghoststream.files import disk_errors
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Text, TextLike, Training
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import library_versions
from ghoststream.recovery.job import require_prunable
from ghoststream.recovery.layout import require_operators_fit
from ghoststream.recovery.replacing import require_replaceable
from ghoststream.recovery.training import STAGE
from ghoststream.stages.distillation.descent import BETAS, SMALLEST_SCALE, Course
from ghoststream.stages.distillation.distilling import Distillation, DistillSettings, HeldOut
from ghoststream.stages.distillation.schedule import LENGTHS, Schedule
from ghoststream.stages.distillation.teacher import Teacher
from ghoststream.stages.lanes import first_needed, operator_lane
from ghoststream.stages.output import NamedByRequest, Output
from ghoststream.stages.session import ModelSession
from ghoststream.statistics.ranges import DEFAULT_FOLDS
from ghoststream.streaming.gradients import require_gradient_dtype
from ghoststream.text import TokenSet, recipe_of


def distill(
    model: str | Path,
    operators: OperatorSet | str | Path,
    *,
    calibration: TextLike,
    out: str | Path,
    training: Training | None = None,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> OperatorSet:
    """Train operators so that the repaired model's next-token distributions come near the dense model's.

    The loss is the divergence over the dense model's ``top`` largest logits (Ghosted Layers, arXiv
    2605.15491, appendix D). First come rounds of boosting, if they are asked for
    (:mod:`ghoststream.stages.distillation.boosting`). The optimiser behind them is Adam, with steps relative
    to each tensor that are halved where held-out windows do not gain
    (:class:`~ghoststream.stages.distillation.descent.Descent`). The best parameters on held-out windows are
    the result. With ``operators+norms``, where steps are taken, the weights of the norms behind
    the first span are trained too; every other weight is frozen. The dense model runs once, and its states in
    front of the first span and its largest logits are kept beside ``out`` until that is written; every step
    and every round is one pass forward and one backward over the layers behind the first span. Killed at any
    moment, the same request goes on behind the last one that was saved and ends with the same file.

    Args:
        model: Local folder or hub id.
        operators: What ``fit`` made, or the file that it wrote, on any features that can be exported.
        calibration: Text to calibrate on, or its specification, or those of several.
        out: Operator file (safetensors) to write.
        training: What is trained, for how long, and what is held out.
        compute: How the model is opened and run; ``micro_batch`` is by default a quarter of what a pass
            forward takes.
        progress: Who is told how far it is.

    Returns:
        The operators, with the trained norms among the weights that they replace. Their diagnostics have
        ``held_out_divergence``, ``held_out_loss`` and both ``..._before``; ``curve``, the held-out divergence
        after so many rounds, steps and tokens; ``best_step`` and ``best_rounds``; what each round of
        boosting found under ``boosts``; the divergence of every step under ``step_losses``; and
        the figures of the fit under ``fitted``. A warning says so where the held-out divergence did not fall.

    Raises:
        RequestError: If there is nothing to train, the numbers do not fit the text, or ``out`` is the file
            that is trained.
        UnsupportedModelError: If an operator is to be absorbed where the architecture does not allow it.
        MismatchError: If the operators are for another model.
        OutputExistsError: If ``out`` holds something else.
        BudgetError: If two layers and a micro-batch do not fit the memory given, or the disk has too little
            space.
        NumericsError: If a state or a gradient is not finite.
        GhoststreamError: What opening the model, the operators or the text raises.

    Memory: that of :class:`~ghoststream.stages.distillation.distilling.Distillation`. Disk beside ``out``:
    ``S T (C b + 8 top)`` bytes and four times what is trained.
    """
    if isinstance(operators, OperatorSet):
        given = operators
    else:
        _require_another(Path(out), Path(operators))
        given = OperatorSet.load(Path(operators))
    session = ModelSession(model, compute)
    return distill_session(
        session,
        given,
        Text.of(calibration).to_calibrate(),
        training=training or Training(),
        out=out,
        progress=progress or SilentProgress(),
    )


def _require_another(out: Path, operators: Path) -> None:
    with suppress(OSError):  # one of them is not there, or may not be looked at
        if out.samefile(operators):
            msg = f"--out is the file that is trained, {operators}; name another one"
            raise RequestError(msg)


def distill_session(
    session: ModelSession,
    operators: OperatorSet,
    text: Text,
    *,
    training: Training,
    out: str | Path | NamedByRequest,
    progress: Progress,
) -> OperatorSet:
    """Train operators of a model that is open; args, errors and memory as for :func:`distill`.

    Args:
        session: The model.
        operators: What is trained.
        text: The text, with the defaults of one that is calibrated on.
        training: How.
        out: Operator file to write.
        progress: Who is told how far it is.
    """
    _require_trainable(operators, session)
    session.expect(operators.metadata.get("base") or {}, "the operators were fitted")
    tokens = session.tokens(text, progress)
    settings = _settings(training, session, tokens)
    recipe = _recipe(session, operators, tokens, text, settings)
    output = Output(out, recipe, STAGE)
    with output.claimed(OperatorSet.load) as found:
        if found is not None:
            return found
        folder = output.work / output.short_digest
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        start = first_needed(operator_lane("repaired", operators, session.skeleton, None))
        teacher = Teacher(folder, session, start, settings.top)
        teacher.prepare(tokens, settings.micro_batch, progress)
        run = Distillation(session, tokens, operators, teacher, settings, folder / "training.safetensors")
        figures = _diagnostics(*run.run(progress))
        for warning in figures["warnings"]:
            progress.log(f"warning: {warning}")
        metadata = {
            "base": session.base(None, progress),
            "recipe": recipe,
            "recipe_digest": output.digest,
            "versions": library_versions(),
        }
        trained = run.trained(figures, metadata)
        trained.save(output.path)
    return trained


def _require_trainable(operators: OperatorSet, session: ModelSession) -> None:
    skeleton = session.skeleton
    require_gradient_dtype(skeleton.dtype)
    require_operators_fit(
        operators,
        skeleton,
        session.fingerprint,
    )
    require_prunable(skeleton, operators.plan)
    require_replaceable(operators, skeleton)
    if not operators.operators:
        msg = f"no boundary of {operators.plan} has an operator: there is nothing to train; fit some first"
        raise RequestError(msg)


def _settings(training: Training, session: ModelSession, tokens: TokenSet) -> DistillSettings:
    schedule = Schedule.of(training, tokens.n_sequences)
    micro_batch = session.compute.micro_batch or max(1, session.micro_batch(tokens.length) // 4)
    return DistillSettings(
        schedule.steps,
        schedule.batch,
        training.learning_rate,
        training.top,
        training.seed,
        schedule.n_train,
        min(micro_batch, schedule.batch) if schedule.steps else micro_batch,
        schedule.check,
        schedule.boost,
        # Rounds of boosting leave norms as they are.
        norms=training.train == "operators+norms" and schedule.steps > 0,
    )


def _recipe(
    session: ModelSession, operators: OperatorSet, tokens: TokenSet, text: Text, settings: DistillSettings
) -> dict[str, Any]:
    skeleton = session.skeleton
    return {
        "stage": STAGE,
        "training": {
            **asdict(settings),
            "optimizer": {"name": "adam", "betas": list(BETAS), "smallest_scale": SMALLEST_SCALE},
            "schedule": "cosine",
            "boosting": {"lengths": list(LENGTHS), "folds": DEFAULT_FOLDS},
        },
        "operators": operators.metadata.get("recipe"),
        "operators_digest": operators.content_digest(),
        "plan": operators.plan.to_json(),
        "model": session.fingerprint["digest"],
        "text": recipe_of(text, tokens).to_json(),
        "tokens": tokens.digest,
        **session.describe(),
        "loss_chunk_tokens": default_loss_tokens(skeleton.vocab_size, skeleton.unit_bytes),
    }


def _diagnostics(before: HeldOut, after: HeldOut, course: Course) -> dict[str, Any]:
    warnings = []
    if after.divergence >= before.divergence:
        warnings.append(
            "distillation did not help: on held-out windows the divergence went from "
            f"{before.divergence:.6g} to {after.divergence:.6g}; keep the operators that it began with, or "
            "train on more text"
        )
    return {
        "held_out_divergence_before": before.divergence,
        "held_out_divergence": after.divergence,
        "held_out_loss_before": before.loss,
        "held_out_loss": after.loss,
        "best_step": course.best.step,
        "curve": [asdict(check) for check in course.checks],
        "best_rounds": course.best.rounds,
        "boosts": list(course.boosts),
        "step_losses": list(course.losses),
        "warnings": warnings,
    }
