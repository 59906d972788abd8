"""Peak anonymous memory of each stage, in units of U, on a checkpoint that is much larger than U.

    python benchmarks/bench_memory.py [--model FOLDER --text SPEC] [--preset 3gb] [--json FILE]

U is the largest of one decoder layer, the embedding and the head, at compute dtype. Each stage runs in a
process of its own; the memory of the libraries before the stage starts is reported apart.

Then the stages that carry hidden states (capture, and evaluate with its logits) are measured for few and for
many sequences (``--many``). Their budget leaves no room for states: these are in scratch files, and the peaks
should be the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize
from random_checkpoint import PRESETS, make, place_of

from ghoststream.costs import SHARD_BYTES
from ghoststream.testing.synthetic import save_ids

if TYPE_CHECKING:
    from ghoststream.stages.session import ModelSession

STAGES = ("capture", "select", "fit", "export", "evaluate")
SCRATCH_STAGES = ("capture-scratch", "evaluate-scratch")
_TOKENS_AT_A_TIME = 2048


def run_stage(stage: str, model: Path, text: str, work: Path, sequences: int, length: int) -> dict[str, Any]:
    """Run one stage in this process and return its figures."""
    import torch

    import ghoststream as gs
    from ghoststream.stages.session import ModelSession
    from ghoststream.testing.memory import PeakAnonymous

    torch.set_num_threads(2)
    session = ModelSession(model)
    unit = session.skeleton.unit_bytes
    torch.ones(64, 64) @ torch.ones(64, 64)
    call = _calls(session, text, work, sequences, length)[stage]
    # Modules are imported before memory is looked at.
    for name in STAGES:
        getattr(gs, name)
    with PeakAnonymous() as peak:
        call()
    return {
        "stage": stage,
        "sequences": sequences,
        "length": length,
        "unit_bytes": unit,
        "checkpoint_bytes": session.skeleton.index.n_bytes,
        "baseline_bytes": peak.baseline_bytes,
        "peak_bytes": peak.peak_bytes,
        "above_baseline_bytes": peak.above_baseline_bytes,
        "above_baseline_units": peak.above_baseline_bytes / unit,
        "states_bytes": sequences * length * session.skeleton.hidden_size * session.skeleton.dtype.itemsize,
    }


def _calls(
    session: ModelSession, text: str, work: Path, sequences: int, length: int
) -> dict[str, Callable[[], object]]:
    """Return the stages; each reads the files that those before it wrote."""
    import ghoststream as gs

    model, n_layers = session.root, session.skeleton.n_layers
    removed = max(1, n_layers // 5)
    plan = f"{n_layers // 2}:{n_layers // 2 + removed}"
    whole = gs.Text(spec=text, sequences=sequences, length=length)
    quarter = gs.Text(spec=text, sequences=max(1, sequences // 4), length=length)
    little = gs.Compute(host_memory=least_memory(session.skeleton), scratch=work)
    source, operators = gs.Source(store=str(work / "store")), work / "operators.safetensors"
    return {
        "capture": lambda: gs.capture(model, calibration=whole, store=work / "store"),
        "capture-scratch": lambda: gs.capture(
            model, calibration=whole, store=work / f"scratch-{sequences}", compute=little
        ),
        "select": lambda: gs.select(removed, source),
        "fit": lambda: gs.fit(plan, source, out=operators),
        "export": lambda: gs.export(model, operators, work / "recovered"),
        "evaluate": lambda: gs.evaluate([model, work / "recovered"], text=quarter),
        "evaluate-scratch": lambda: gs.evaluate([model], text=whole, compute=little),
    }


def least_memory(skeleton: Any) -> ByteSize:
    """Return a budget for weights, work and buffers of a stage that leaves no room for states."""
    batches = 3 * _TOKENS_AT_A_TIME * skeleton.hidden_size * skeleton.dtype.itemsize
    return ByteSize(skeleton.unit_bytes * 5 // 2 + 3 * SHARD_BYTES + batches)


def measure(stage: str, model: Path, text: str, work: Path, sequences: int, length: int) -> dict[str, Any]:
    """Run one stage in a process of its own, print its figures and return them."""
    command = [sys.executable, __file__, "--stage", stage, "--model", model, "--text", text, "--work", work]
    command += ["--sequences", sequences, "--length", length]
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True, text=True)
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    print(
        f"{stage:<16} {sequences:>4} x {length} tokens {row['above_baseline_units']:6.2f} U"
        f"  ({row['above_baseline_bytes'] / 2**20:8.1f} MiB above {row['baseline_bytes'] / 2**20:.0f} MiB;"
        f" U = {row['unit_bytes'] / 2**20:.1f} MiB, states {row['states_bytes'] / 2**20:.1f} MiB,"
        f" checkpoint {row['checkpoint_bytes'] / 2**30:.2f} GiB)",
        flush=True,
    )
    return row


def main() -> None:
    """Run every stage in its own process and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", default=None, help="SPEC; default the ids beside the synthetic checkpoint")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="3gb")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--many", type=int, nargs="*", default=[32, 512], help="numbers of sequences in scratch"
    )
    parser.add_argument("--many-length", type=int, default=64, help="tokens of each of these")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=Path("bench_memory.json"))
    parser.add_argument("--stage", choices=STAGES + SCRATCH_STAGES, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        figures = run_stage(
            options.stage, options.model, options.text, options.work, options.sequences, options.length
        )
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory(prefix="ghoststream-bench-") as temporary:
        work = options.work or Path(temporary)
        model = options.model or make(
            place_of(options.preset), options.preset, n_sequences=options.sequences, length=options.length
        )
        text = options.text or f"ids:{model / 'ids.npy'}"
        cases = [(stage, text, options.sequences, options.length) for stage in STAGES]
        if options.text is None and options.model is None:
            many = work / "many.npy"
            save_ids(
                many,
                sequences=max(options.many, default=1),
                length=options.many_length,
                vocab_size=PRESETS[options.preset]["vocab_size"],
            )
            text = f"ids:{many}"
        cases += [
            (stage, text, sequences, options.many_length)
            for stage in SCRATCH_STAGES
            for sequences in options.many
        ]
        rows = []
        for stage, spec, sequences, length in cases:
            rows.append(measure(stage, model, spec, work, sequences, length))
            options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
