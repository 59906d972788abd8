"""A streamed pass against the resident model and against accelerate's disk offload, side by side in one run.

    python benchmarks/bench_pass.py [--model FOLDER] [--preset 1.5gb] [--micro-batches 1 4] [--rounds 3] [--json FILE]

Same tokens, dtype and micro-batch for all; contenders take turns, each in a process of its own, and medians are
compared. Loading the resident model is not counted; what a contender reads while it runs is (``rchar`` of the kernel).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import PRESETS, make

CONTENDERS = ("capture", "pass", "resident", "accelerate")


def _read_bytes() -> int:
    """Return the bytes that this process has asked the kernel to read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def _load(model: Path, *, on_disk: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {}
    if on_disk:
        n_layers = AutoConfig.from_pretrained(model).num_hidden_layers
        places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        places |= {f"model.layers.{layer}": "disk" for layer in range(n_layers)}
        options = {"device_map": places, "offload_folder": tempfile.mkdtemp(prefix="ghoststream-offload-")}
    return AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16", **options).eval()


def run(contender: str, model: Path, micro_batches: int, sequences: int) -> dict[str, float]:
    """Run one contender in this process: every batch through every layer, no head."""
    import numpy as np
    import torch

    import ghoststream as gs
    from ghoststream.spans import PruningPlan
    from ghoststream.streaming import Lane, Skeleton, StatesFactory, StreamedPass, make_batches

    torch.set_num_threads(2)
    ids = np.load(model / "ids.npy")[: micro_batches * sequences]
    batches = make_batches(ids, None, sequences)
    if contender in ("resident", "accelerate"):
        loaded = _load(model, on_disk=contender == "accelerate")

        def work() -> None:
            with torch.inference_mode():
                for batch in batches:
                    loaded.model(input_ids=batch.ids, use_cache=False)

    elif contender == "pass":
        skeleton = Skeleton(model)
        factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
        lane = Lane("dense", PruningPlan(skeleton.n_layers))
        work = StreamedPass(skeleton, batches, [lane], factory).run
    else:
        gs.capture  # noqa: B018 - imported before the clock starts
        store = Path(tempfile.mkdtemp(prefix="ghoststream-bench-")) / "store"

        def work() -> None:
            gs.capture(
                model,
                calibration=f"ids:{model / 'ids.npy'}",
                sequences=len(ids),
                length=ids.shape[1],
                store=store,
                micro_batch=sequences,
            )

    before, start = _read_bytes(), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start, "read_bytes": _read_bytes() - before}


def main() -> None:
    """Let the contenders take turns and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="folder with ids.npy beside the weights")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="1.5gb")
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--sequences", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("bench_pass.json"))
    parser.add_argument("--one", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or make(
        Path(tempfile.gettempdir()) / f"ghoststream-{options.preset}", options.preset
    )
    if options.one:
        print(json.dumps(run(options.one[0], model, int(options.one[1]), options.sequences)))
        return
    rows = []
    for count in options.micro_batches:
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(options.rounds):
            for name in CONTENDERS:
                command = [sys.executable, __file__, "--model", model, "--sequences", options.sequences]
                command += ["--one", name, count]
                result = subprocess.run(
                    [str(part) for part in command], stdout=subprocess.PIPE, check=True, text=True
                )
                figures[name].append(json.loads(result.stdout.splitlines()[-1]))
        medians = {name: statistics.median(one["seconds"] for one in runs) for name, runs in figures.items()}
        reads = {name: statistics.median(one["read_bytes"] for one in runs) for name, runs in figures.items()}
        rows.append({"micro_batches": count, "seconds": medians, "read_bytes": reads, "runs": figures})
        options.json.write_text(json.dumps(rows, indent=2))
        ratios = "  ".join(f"{name}/pass {medians[name] / medians['pass']:.2f}" for name in CONTENDERS)
        print(f"{count} micro-batches: {ratios}; read by pass {reads['pass'] / 2**30:.2f} GiB,", end=" ")
        print(f"by accelerate {reads['accelerate'] / 2**30:.2f} GiB (mapped pages not counted)", flush=True)


if __name__ == "__main__":
    main()
