"""Results of a pass on the device, against the CPU and against the resident model."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pass_figures import load
from steps import DEADLINE, Run
from transformers import AutoConfig, AutoModelForCausalLM

from ghoststream.spans import PruningPlan
from ghoststream.streaming import Lane, PassOptions, Skeleton, StatesFactory, StreamedPass, make_batches
from ghoststream.testing.conformance import StateRecorder
from ghoststream.testing.models import save_tiny

ARCHITECTURES = (
    "llama",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "gemma3_text",
    "gpt2",
    "falcon",
    "bloom",
    "phi3",
)
INDEX = "model.safetensors.index.json"


def small_models(run: Run) -> dict[str, str]:
    """Stream tiny models of several kinds on the device, against the same on the CPU."""
    found = {}
    for name in ARCHITECTURES:
        if DEADLINE - time.time() < 10:
            break
        try:
            plain, padded = _differences(run, name)
            found[name] = f"differs from the CPU by {plain:.1e}, padded {padded:.1e}"
        except Exception as error:  # noqa: BLE001 - the next one may work
            found[name] = f"FAILED {type(error).__name__}: {str(error)[:200]}"
    return found


def _differences(run: Run, name: str) -> list[float]:
    folder = save_tiny(name, Path(tempfile.mkdtemp(dir=run.o.work)) / name)
    ids = np.random.default_rng(0).integers(3, 128, size=(4, 20)).astype(np.int32)
    mask = np.ones_like(ids, dtype=bool)
    mask[1, :5] = False
    out = []
    for masked in (None, mask):
        batches = make_batches(ids, masked, 2)
        there, here = (_seen(folder, device, batches) for device in (run.o.device, "cpu"))
        pairs = [(there[key], here[key]) for key in here if bool(here[key].isfinite().all())]
        out.append(max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in pairs))
    return out


def _seen(folder: Path, device: str, batches: Any) -> dict[Any, torch.Tensor]:
    recorder = _stream(Skeleton(folder, device=device), batches)
    items = [*recorder.states.items(), *recorder.logits.items()]
    return {key: value.cpu() for key, value in items}


def _stream(skeleton: Skeleton, batches: Any) -> StateRecorder:
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    recorder = StateRecorder()
    lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=(recorder,), logits=recorder)
    StreamedPass(skeleton, batches, [lane], factory, PassOptions(logit_tokens=None)).run()
    return recorder


def equal_to_resident(run: Run) -> dict[str, Any]:
    """Compare states of two layers of the large checkpoint with the resident model's, in bfloat16."""
    small = _first_layers(run, min(2, run.results.data["checkpoint"]["layers"]))
    batches = load(run)[1][:2]
    skeleton = Skeleton(small, device=run.o.device)
    recorder = _stream(skeleton, batches)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16).eval().to(run.o.device)
    equal, largest = [], 0.0
    with torch.inference_mode():
        for batch in batches:
            output = model(batch.ids.to(run.o.device), output_hidden_states=True, use_cache=False)
            for layer, states in enumerate(output.hidden_states[:-1]):
                found = recorder.states[layer, batch.index].to(run.o.device)
                equal.append(bool(torch.equal(found, states)))
                largest = max(largest, float((found.float() - states.float()).abs().max()))
            logits = recorder.logits[batch.index].to(run.o.device).view_as(output.logits)
            equal.append(bool(torch.equal(logits, output.logits)))
    return {"equal": equal, "largest_difference": largest, "attention": skeleton.attention}


def _first_layers(run: Run, n: int) -> Path:
    """Make a checkpoint of the first layers, out of links to the large one."""
    small: Path = run.o.work / "two"
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir()
    config = AutoConfig.from_pretrained(run.model)
    config.num_hidden_layers = n
    config.save_pretrained(small)
    index = json.loads((run.model / INDEX).read_text())["weight_map"]
    kept = {key: name for key, name in index.items() if "layers." not in key or int(key.split(".")[2]) < n}
    for name in set(kept.values()):
        (small / name).symlink_to(run.model / name)
    (small / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    return small
