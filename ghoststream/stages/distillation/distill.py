"""Distillation: the operators of a plan trained towards the dense model's logits, out of core; off unless asked for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from ghoststream.errors import RequestError
from ghoststream.evaluation.objectives import default_loss_tokens
from ghoststream.files import bytes_digest, disk_errors, fsync_folder, json_digest, require_writable
from ghoststream.operators import OperatorSet
from ghoststream.options import dtype_name
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos, library_versions
from ghoststream.recovery.layout import require_operators_fit
from ghoststream.recovery.modeling_ghosted import KNOWN
from ghoststream.stages.distillation.distilling import (
    Distillation,
    DistillSettings,
    HeldOut,
    trained_boundaries,
)
from ghoststream.stages.distillation.teacher import Teacher
from ghoststream.stages.operators_file import clear_leftovers, existing_operators, output_lock, work_folder
from ghoststream.stages.session import ComputeRequest, ModelOptions, ModelSession, TextOptions
from ghoststream.streaming.gradients import require_gradient_dtype
from ghoststream.text import TokenSet

_MOST_RATE = 100.0


def distill(
    model: str | Path,
    operators: OperatorSet | str | Path,
    *,
    calibration: str,
    out: str | Path,
    sequences: int = 128,
    length: int = 512,
    held_out: int | None = None,
    steps: int | None = None,
    epochs: int = 1,
    batch: int = 8,
    learning_rate: float = 1e-3,
    top: int = 100,
    seed: int = 0,
    pack: bool = True,
    bos: Bos = "auto",
    progress: Progress | None = None,
    **compute: Unpack[ComputeRequest],
) -> OperatorSet:
    """Train operators so that the repaired model's next-token distributions come near the dense model's.

    The loss is the divergence over the dense model's ``top`` largest logits (Ghosted Layers, arXiv 2605.15491, appendix D);
    the optimiser is Adam; every other weight is frozen. The dense model runs once, and its states in front of the first span
    and its largest logits are kept beside ``out`` until that is written; every step is one pass forward and one
    backward over the layers behind the first span. Killed at any moment, the same request goes on behind the last step and
    ends with the same file.

    Args:
        model: Local folder or hub id.
        operators: What ``fit`` or ``solve`` made, or the file that it wrote: linear or diagonal, on the hidden state, the
            normed one, or both.
        calibration: Text specification; of a text with a standard split, the part to fit on.
        out: Operator file (safetensors) to write.
        sequences: Number of windows.
        length: Tokens of a window.
        held_out: How many windows, the last ones, are measured on before and after; a quarter if ``None``.
        steps: Steps of the optimiser; if ``None`` those of ``epochs``.
        epochs: How often every training window is seen.
        batch: Windows of a step.
        learning_rate: Of the first step; it falls to zero along half a cosine.
        top: How many logits of a token count.
        seed: Of the order of the windows.
        pack: Whether documents are joined before they are cut into windows.
        bos: When the beginning-of-sequence token is put in front.
        progress: Who is told how far it is.
        **compute: See :class:`~ghoststream.stages.session.ComputeRequest`; ``micro_batch`` is by default a quarter of what a
            pass forward takes.

    Returns:
        The operators. Their diagnostics have ``held_out_divergence``, ``held_out_loss`` and both ``..._before``, the
        divergence of every step under ``step_losses``, and the figures of the fit under ``fitted``; a warning says so where
        the held-out divergence did not fall.

    Raises:
        RequestError: If there is nothing to train, an operator is absorbed into a weight, or the numbers do not fit the text.
        MismatchError: If the operators are for another model.
        OutputExistsError: If ``out`` holds something else.
        BudgetError: If two layers and a micro-batch do not fit the memory given, or the disk has too little space.
        NumericsError: If a state or a gradient is not finite.
        GhoststreamError: What opening the model, the operators or the text raises.

    Memory: that of :class:`~ghoststream.stages.distillation.distilling.Distillation`. Disk beside ``out``: ``S T (C b + 8 top)`` bytes and
    three times the operators.
    """
    out = Path(out)
    session = ModelSession(model, ModelOptions(**compute))
    given = operators if isinstance(operators, OperatorSet) else OperatorSet.load(Path(operators))
    _require_trainable(given, session)
    text = TextOptions(calibration, sequences, length, pack, bos, part="fit")
    tokens = session.tokens(text)
    n_train = _train_sequences(tokens, held_out, batch)
    n_steps = epochs * -(-n_train // batch) if steps is None else steps
    if min(n_steps, top) < 1 or not 0.0 < learning_rate <= _MOST_RATE:
        msg = (
            f"{n_steps} steps over {top} logits at learning rate {learning_rate}: each must be above 0, and the rate at most"
            f" {_MOST_RATE:g}"
        )
        raise RequestError(msg)
    settings = DistillSettings(n_steps, batch, learning_rate, top, seed)
    wanted = session.options.micro_batch or max(1, session.memory(length).choose_micro_batch() // 4)
    micro_batch = min(wanted, batch)
    out = out.absolute()
    metadata = _metadata(session, given, tokens, text, n_train, settings, micro_batch)
    found = existing_operators(out, str(metadata["recipe_digest"]))
    if found is not None:
        clear_leftovers(out)
        return found
    require_writable(out)
    progress = progress or SilentProgress()
    work = work_folder(out)
    folder = work / str(metadata["recipe_digest"]).removeprefix("sha256:")[:16]
    with output_lock(out):
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        teacher = Teacher(folder, session, given.plan.spans[0].start, top)
        teacher.prepare(tokens, micro_batch, progress)
        training = Distillation(
            session,
            tokens,
            n_train,
            given,
            teacher,
            settings,
            micro_batch,
            folder / "training.safetensors",
        )
        figures = _diagnostics(*training.run(progress))
        for warning in figures["warnings"]:
            progress.log(f"warning: {warning}")
        boundaries = trained_boundaries(given, training.operators, figures)
        trained = OperatorSet(given.plan, given.kind, boundaries, given.hidden, metadata)
        trained.save(out, temporary=folder / "operators.safetensors")
        shutil.rmtree(work)
        fsync_folder(out.parent)
    return trained


def _require_trainable(operators: OperatorSet, session: ModelSession) -> None:
    skeleton = session.skeleton
    require_gradient_dtype(skeleton.dtype)
    require_operators_fit(
        operators,
        n_layers=skeleton.n_layers,
        hidden=skeleton.hidden_size,
        digest=session.fingerprint["digest"],
    )
    if not operators.operators:
        msg = f"no boundary of {operators.plan} has an operator: there is nothing to train; fit some first"
        raise RequestError(msg)
    other = [one for one in operators.operators if (one.form, one.features) not in KNOWN]
    if other:
        msg = (
            f"the operator of {other[0].span} ({other[0].form} on {other[0].features}) changes a weight of the model, which"
            " distillation leaves alone; fit operators on hidden, normed or hidden+normed features"
        )
        raise RequestError(msg)


def _train_sequences(tokens: TokenSet, held_out: int | None, batch: int) -> int:
    wanted = tokens.n_sequences // 4 if held_out is None else held_out
    n_train = tokens.n_sequences - wanted
    if wanted < 1 or batch < 1 or n_train < batch:
        msg = (
            f"{tokens.n_sequences} windows cannot be parted into {wanted} held-out ones and at least one batch of {batch} to"
            " train on; give more windows, or a smaller batch"
        )
        raise RequestError(msg)
    return n_train


def _metadata(
    session: ModelSession,
    operators: OperatorSet,
    tokens: TokenSet,
    text: TextOptions,
    n_train: int,
    settings: DistillSettings,
    micro_batch: int,
) -> dict[str, Any]:
    skeleton = session.skeleton
    recipe = {
        "distill": {**asdict(settings), "optimizer": "adam", "schedule": "cosine"},
        "operators": operators.metadata.get("recipe"),
        "operators_digest": _operators_digest(operators),
        "text": text.recipe().to_json(),
        "tokens_digest": tokens.digest,
        "train_sequences": n_train,
        "dtype": dtype_name(skeleton.dtype),
        "attention": skeleton.attention,
        "micro_batch": micro_batch,
        "loss_chunk_tokens": default_loss_tokens(skeleton.vocab_size, skeleton.unit_bytes),
    }
    made_of = {"recipe": recipe, "plan": operators.plan.to_json(), "model": session.fingerprint["digest"]}
    return {
        "base": session.fingerprint,
        "recipe": recipe,
        "recipe_digest": json_digest(made_of),
        "versions": library_versions(),
    }


def _operators_digest(operators: OperatorSet) -> str:
    arrays = {
        f"{one.name}.{part}": bytes_digest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        for one in operators.operators
        for part, array in (("weight", one.weight), ("bias", one.bias))
        if array is not None
    }
    return json_digest({"boundaries": [one.to_json() for one in operators.boundaries], "arrays": arrays})


def _diagnostics(before: HeldOut, after: HeldOut, losses: Sequence[float]) -> dict[str, Any]:
    warnings = []
    if after.divergence >= before.divergence:
        warnings.append(
            f"distillation did not help: on held-out windows the divergence went from {before.divergence:.6g} to"
            f" {after.divergence:.6g}; keep the operators that it began with, or train with another --lr"
        )
    return {
        "held_out_divergence_before": before.divergence,
        "held_out_divergence": after.divergence,
        "held_out_loss_before": before.loss,
        "held_out_loss": after.loss,
        "step_losses": list(losses),
        "warnings": warnings,
    }
