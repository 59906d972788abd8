"""A checkpoint of Llama-70B-shaped layers with random weights: as many as disk and time allow."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from steps import DEADLINE, Run

SHAPE_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
SHAPE_TINY = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
Shapes = Mapping[str, tuple[int, ...]]


def checkpoint(run: Run) -> None:
    """Write the checkpoint."""
    run.step("checkpoint", lambda: _write(run))


def _write(run: Run) -> dict[str, Any]:
    shape = SHAPE_TINY if run.o.tiny else SHAPE_70B
    layer_bytes = _n_bytes(_layer(shape, 0))
    ends_bytes = 4 * shape["vocab_size"] * shape["hidden_size"]
    room = shutil.disk_usage(run.o.work).free
    n_layers = min(run.o.layers, max(2, int((0.62 * room - ends_bytes) // layer_bytes)))
    torch.manual_seed(0)
    shutil.rmtree(run.model, ignore_errors=True)
    run.model.mkdir(parents=True)
    begun = time.perf_counter()
    made, written = _write_shards(run, shape, n_layers, max(layer_bytes, ends_bytes))
    seconds = time.perf_counter() - begun
    _write_config(run, shape, made)
    begun = time.perf_counter()
    for path in run.model.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {
        "layers": made,
        "bytes": written,
        "layer_bytes": layer_bytes,
        "seconds": round(seconds, 2),
        "written_GBps": round(written / seconds / 1e9, 4),
        "fsync_seconds": round(time.perf_counter() - begun, 2),
        "disk_free_before_GB": round(room / 1e9, 1),
    }


def _write_shards(run: Run, shape: Mapping[str, int], n_layers: int, buffer_bytes: int) -> tuple[int, int]:
    """Write embedding, head and layers, two shards in flight; return how many layers and bytes there are."""
    buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=run.on_gpu) for _ in range(2)]
    ends: list[Shapes] = [_embedding(shape), _head(shape)]
    weight_map: dict[str, str] = {}
    pending: list[Future[None] | None] = [None, None]
    begun, made, written = time.perf_counter(), 0, 0
    with ThreadPoolExecutor(2) as pool:
        for number in range(2 + n_layers):
            least = 4 + 3 * (time.perf_counter() - begun) / max(1, made)
            if made >= 2 and DEADLINE - time.time() < least:
                break
            shapes = ends[number] if number < 2 else _layer(shape, made)
            waiting = pending[number % 2]
            if waiting is not None:
                waiting.result()
            header = _fill(buffers[number % 2], shapes, run.o.device)
            name = f"model-{number:05d}.safetensors"
            weight_map.update(dict.fromkeys(shapes, name))
            n = _n_bytes(shapes)
            pending[number % 2] = pool.submit(_put, run, name, header, buffers[number % 2][:n])
            written, made = written + n, made + (number >= 2)
        for waiting in pending:
            if waiting is not None:
                waiting.result()
    index = {"metadata": {}, "weight_map": weight_map}
    (run.model / "model.safetensors.index.json").write_text(json.dumps(index))
    return made, written


def _write_config(run: Run, shape: Mapping[str, int], n_layers: int) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        **shape,
        num_hidden_layers=n_layers,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(run.model)


def _embedding(shape: Mapping[str, int]) -> Shapes:
    return {"model.embed_tokens.weight": (shape["vocab_size"], shape["hidden_size"])}


def _head(shape: Mapping[str, int]) -> Shapes:
    width = shape["hidden_size"]
    return {"model.norm.weight": (width,), "lm_head.weight": (shape["vocab_size"], width)}


def _layer(shape: Mapping[str, int], layer: int) -> Shapes:
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = shape["num_key_value_heads"] * (width // shape["num_attention_heads"])
    shapes: Shapes = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    return {f"model.layers.{layer}.{name}.weight": size for name, size in shapes.items()}


def _n_bytes(shapes: Shapes) -> int:
    return 2 * sum(math.prod(size) for size in shapes.values())


def _fill(buffer: torch.Tensor, shapes: Shapes, device: str) -> bytes:
    """Make weights on the device, bring them into the buffer, and return the header of their file."""
    header, at = {}, 0
    for name, size in shapes.items():
        n = 2 * math.prod(size)
        there = torch.ones(size, dtype=torch.bfloat16, device=device)
        if len(size) == 2:
            there.normal_().mul_(0.5 / size[1] ** 0.5)
        buffer[at : at + n].view(torch.bfloat16).view(size).copy_(there)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, at + n]}
        at += n
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _put(run: Run, name: str, header: bytes, buffer: torch.Tensor) -> None:
    with (run.model / name).open("wb", buffering=0) as file:
        file.write(header)
        view, done = memoryview(buffer.numpy()), 0
        while done < len(view):
            done += file.write(view[done : done + 64 * 2**20])
