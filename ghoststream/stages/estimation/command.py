"""The command that does what was estimated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghoststream.option_types import Options, flag
from ghoststream.options import Exploration, Training
from ghoststream.spans import PruningPlan
from ghoststream.stages.distillation.schedule import Schedule
from ghoststream.stages.estimation.job import Job

UNREAD = "ids:text-is-not-read.npy"
"""Specification of a text that nobody has named yet."""

_TIMES = {"epochs", "steps"}
"""How long is trained: epochs of a known text are steps."""

_TEXT = "file:calibration.txt"


def command_of(job: Job, model: str, out: Path | None) -> tuple[str, ...]:
    """Return the words of ``ghoststream recover`` with every option that was given.

    A text that was not named is written as ``file:calibration.txt``, a folder as ``recovered``. There are no
    words where only a pipeline file says it all: options of a training, or a text to measure the result on.

    Args:
        job: The recovery.
        model: What the model is called where it is run.
        out: Where the checkpoint goes, if that was said.
    """
    recovery, training = job.recovery, job.recovery.distill
    if recovery.evaluate is not None or (training is not None and set(training.given()) - _TIMES):
        return ()
    remove = recovery.remove.text if isinstance(recovery.remove, PruningPlan) else str(recovery.remove)
    words = ["ghoststream", "recover", model, "--remove", remove]
    text = recovery.calibration
    for spec in text.specs:
        words += ["--calibration", _TEXT if spec == UNREAD else spec]
    words += _words(text, without=("spec",))
    for group in (recovery.search, recovery.method, recovery.compute, recovery.storage, recovery.reduction):
        words += _words(group)
    if recovery.store is not None:
        words += ["--store", recovery.store]
    words += [] if training is None else _training(training, job.sequences)
    if recovery.form != "custom":
        words += ["--form", recovery.form]
    if recovery.gguf_type != "auto":
        words += ["--gguf-type", recovery.gguf_type]
    return (*words, "--out", str(out or "recovered"))


def _training(training: Training, n_sequences: int) -> list[str]:
    steps = Schedule.of(training, n_sequences).steps
    return ["--distill", *([str(steps)] if training.given() else [])]


def explore_command_of(job: Job, exploration: Exploration, model: str, out: Path | None) -> tuple[str, ...]:
    """Return the words of ``ghoststream explore``; arguments are those of :func:`command_of`."""
    recovery = job.recovery
    words = ["ghoststream", "explore", model]
    for spec in recovery.calibration.specs:
        words += ["--calibration", _TEXT if spec == UNREAD else spec]
    words += _words(recovery.calibration, without=("spec",))
    for group in (exploration, recovery.search, recovery.method, recovery.compute, recovery.reduction):
        words += _words(group)
    return (*words, "--out", str(out or "explored"))


def _words(group: Options, without: tuple[str, ...] = ()) -> list[str]:
    found: list[str] = []
    written = group.to_json()
    for name in group.given():
        if name not in without:
            found += _option(name, written[name])
    return found


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else f"--no-{name.replace('_', '-')}"]
    written = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return [flag(name), written]
