"""What `estimate` predicts against what the stages then take: memory, bytes and processor time.

    python benchmarks/bench_estimate.py [--shapes NAME ...] [--json FILE]

Each stage runs in a process of its own, on one thread. There the machine is measured by processor time, so
that other work on it does not count, then the stage is estimated, and run:

- memory: the peak of anonymous memory above that of the libraries and the measurement;
- bytes: what system calls read and write (``rchar`` and ``wchar``), from the page cache or not;
- time: processor seconds of the process, against the sum over the resources of the estimate.

Weights are random but for `smollm2`, which is the demo's model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_tables import markdown_table
from results_file import write_json

STAGES = ("capture", "solve", "export", "evaluate", "fit")
_NEEDS = {stage: f"memory, {stage}" for stage in STAGES}


@dataclass(frozen=True)
class Case:
    """A model's shape and the text that it is measured with.

    Attributes:
        model_type: Family of transformers.
        sequences: Windows of text.
        length: Tokens of each.
        plan: Layers that go.
        config: Fields of the configuration.
    """

    model_type: str
    sequences: int
    length: int
    plan: str
    config: dict[str, Any] = field(default_factory=dict)


def _llama(hidden: int, intermediate: int, n_layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": n_layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **more,
    }


CASES = {
    "smollm2": Case("llama", 8, 512, "12:18"),
    "wide": Case("llama", 12, 256, "2:3", _llama(2048, 5632, 4, 16000)),
    "mixture": Case(
        "qwen3_moe",
        16,
        256,
        "3:5",
        _llama(
            768,
            2048,
            8,
            16000,
            head_dim=64,
            moe_intermediate_size=768,
            num_experts=16,
            num_experts_per_tok=4,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
    ),
    "vocabulary": Case("llama", 16, 256, "3:5", _llama(768, 2048, 8, 128000)),
    "long": Case("llama", 1, 4096, "4:7", _llama(768, 2048, 12, 16000)),
    "tiny": Case("llama", 4, 16, "1:2", _llama(64, 128, 4, 100)),
}


def make_model(name: str, work: Path) -> Path:
    """Write the checkpoint of a case, and its token ids, unless they are there; returns its folder."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from ghoststream.testing.synthetic import save_ids

    case = CASES[name]
    folder = work / name
    ids = work / f"{name}.npy"
    if not ids.is_file():
        if case.config:
            torch.manual_seed(0)
            config = CONFIG_MAPPING[case.model_type](**case.config, dtype="float32")
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        else:
            from ghoststream.stages.demo_model import demo_model

            folder.symlink_to(demo_model(), target_is_directory=True)
        vocabulary = int(case.config.get("vocab_size", 49152))
        save_ids(ids, sequences=case.sequences, length=case.length, vocab_size=vocabulary)
    return folder


def run_stage(name: str, stage: str, work: Path) -> dict[str, Any]:
    """Estimate a stage and run it, in this process."""
    import torch

    import ghoststream as gs
    from ghoststream.checkpoint.sizes import read_sizes
    from ghoststream.stages.estimation.estimate import estimate
    from ghoststream.stages.estimation.machine import this_machine
    from ghoststream.stages.estimation.rates import measure_rates
    from ghoststream.streaming.allocator import return_free_memory
    from ghoststream.testing.memory import PeakAnonymous

    torch.set_num_threads(1)
    model = make_model(name, work)
    shards = sorted(model.glob("*.safetensors"))
    _warm_up(gs, stage, work)
    sizes = read_sizes(model)

    def measured() -> Any:
        sides = (sizes.widest, sizes.hidden)
        return measure_rates(
            shards, ["float32"], "cpu", work, sides=sides, seconds=0.3, clock=time.process_time
        )

    rates = [measured()]
    call = _calls(gs, name, work)[stage]
    before, begun = _io(), time.process_time()
    return_free_memory()
    with PeakAnonymous() as peak:
        call()
    spent, after = time.process_time() - begun, _io()
    # Two threads of a core share it: what was measured before and after is nearer to what acted between.
    rates.append(measured())
    machine = this_machine(None, _mean(rates))
    found = estimate(_recovery(gs, name, stage, work), model=model, machine=machine)
    (predicted,) = [one for one in found.stages if one.name == stage]
    return {
        "shape": name,
        "stage": stage,
        "unit_bytes": found.model.unit_bytes,
        "set_aside": found.needs[_NEEDS[stage]].n_bytes,
        "memory": [predicted.peak_bytes or found.needs[_NEEDS[stage]].n_bytes, peak.above_baseline_bytes],
        "read": [predicted.read_bytes, after["rchar"] - before["rchar"]],
        "written": [predicted.write_bytes, after["wchar"] - before["wchar"]],
        "seconds": [sum(predicted.parts.values()), spent],
        "parts": dict(predicted.parts),
        "rates": machine.rates.to_json(),
    }


