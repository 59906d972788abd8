"""Rivals that bring batches through a model: resident, accelerate's disk offload, AirLLM, llm-compressor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pass_result import PreparedRun, Result, numbers


def resident(model: Path, ids: Any, micro_batch: int, _work: Path) -> PreparedRun:
    """Prepare transformers with all weights in memory."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16").eval()
    # Weights that are still mapped files would be read while the clock runs.
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    return _batch_by_batch(loaded.model, ids, micro_batch)


def accelerate(model: Path, ids: Any, micro_batch: int, work: Path) -> PreparedRun:
    """Prepare transformers with accelerate's disk offload of the decoder layers."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16", **_layers_on_disk(model, work))
    return _batch_by_batch(loaded.eval().model, ids, micro_batch)


def airllm(model: Path, ids: Any, micro_batch: int, work: Path) -> PreparedRun:
    """Prepare AirLLM; its split copy is made on the first call and kept beside the work folder."""
    from airllm import AutoModel

    split = work.parent / f"airllm-split-{model.name}"
    split.mkdir(exist_ok=True)
    loaded = AutoModel.from_pretrained(
        str(model), device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=str(split)
    )
    return _batch_by_batch(loaded.model.model, ids, micro_batch)


def llm_compressor(model: Path, ids: Any, micro_batch: int, work: Path) -> PreparedRun:
    """Prepare llm-compressor's sequential pipeline with nothing to calibrate."""
    from llmcompressor.args import DatasetArguments
    from llmcompressor.core import create_session
    from llmcompressor.pipelines.sequential import SequentialPipeline
    from llmcompressor.utils.dev import load_context
    from transformers import AutoModelForCausalLM

    with load_context():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16", **_layers_on_disk(model, work))
    layers = {type(layer).__name__ for layer in loaded.model.layers}
    batches: Any = [{"input_ids": batch} for batch in _batches(ids, micro_batch)]
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
    arguments = DatasetArguments(propagate_error=False, sequential_targets=sorted(layers))
    seen = _watch_norm(loaded.model)

    def run() -> Result:
        with create_session() as session:
            session.initialize(recipe=None, model=loaded)
            SequentialPipeline()(loaded, loader, arguments)
        return Result(lambda: numbers(seen[-1]))

    return run


def _layers_on_disk(model: Path, work: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    n_layers = AutoConfig.from_pretrained(model).num_hidden_layers
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "disk" for layer in range(n_layers)}
    return {"device_map": places, "offload_folder": str(work / "offload")}


def _batches(ids: Any, micro_batch: int) -> list[torch.Tensor]:
    whole = torch.from_numpy(ids).long()
    return [whole[begin : begin + micro_batch] for begin in range(0, len(whole), micro_batch)]


def _batch_by_batch(decoder: Any, ids: Any, micro_batch: int) -> PreparedRun:
    seen = _watch_norm(decoder)
    batches = _batches(ids, micro_batch)

    def work() -> Result:
        with torch.inference_mode():
            for batch in batches:
                decoder(input_ids=batch, use_cache=False)
        return Result(lambda: numbers(seen[-1]))

    return work


def _watch_norm(decoder: Any) -> list[Any]:
    """Keep the last input of the final norm, which is the same position for every method."""
    seen: list[Any] = []

    def look(_module: Any, arguments: tuple[Any, ...]) -> None:
        seen[:] = [arguments[0]]

    decoder.norm.register_forward_pre_hook(look)
    return seen
