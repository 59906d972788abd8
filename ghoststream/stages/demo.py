"""The demo: a recovery by the defaults beside the published method, on a model and a text at hand."""

from __future__ import annotations

import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghoststream.errors import CheckpointError, MismatchError, OutputExistsError
from ghoststream.evaluation import EvaluationRow
from ghoststream.options import Compute, Dtype, Method, Recovery, Search, Source, Text
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stages.demo_model import cache_folder, demo_model
from ghoststream.stages.export import export
from ghoststream.stages.fit import fit
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.recover import RecoveryReport, run

REMOVE = 6
SEQUENCES, LENGTH = 24, 256
MAX_SPANS, HELD_OUT, FOLDS = 1, 4, 2
REPORTED_SEQUENCES = 8
TEXT = "python-docs"
DTYPE: Dtype = "float32"
"""Compute type: processors without instructions for bfloat16 take three times as long in it."""
PUBLISHED = "streamline-published", "ghost"
PROMPT = "A dictionary in Python is a mapping from keys to values. To look up a value,"
NEW_TOKENS = 32
COMMANDS = (
    "ghoststream estimate MODEL --remove 8",
    "ghoststream recover MODEL --remove 8 --calibration file:TEXT.txt --out recovered/",
    "ghoststream evaluate MODEL recovered/ --text file:OTHER.txt",
)
DENSE, PRUNED, METHOD, RECOVERED = "dense", "pruned", "published", "recovered"


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What the demo did and found.

    Attributes:
        recovery: The recovery by the defaults.
        published: The recovery by the published method.
        rows: Perplexities on held-out text, by what was measured; the dense model first.
        continuations: Greedy continuations of ``PROMPT``, by what made them.
        model: Folder of the dense model.
    """

    recovery: RecoveryReport
    published: RecoveryReport
    rows: dict[str, EvaluationRow]
    continuations: dict[str, str]
    model: Path

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "model": str(self.model),
            "recovery": self.recovery.to_json(),
            "published": self.published.to_json(),
            "perplexities": [{"what": what, **row.to_json()} for what, row in self.rows.items()],
            "prompt": PROMPT,
            "continuations": dict(self.continuations),
        }

    def to_text(self) -> str:
        """Return the report as lines for a reader."""
        criterion, operator = PUBLISHED
        width = max(map(len, self.rows))
        return "\n".join(
            [
                "",
                (
                    f"{REMOVE} of {self.recovery.plan.n_layers} layers are removed. Two ways to do that are "
                    "compared:"
                ),
                f"  {METHOD:<{width}}  layers by {criterion}, repaired by {operator}",
                (
                    f"  {RECOVERED:<{width}}  the defaults: candidates are repaired and run, and the best is "
                    "kept"
                ),
                "",
                (
                    f"Perplexity on {self.rows[DENSE].tokens:,} held-out tokens of Python's documentation, "
                    "lower is better"
                ),
                "(in brackets the loss above the dense model's, with its standard error):",
                *(f"  {what:<{width}}  {self._figures(what)}  {self._what(what)}" for what in self.rows),
                "",
                f"Greedy continuations of {PROMPT!r}:",
                *(f"  {what:<{width}}  {text}" for what, text in self.continuations.items()),
                "",
                f"The dense model is SmolLM2-135M-Instruct, dequantised from Q4_1: {self.model}",
                f"The recovered one is a checkpoint like any other: {self.recovery.export.out}",
                "",
                "Run next, with a model and texts of your own:",
                *(f"  {command}" for command in COMMANDS),
            ]
        )

    def _figures(self, what: str) -> str:
        row = self.rows[what]
        if what == DENSE:
            return f"{row.perplexity:7.2f} {'':18}"
        gap, error = _gap(row, self.rows[DENSE])
        return f"{row.perplexity:7.2f} ({gap:+.3f} +- {error:.3f})"

    def _what(self, what: str) -> str:
        features = "; ".join(one.features for one in self.recovery.operators.boundaries)
        return {
            DENSE: "all layers",
            PRUNED: f"without {self.published.plan}, not repaired",
            METHOD: f"without {self.published.plan}, repaired by {PUBLISHED[1]}",
            RECOVERED: f"without {self.recovery.plan}, repaired by a map of {features}",
        }[what]


def demo(
    *, workdir: Path | None = None, sequences: int = SEQUENCES, progress: Progress | None = None
) -> DemoReport:
    """Remove 6 of 30 layers of SmolLM2-135M-Instruct by default and by the published method, and compare.

    Calibrated and measured on the documentation that Python ships, split by topic. The search is a small one:
    few windows, and plans of one span. Run again, the demo continues what was interrupted and repeats only
    the figures.

    Args:
        workdir: Where everything is written; a folder in the user's cache if ``None``, where results of
            another request or version give way.
        sequences: Windows of calibration text.
        progress: Who is told how far it is.

    Raises:
        InputNotFoundError: If the package with the model is not installed.
        MismatchError, OutputExistsError: If ``workdir`` holds results of another request.
        GhoststreamError: What the stages raise.

    Memory: the models of the continuations, about 0.3 GB each, one at a time; the rest is streamed.
    """
    tell = progress or SilentProgress()
    root = workdir or cache_folder() / "demo"
    tell.log("the model: SmolLM2-135M-Instruct, dequantised from Q4_1 to bfloat16")
    model = demo_model(workdir)
    try:
        return _run(model, root, sequences, tell)
    except (MismatchError, OutputExistsError):
        if workdir is not None:
            raise
        tell.log(f"{root} holds what another version of ghoststream made: it is made again")
        shutil.rmtree(root)
        return _run(model, root, sequences, tell)


def _run(model: Path, root: Path, sequences: int, tell: Progress) -> DemoReport:
    folders = {DENSE: model, **{name: root / name for name in (PRUNED, METHOD, RECOVERED)}}
    store = str(root / "store")
    criterion, operator = PUBLISHED
    compute = Compute(dtype=DTYPE)
    calibration = Text(spec=TEXT, sequences=sequences, length=LENGTH)
    asked = {"model": str(model), "remove": REMOVE, "calibration": calibration, "compute": compute}
    tell.log(f"the published method: criterion {criterion}, operator {operator}")
    choice = {"search": Search(criterion=criterion), "method": Method(operator=operator)}
    published = run(Recovery.make({**asked, **choice, "store": store}), folders[METHOD], progress=tell)
    nothing, source = Method(operator="none"), Source(store=store)
    unrepaired = fit(published.plan, source, method=nothing, out=root / "none.safetensors", progress=tell)
    export(model, unrepaired, folders[PRUNED], progress=tell)
    tell.log("the defaults: candidates are repaired and measured")
    search = Search(max_spans=MAX_SPANS, held_out=HELD_OUT, folds=FOLDS)
    recovery = run(Recovery.make({**asked, "search": search}), folders[RECOVERED], progress=tell)
    report = evaluate(
        list(folders.values()),
        text=Text(spec=TEXT, sequences=REPORTED_SEQUENCES, length=LENGTH),
        compute=compute,
        out=root / "perplexities.json",
        progress=tell,
    )
    rows = dict(zip(folders, report.rows, strict=True))
    tell.log("loading the checkpoints as any other")
    return DemoReport(
        recovery, published, rows, {what: _continuation(folder) for what, folder in folders.items()}, model
    )


def _gap(row: EvaluationRow, dense: EvaluationRow) -> tuple[float, float]:
    """Return the mean loss above the dense model's over windows, and its standard error.

    Windows are paired.
    """
    mine, theirs = row.losses.sequence_losses, dense.losses.sequence_losses
    gaps = [a - b for a, b in zip(mine, theirs, strict=True)]
    return statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def _continuation(folder: Path) -> str:
    from transformers import AutoTokenizer

    model = _load_strictly(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def _load_strictly(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        msg = f"{folder} does not load strictly: {problems}; export it again"
        raise CheckpointError(msg)
    return model.eval()
