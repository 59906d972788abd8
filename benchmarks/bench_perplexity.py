"""Perplexity of pruned and repaired models: all spans and operators in one capture and one evaluation pass.

    python benchmarks/bench_perplexity.py MODEL --calibration SPEC --text SPEC --spans 13:19 10:19 --remove 9

Prints a Markdown table and writes JSON. Models are lanes of one pass: their number costs no further read of
the weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from markdown_tables import markdown_table

import ghoststream as gs

REPAIRS = {
    "pruned": gs.Method(operator="none"),
    "LinearPatch-diagonal": gs.Method(operator="linear-patch-diagonal"),
    "ghost (paper)": gs.Method(operator="ghost"),
    "ghost, drop_sinks": gs.Method(operator="ghost", token_weights="drop_sinks"),
}
CRITERION = "streamline-published"
"""Chooses where ``--remove`` gives a number: as the paper's published code does."""


def main() -> None:
    """Capture, fit, evaluate, print."""
    options = _options()
    work = options.work or Path(tempfile.mkdtemp(prefix="ghoststream-bench-"))
    store = work / "store"
    calibration = gs.Text(spec=options.calibration, sequences=options.fit_sequences, length=options.length)
    gs.capture(options.model, calibration=calibration, store=store)
    plans = dict.fromkeys(options.spans, "given") | chosen_plans(store, options.remove)
    files, rows = fit_all(store, plans, work)
    text = gs.Text(spec=options.text, length=options.length, sequences=options.sequences)
    report = gs.evaluate([options.model, *files], text=text)
    dense, *measured = report.rows
    for row, found in zip(rows, measured, strict=True):
        row |= {"perplexity": found.perplexity, "loss": found.loss, "standard_error": found.standard_error}
    options.json.write_text(json.dumps({"dense": dense.to_json(), "cells": rows}, indent=2))
    print(f"dense {dense.perplexity:.1f} ({dense.tokens} tokens)\n")
    lines = [
        (plan, by, *(f"{row['perplexity']:.1f}" for row in rows if row["plan"] == plan))
        for plan, by in plans.items()
    ]
    print(markdown_table(("removed", "chosen by", *REPAIRS), lines))


def chosen_plans(store: Path, numbers: list[int]) -> dict[str, str]:
    """Return the spans that the published criterion takes for some numbers of layers, and its name."""
    source, search = gs.Source(store=str(store)), gs.Search(criterion=CRITERION)
    found = {}
    for number in numbers:
        plan = gs.select(number, source, search=search).plan
        found[plan.text] = f"{CRITERION} {number}"
    return found


def fit_all(store: Path, plans: dict[str, str], work: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Fit every repair at every plan; return the operator files and the JSON data of each model."""
    files, rows = [], []
    for plan, by in plans.items():
        for name, method in REPAIRS.items():
            file = work / f"{plan}-{name}.safetensors".replace(" ", "_").replace(":", "-")
            operators = gs.fit(plan, gs.Source(store=str(store)), out=file, method=method)
            files.append(file)
            rows.append(
                {"plan": plan, "chosen_by": by, "operator": name, "diagnostics": operators.diagnostics}
            )
    return files, rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--spans", nargs="*", default=[])
    parser.add_argument(
        "--remove", type=int, nargs="*", default=[], help=f"numbers of layers for {CRITERION} to choose"
    )
    parser.add_argument("--fit-sequences", type=int, default=96)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=Path("bench_perplexity.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
