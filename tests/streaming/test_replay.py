"""Replay gives what hooks on the resident model see, bit for bit in fp32 on CPU, and reads one layer only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ghoststream.spans import PruningPlan
from ghoststream.stages.export import export
from ghoststream.streaming import (
    TAPS,
    Batch,
    Lane,
    LayerTaps,
    Replay,
    Skeleton,
    StatesFactory,
    StreamedPass,
    make_batches,
    mlp_projection,
)
from ghoststream.testing.conformance import load_resident, random_tokens, resident_pass, skip_layers
from ghoststream.testing.models import save_tiny
from tests.helpers.families import families
from tests.helpers.recovered_models import make_operators
from tests.helpers.resident_taps import SIDE_BY_SIDE, Seen, absent_taps, see

pytestmark = pytest.mark.integration
L, C, T = 6, 32, 20

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-one-norm": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "falcon-parallel": ("falcon", {"new_decoder_architecture": False}),
    "falcon-sequential": (
        "falcon",
        {"new_decoder_architecture": False, "parallel_attn": False, "alibi": True},
    ),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "llama-biased": ("llama", {"mlp_bias": True, "attention_bias": True}),
}


def _batches(skeleton: Skeleton) -> tuple[Batch, ...]:
    return make_batches(*random_tokens(skeleton, 3, T, padding="right"), 2)


@pytest.mark.parametrize("case", [*families(), *VARIANTS])
def test_taps_of_every_layer_equal_hooks_on_the_resident_model(
    case: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model_type, overrides = VARIANTS.get(case, (case, {}))
    folder = (
        save_tiny(model_type, tmp_path / "model", **overrides) if overrides else tiny_checkpoint(model_type)
    )
    skeleton, model = Skeleton(folder), load_resident(folder)
    batches = _batches(skeleton)
    states = [resident_pass(model, batch)[0] for batch in batches]
    seen = [see(model, model_type, batch) for batch in batches]
    for layer in range(L):
        expected = set(TAPS) - absent_taps(model_type, layer)
        with Replay(skeleton, layer) as work:
            for batch, resident, places in zip(batches, states, seen, strict=True):
                taken = work.taps(batch, resident[layer], sorted(expected))
                assert set(places[layer]) == expected
                for name, value in taken.items():
                    assert torch.equal(value, places[layer][name]), (layer, batch.index, name)
                assert torch.equal(taken["output"], resident[layer + 1])
                added = [value for name, value in taken.items() if name.endswith("_contribution")]
                assert all(float(value.abs().max()) > 1e-3 for value in added)
                if model_type not in SIDE_BY_SIDE:
                    total = resident[layer] + sum(added)
                    torch.testing.assert_close(total, taken["output"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model_type", families())
def test_a_map_of_the_intermediate_folds_exactly_where_it_is_said_to(
    model_type: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """With ``W + A / scale`` for ``W``, the resident layer gives ``a A`` more; behind a norm it does not."""
    skeleton, model = (
        Skeleton(tiny_checkpoint(model_type)),
        load_resident(tiny_checkpoint(model_type)),
    )
    batch, layer = _batches(skeleton)[0], 0
    module = model.get_submodule(f"{skeleton.architecture.layers_path}.{layer}")
    projection = mlp_projection(skeleton.architecture, module)
    if not projection.path:
        assert not projection.absorbs
        return
    before = see(model, model_type, batch)[layer]
    width = before["mlp_intermediate"].shape[-1]
    change = torch.randn(width, C, generator=torch.Generator().manual_seed(1)) * 0.1
    weight = module.get_submodule(projection.path).weight
    with torch.no_grad():
        weight += (change.T if projection.transposed else change) / projection.scale
    after = see(model, model_type, batch)[layer]
    wanted = before["mlp_intermediate"] @ change
    difference = after["output"] - before["output"] - wanted
    error = float(difference.norm() / wanted.norm())
    assert error < 1e-5 if projection.absorbs else error > 0.1


class TakingObserver:
    """Takes the taps of layer ``position - 1`` as a pass shows what it gave."""

    def __init__(self, taps: LayerTaps, position: int) -> None:
        self.taps, self.position = taps, position
        self.taken: list[Seen] = []

    def wants(self, position: int) -> bool:
        return position == self.position

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        assert position == self.position
        self.taken.append(self.taps.take(batch))
        assert torch.equal(self.taken[-1]["output"], states)

    def finished(self, position: int) -> None:
        pass

    def failed(self) -> None:
        raise AssertionError


def test_a_pass_gives_the_taps_of_each_lane(tiny_llama: Path) -> None:
    """Two lanes carry different states through layer 3; each sees taps of its own."""
    skeleton, model, pruned = Skeleton(tiny_llama), load_resident(tiny_llama), load_resident(tiny_llama)
    skip_layers(pruned, [1])
    batches = _batches(skeleton)
    factory = StatesFactory(batches, C, skeleton.dtype, device=skeleton.device)
    with LayerTaps(skeleton, 3, ["mlp_intermediate", "output"]) as taps:
        observers = TakingObserver(taps, 4), TakingObserver(taps, 4)
        lanes = [
            Lane("dense", PruningPlan(L), observers=observers[:1]),
            Lane("pruned", PruningPlan.parse(L, "1:2"), observers=observers[1:]),
        ]
        StreamedPass(skeleton, batches, lanes, factory).run()
    for resident, observer in zip((model, pruned), observers, strict=True):
        seen: list[torch.Tensor] = []
        projection = resident.model.layers[3].mlp.down_proj
        projection.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0].clone()))
        for batch in batches:
            resident_pass(resident, batch)
        for taken, expected in zip(observer.taken, seen, strict=True):
            assert torch.equal(taken["mlp_intermediate"], expected)


def test_a_recovered_model_is_replayed_too(tiny_llama: Path, tmp_path: Path) -> None:
    """In front of layer 1 there is an operator: what the layer adds, it adds to the state that the operator
    gives."""
    plan = PruningPlan.parse(L, "1:3")
    folder = tmp_path / "recovered"
    export(tiny_llama, make_operators(plan), folder)
    skeleton, model = Skeleton(folder), load_resident(folder)
    (batch, _) = _batches(skeleton)
    states = resident_pass(model, batch)[0]
    with Replay(skeleton, 1) as work:
        taken = work.taps(batch, states[1], list(TAPS))
    assert torch.equal(taken["output"], states[2])
    with torch.no_grad():
        repaired = model.model.layers[1].ghost(states[1])
    assert not torch.equal(repaired, states[1])
    total = repaired + taken["attention_contribution"] + taken["mlp_contribution"]
    torch.testing.assert_close(total, taken["output"], rtol=1e-5, atol=1e-4)


def _tensor_bytes(folder: Path, *prefixes: str) -> int:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    total = 0
    for name, shard in index.items():
        if name.startswith(prefixes):
            with safe_open(folder / shard, "pt") as file:
                tensor = file.get_tensor(name)
            total += tensor.numel() * tensor.element_size()
    return total


@pytest.mark.parametrize(
    ("model_type", "layer", "prefixes"),
    [
        ("llama", 4, ("model.layers.4.", "model.norm.")),
        ("gpt2", 2, ("transformer.h.2.", "transformer.ln_f.", "transformer.wpe.")),
        ("mixtral", 0, ("model.layers.0.", "model.norm.")),
    ],
)
def test_only_that_layer_and_the_frame_are_read_and_once(
    model_type: str, layer: int, prefixes: tuple[str, ...], tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tiny_checkpoint(model_type)
    skeleton = Skeleton(folder)
    with Replay(skeleton, layer) as work:
        for batch in _batches(skeleton):
            work.taps(batch, torch.ones(*batch.ids.shape, C), ["mlp_output"])
        loaded = {name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta}
    assert skeleton.reader.bytes_read == _tensor_bytes(folder, *prefixes)
    embedding = f"{skeleton.architecture.decoder}.{'wte' if model_type == 'gpt2' else 'embed_tokens'}.weight"
    elsewhere = {name for name in loaded if not name.startswith(prefixes)}
    assert elsewhere <= {embedding, "lm_head.weight"}  # which has no rows
    assert not any(".layers." in name or ".h." in name for name in elsewhere)
