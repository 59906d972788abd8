"""What a race costs and finds beside an exhaustive search.

    python benchmarks/bench_search.py MODEL --calibration file:FIRST.jsonl --remove 9 --sequences 128

Each search runs in a process of its own, one after the other, on the same text. Its processor seconds, of all
threads, hold on a machine that does other work too. Then what each chose is repaired and measured on all
held-out windows of the calibration text, in one pass for both: differences are paired by windows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results_file import write_json

import ghoststream as gs
from ghoststream.progress import SilentProgress
from ghoststream.stages.choosing.by_text import mean_and_error
from ghoststream.stages.choosing.material import Division
from ghoststream.stages.choosing.measured import Candidate, measure_repairs
from ghoststream.stages.choosing.repair import Repair, labels
from ghoststream.stages.session import ModelSession

SEARCHES = ("race", "exhaustive")


def main() -> None:
    """Run the searches that have no plan yet, measure their plans together, print ratios, write JSON."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    spent = {name: _spent(name, options) for name in options.searches}
    found = _measured([options.work / f"{name}.json" for name in options.searches], options)
    base = found[0]
    rows: list[dict[str, Any]] = []
    for name, one in zip(options.searches, found, strict=True):
        mean, error = mean_and_error([own - other for own, other in zip(one.gaps, base.gaps, strict=True)])
        rows.append(
            {
                "search": name,
                "plan": str(one.plan),
                "repair": labels(one.repair.methods),
                "gap": one.gap,
                "less the first": mean,
                "standard error": error,
                **spent[name],
            }
        )
        ratio = spent[name]["processor_seconds"] / spent[options.searches[0]]["processor_seconds"]
        print(f"{name}: {one.plan} by {'; '.join(labels(one.repair.methods))}")
        print(f"    gap {one.gap:.4f}, less that of {options.searches[0]} {mean:+.4f} +- {error:.4f}")
        print(f"    processor time {ratio:.2f} of that of {options.searches[0]}", flush=True)
        write_json(options.work / "bench_search.json", {"settings": vars(options), "rows": rows})


def _spent(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one search; what it took is kept beside its plan."""
    plan, kept = options.work / f"{name}.json", options.work / f"{name}.time"
    if not kept.exists():
        request = ["--model", str(options.model), "--remove", str(options.remove), *_text(options)]
        spans = ["--max-spans", str(options.max_spans), "--search", name, "--out", str(plan)]
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "ghoststream", "select", *request, *spans])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{name} failed")
        kept.write_text(f"{usage.ru_utime + usage.ru_stime} {time.perf_counter() - begin}", encoding="utf-8")
    processor, seconds = map(float, kept.read_text(encoding="utf-8").split())
    return {"processor_seconds": processor, "seconds": seconds}


def _text(options: argparse.Namespace) -> list[str]:
    sizes = ["--sequences", str(options.sequences), "--length", str(options.length), "--dtype", options.dtype]
    return ["--calibration", options.calibration, *sizes]


def _measured(plans: list[Path], options: argparse.Namespace) -> tuple[Candidate, ...]:
    """Repair what was chosen and measure it on all held-out windows."""
    session = ModelSession(options.model, gs.Compute(dtype=options.dtype))
    text = gs.Text(spec=options.calibration, sequences=options.sequences, length=options.length)
    tokens = session.tokens(text.to_calibrate(), SilentProgress())
    division = Division.make(session, tokens, gs.Search())
    repairs = []
    for path in plans:
        chosen = gs.Selection.load(path)
        repairs.append(Repair(chosen.plan, chosen.methods))
    _, found = measure_repairs(
        session,
        tokens,
        repairs,
        ranges=division.fitting,
        micro_batch=division.micro_batch,
        progress=SilentProgress(),
    )
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--remove", type=int, required=True)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--max-spans", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=SEARCHES)
    parser.add_argument("--work", type=Path, default=Path("bench_search"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
