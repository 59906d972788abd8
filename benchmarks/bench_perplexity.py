"""Perplexity of pruned and repaired models, all spans and operators in one capture and one evaluation pass.

    python benchmarks/bench_perplexity.py MODEL --calibration SPEC --text SPEC --spans 13:19 10:19 [--remove 9]

Prints a Markdown table and writes JSON. Operators are lanes: the number of cells costs no further read of the weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import ghoststream as gs

OPERATORS: dict[str, dict[str, str]] = {
    "pruned": {"operator": "none"},
    "LinearPatch-diagonal": {"operator": "linear-patch-diagonal"},
    "ghost (paper)": {"operator": "ghost"},
    "ghost, drop_sinks": {"operator": "ghost", "weights": "drop_sinks"},
}


def main() -> None:
    """Parse the command line, capture, solve, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--spans", nargs="*", default=[])
    parser.add_argument(
        "--remove", type=int, nargs="*", default=[], help="numbers of layers for Streamline to choose"
    )
    parser.add_argument("--fit-sequences", type=int, default=96)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=Path("bench_perplexity.json"))
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="ghoststream-bench-"))
    store = work / "store"
    gs.capture(
        options.model,
        calibration=options.calibration,
        sequences=options.fit_sequences,
        length=options.length,
        store=store,
    )
    plans = dict.fromkeys(options.spans, "given")
    for number in options.remove:
        chosen = gs.select(store, number).plan
        plans[" ".join(f"{span.start}:{span.stop}" for span in chosen.spans)] = f"streamline {number}"
    files, cells = [], []
    for plan, by in plans.items():
        for name, keywords in OPERATORS.items():
            file = work / f"{plan}-{name}.safetensors".replace(" ", "_").replace(":", "-")
            operators = gs.solve(store, plan, out=file, **keywords)
            files.append(file)
            cells.append(
                {"plan": plan, "chosen_by": by, "operator": name, "diagnostics": operators.diagnostics}
            )
    report = gs.evaluate(
        [options.model, *files], text=options.text, length=options.length, sequences=options.sequences
    )
    dense, *rows = report.rows
    for cell, row in zip(cells, rows, strict=True):
        cell |= {"perplexity": row.perplexity, "loss": row.loss, "standard_error": row.standard_error}
    result = {"dense": dense.to_json(), "cells": cells}
    options.json.write_text(json.dumps(result, indent=2))
    print(f"dense {dense.perplexity:.1f} ({dense.tokens} tokens)\n")
    print(f"| removed | chosen by | {' | '.join(OPERATORS)} |\n|{' --- |' * (2 + len(OPERATORS))}")
    for plan, by in plans.items():
        figures = [f"{cell['perplexity']:.1f}" for cell in cells if cell["plan"] == plan]
        print(f"| {gs.PruningPlan.parse(999, plan)} | {by} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
