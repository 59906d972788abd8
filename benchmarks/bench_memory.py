"""Peak anonymous memory of each stage, in units of U, on a checkpoint that is much larger than that.

    python benchmarks/bench_memory.py [--model FOLDER --ids FILE.npy] [--preset 3gb] [--json FILE]

U is the largest of one decoder layer, the embedding and the head, at compute dtype. Each stage runs in a process of
its own; what the libraries take before the stage starts is reported apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import PRESETS, make

STAGES = ("capture", "capture-scratch", "select", "solve", "export", "evaluate")


def run_stage(stage: str, model: Path, text: str, work: Path, sequences: int, length: int) -> dict[str, Any]:
    """Run one stage in this process and return its figures."""
    import torch

    import ghoststream as gs
    from ghoststream.stages.session import ModelOptions, ModelSession
    from ghoststream.testing.memory import PeakAnonymous

    torch.set_num_threads(2)
    session = ModelSession(model, ModelOptions())
    unit = session.skeleton.unit_bytes
    n_layers = session.skeleton.n_layers
    plan = f"{n_layers // 2}:{n_layers // 2 + max(1, n_layers // 5)}"
    torch.ones(64, 64) @ torch.ones(64, 64)
    options = {"calibration": text, "sequences": sequences, "length": length}
    calls = {
        "capture": lambda: gs.capture(model, store=work / "store", **options),
        "capture-scratch": lambda: gs.capture(model, store=work / "store2", host_memory=0, **options),
        "select": lambda: gs.select(work / "store", max(1, n_layers // 5)),
        "solve": lambda: gs.solve(work / "store", plan, out=work / "ops.safetensors"),
        "export": lambda: gs.export(model, work / "ops.safetensors", work / "recovered"),
        "evaluate": lambda: gs.evaluate(
            [model, work / "recovered"], text=text, length=length, sequences=max(1, sequences // 4)
        ),
    }
    for module in ("capture", "select", "solve", "export", "evaluate"):
        getattr(gs, module)
    with PeakAnonymous() as peak:
        calls[stage]()
    return {
        "stage": stage,
        "unit_bytes": unit,
        "checkpoint_bytes": session.skeleton.index.n_bytes,
        "baseline_bytes": peak.baseline_bytes,
        "peak_bytes": peak.peak_bytes,
        "above_baseline_bytes": peak.above_baseline_bytes,
        "above_baseline_units": peak.above_baseline_bytes / unit,
        "states_bytes": sequences * length * session.skeleton.hidden_size * session.skeleton.dtype.itemsize,
    }


def main() -> None:
    """Run every stage in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", default=None, help="SPEC; default the ids beside the synthetic checkpoint")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="3gb")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=Path("bench_memory.json"))
    parser.add_argument("--stage", choices=STAGES, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="ghoststream-bench-"))
    model = options.model or make(
        work / "model", options.preset, n_sequences=options.sequences, length=options.length
    )
    text = options.text or f"ids:{model / 'ids.npy'}"
    if options.stage:
        print(json.dumps(run_stage(options.stage, model, text, work, options.sequences, options.length)))
        return
    rows = []
    for stage in STAGES:
        command = [
            sys.executable,
            __file__,
            "--stage",
            stage,
            "--model",
            model,
            "--text",
            text,
            "--work",
            work,
        ]
        command += ["--sequences", options.sequences, "--length", options.length]
        result = subprocess.run(
            [str(part) for part in command], stdout=subprocess.PIPE, check=True, text=True
        )
        rows.append(json.loads(result.stdout.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{stage:<16} {row['above_baseline_units']:6.2f} U  ({row['above_baseline_bytes'] / 2**20:8.1f} MiB above "
            f"{row['baseline_bytes'] / 2**20:.0f} MiB; U = {row['unit_bytes'] / 2**20:.1f} MiB, "
            f"states {row['states_bytes'] / 2**20:.1f} MiB, checkpoint {row['checkpoint_bytes'] / 2**30:.2f} GiB)",
            flush=True,
        )
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