def _mean(found: list[Any]) -> Any:
    """Return the mean of measured rates, as times go by their reciprocals."""
    first = found[0]

    def mean(values: list[float]) -> float:
        return len(values) / sum(1.0 / value for value in values)

    speeds = ("disk_read", "disk_write", "writer", "elementwise", "float64")
    changed = {name: mean([getattr(one, name) for one in found]) for name in speeds}
    flops = {name: mean([one.flops[name] for one in found]) for name in first.flops}
    return first.model_copy(update={**changed, "flops": flops})


def _warm_up(gs: Any, stage: str, work: Path) -> None:
    """Do the same with a tiny model: what a process does once, such as imports, is not a stage's work."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        make_model("tiny", Path(place))
        calls = _calls(gs, "tiny", Path(place))
        for name in STAGES:
            calls[name]()
            if name == stage:
                return


def _recovery(gs: Any, name: str, stage: str, work: Path) -> Any:
    case, spec = CASES[name], f"ids:{work / f'{name}.npy'}"
    text = gs.Text(spec=spec, sequences=case.sequences, length=case.length)
    return gs.Recovery(
        remove=case.plan,
        calibration=text,
        evaluate=text,
        method=_method(gs, stage),
        compute=gs.Compute(dtype="float32", device="cpu"),
    )


def _method(gs: Any, stage: str) -> Any:
    if stage == "fit":
        return gs.Method(operator="least-squares", inputs="repaired")
    return gs.Method(operator="ghost")


def _calls(gs: Any, name: str, work: Path) -> dict[str, Callable[[], object]]:
    """Return the stages; each reads the files that those before it wrote."""
    recovery = _recovery(gs, name, "capture", work)
    model, compute, text, plan = work / name, recovery.compute, recovery.calibration, recovery.remove
    store, operators, out = (work / f"{name}-{kind}" for kind in ("store", "operators.safetensors", "out"))
    layers = _stored(plan)
    return {
        "capture": lambda: gs.capture(
            model, calibration=text, store=store, storage=gs.Storage(layers=layers), compute=compute
        ),
        "solve": lambda: gs.fit(
            plan,
            gs.Source(store=str(store)),
            method=_method(gs, "solve"),
            reduction=gs.Reduction(workers=1),
            out=operators,
        ),
        "export": lambda: gs.export(model, operators, out),
        "evaluate": lambda: gs.evaluate([model, out], text=text, compute=compute),
        "fit": lambda: gs.fit(
            plan,
            gs.Source(model=model, calibration=text),
            method=_method(gs, "fit"),
            compute=compute,
            out=work / f"{name}-passes.safetensors",
        ),
    }


def _stored(plan: str) -> tuple[int, ...]:
    """Return the hidden states that a recovery of a plan of one span captures."""
    start, stop = map(int, plan.split(":"))
    return start, stop


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table: predicted, measured and their ratio."""
    names = ("memory", "read", "written", "seconds")
    headers = ["shape", "stage", *(f"{name}: predicted, measured, ratio" for name in names)]
    return markdown_table(
        headers, [[row["shape"], row["stage"], *(_cell(name, *row[name]) for name in names)] for row in rows]
    )


def _cell(name: str, predicted: float, measured: float) -> str:
    if name == "seconds":
        return f"{predicted:.2f} s, {measured:.2f} s, {predicted / max(measured, 1e-3):.2f}"
    if max(predicted, measured) < 2**20:
        return "-"
    return f"{predicted / 2**20:,.0f}, {measured / 2**20:,.0f} MiB, {predicted / max(measured, 1):.2f}"


def main() -> None:
    """Run every stage of every shape in its own process and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=[*CASES], default=[*CASES][:-1])
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=[*STAGES])
    parser.add_argument("--json", type=Path, default=Path("bench_estimate.json"))
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--run", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_stage(*options.run, options.work)))
        return
    with tempfile.TemporaryDirectory(prefix="ghoststream-bench-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in options.shapes:
            make_model(name, work)
            for stage in options.stages:
                command = [sys.executable, __file__, "--run", name, stage, "--work", str(work)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                write_json(options.json, rows)
                print(table(rows[-1:]).splitlines()[-1], flush=True)
        print(table(rows))


if __name__ == "__main__":
    main()
