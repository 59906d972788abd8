"""The cost of a repair in use: time of a prompt and of a generated token, the dense model's being 1.

    python benchmarks/bench_latency.py MODEL --plan 12:21 --calibration SPEC [--rounds 7] [--json FILE]

The layers are removed and repaired in each way, the checkpoints are loaded with transformers, all at once,
and take turns. A ratio is of one turn, and the median over the turns is printed. Batch of one, greedy, with a
key-value cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from markdown_tables import markdown_table

import ghoststream as gs
from ghoststream.errors import GhoststreamError

REPAIRS = {
    "pruned": gs.Method(operator="none"),
    "least squares on mlp, absorbed": gs.Method(operator="least-squares", features="mlp"),
    "ghost (the paper)": gs.Method(operator="ghost"),
    "least squares on hidden+mlp, half of it absorbed": gs.Method(
        operator="least-squares", features="hidden+mlp"
    ),
    "least squares on hidden+normed": gs.Method(operator="least-squares", features="hidden+normed"),
}
_DENSE = "dense"


def main() -> None:
    """Make the checkpoints, time them in turns, print a table and write JSON."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="ghoststream-bench-") as work:
        models = load(make_checkpoints(options, Path(work)))
    rounds = [
        {name: time_once(model, options.prompt, options.tokens) for name, model in models.items()}
        for _ in range(options.rounds + 1)
    ][1:]
    rows = {name: _row(models[name], name, rounds) for name in models}
    options.json.write_text(json.dumps({"rows": rows, "rounds": rounds}, indent=1), encoding="utf-8")
    base = rows[_DENSE]["parameters"]
    headers = ("", "weights", f"prompt of {options.prompt} tokens", "a generated token")
    lines = [
        (name, f"{row['parameters'] / base:.3f}", f"{row['prompt']:.2f}", f"{row['token']:.2f}")
        for name, row in rows.items()
    ]
    print(markdown_table(headers, lines))


def make_checkpoints(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Write a checkpoint for each repair that the model allows, and return them and the dense one."""
    text = gs.Text(spec=options.calibration, sequences=options.sequences, length=options.length)
    source = gs.Source(model=str(options.model), calibration=text)
    made = {_DENSE: options.model}
    for number, (name, method) in enumerate(REPAIRS.items()):
        try:
            operators = gs.fit(options.plan, source, out=work / f"{number}.safetensors", method=method)
            gs.export(options.model, operators, work / str(number))
        except GhoststreamError as error:
            print(f"{name}: {error}", flush=True)
            continue
        made[name] = work / str(number)
    return made


def load(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Load every checkpoint as it is stored."""
    from transformers import AutoModelForCausalLM

    return {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        for name, folder in folders.items()
    }


def time_once(model: Any, prompt: int, tokens: int) -> dict[str, float]:
    """Return the seconds that a prompt takes, and those of one generated token after a short prompt."""
    ids = torch.arange(prompt)[None] % model.config.vocab_size
    generate: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    few, many = (
        _seconds(partial(model.generate, ids[:, :16], min_new_tokens=n, max_new_tokens=n, **generate))
        for n in (1, 1 + tokens)
    )
    return {
        "prompt": _seconds(lambda: model(ids, use_cache=False, logits_to_keep=1)),
        "token": (many - few) / tokens,
    }


@torch.inference_mode()
def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _row(model: Any, name: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    ratios = {
        kind: statistics.median(turn[name][kind] / turn[_DENSE][kind] for turn in rounds)
        for kind in ("prompt", "token")
    }
    return {"parameters": model.num_parameters(), **ratios}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("bench_latency.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
