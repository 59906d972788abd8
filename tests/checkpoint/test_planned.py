"""The tensors that a configuration says are those that transformers saves, for every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from ghoststream.checkpoint import ARCHITECTURES
from ghoststream.checkpoint.configuration import read_config
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.planned import planned_index
from ghoststream.checkpoint.sizes import read_sizes, sizes_of
from ghoststream.errors import UnsupportedModelError
from tests.helpers.quantised import save_fp8, save_mxfp4

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_configuration_says_the_sizes_of_the_checkpoint(
    tiny_checkpoint: Callable[[str], Path], model_type: str
) -> None:
    root = tiny_checkpoint(model_type)
    config = read_config(root)
    planned = planned_index(Path("elsewhere"), config)
    saved = CheckpointIndex.open(root)
    count = sum(prod(entry.shape) for entry in saved.tensors.values())
    assert sum(prod(entry.shape) for entry in planned.tensors.values()) == count
    sizes, there = sizes_of(planned, config, None, None), read_sizes(root)
    for name in ("n_layers", "hidden", "layer_bytes", "unit_bytes", "checkpoint_bytes", "tied"):
        assert getattr(sizes, name) == getattr(there, name), name
    for name in ("widest", "taps", "mlp_ends", "entry_bytes", "last_bytes", "stored_layer_bytes"):
        assert getattr(sizes, name) == getattr(there, name), name
    for layer, found in zip(sizes.layers, there.layers, strict=True):
        assert (layer.stored_bytes, layer.acting) == (found.stored_bytes, found.acting)
        # A gate that is fused with its other half has one input where two matrices have two.
        assert layer.passing == pytest.approx(found.passing, rel=0.2)


def test_of_a_mixture_only_some_experts_act(tiny_checkpoint: Callable[[str], Path]) -> None:
    sizes = read_sizes(tiny_checkpoint("mixtral"))
    layer = sizes.layers[0]
    c, width, experts, acting = 32, 64, 4, 2
    attention = c * c + 2 * c * 16 + c * c
    assert layer.acting == attention + experts * c + acting * 3 * c * width
    assert layer.stored_bytes == 4 * (attention + experts * c + experts * 3 * c * width + 2 * c)


@pytest.mark.parametrize("save", [save_fp8, save_mxfp4])
def test_bytes_of_a_quantised_release(save: Callable[[Path], Path], tmp_path: Path) -> None:
    root = save(tmp_path)
    config = read_config(root)
    sizes = sizes_of(planned_index(Path("elsewhere"), config), config, None, None)
    there = read_sizes(root)
    assert sizes.unit_bytes == there.unit_bytes
    for layer, found in zip(sizes.layers, there.layers, strict=True):
        # A bias of the router in float32, and of gate and up projection one block more or less.
        assert layer.stored_bytes == pytest.approx(found.stored_bytes, rel=0.01)
        assert layer.acting == found.acting


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "mamba"}, "its recurrent layers are of a kind that has not been compared"),
        ({"quantization_config": {"quant_method": "awq"}}, "the checkpoint is quantised"),
        ({"num_attention_heads": 0}, "transformers cannot build the model in there"),
    ],
)
def test_what_cannot_be_streamed_is_said_by_name(
    fields: dict[str, object], says: str, tiny_llama: Path
) -> None:
    config = {**json.loads((tiny_llama / "config.json").read_text()), **fields}
    with pytest.raises(UnsupportedModelError, match=says):
        planned_index(Path("there"), config)
