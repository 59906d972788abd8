"""The estimate of a quantised release: memory beside its layers, measured, and the time of making weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ghoststream.checkpoint.sizes import read_sizes
from ghoststream.options import Compute, Method, Recovery, Search, Text
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.estimation.machine import find_machine
from ghoststream.stages.estimation.report import Estimate
from ghoststream.streaming import MemoryBudget, PassMemory, Skeleton
from ghoststream.streaming.allocator import return_free_memory
from ghoststream.testing.memory import PeakAnonymous
from tests.helpers.quantised import save_fp8, save_mxfp4

pytestmark = pytest.mark.integration


def price(model: str | Path, machine: str = "h100", remove: str = "1:2") -> Estimate:
    recovery = Recovery(
        remove=remove,
        calibration=Text(spec="ids:none.npy", sequences=4, length=64),
        search=Search(),
        method=Method(operator="ghost", inputs="repaired"),
        compute=Compute(),
    )
    return estimate(recovery, model=model, machine=machine)


def test_the_peak_beside_the_layers_is_one_packed_weight(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_local_experts": 4, "num_hidden_layers": 1}
    root = save_mxfp4(tmp_path, layer_types=["full_attention"], **sizes)
    stored = load_file(root / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    wanted = sum(stored.pop(f"{name}_{part}").nbytes for part in ("blocks", "scales"))
    del stored
    skeleton = Skeleton(root, dtype=torch.bfloat16)
    assert skeleton.packed_bytes == read_sizes(root).packed_bytes == wanted
    for _ in range(2):
        skeleton.read_layer(0)  # both places are there
    return_free_memory()
    with PeakAnonymous() as peak:
        skeleton.read_layer(0)
    # Blocks of rows are some times 2 MiB.
    assert wanted <= peak.above_baseline_bytes <= wanted + 10 * 2**20


def test_packed_weights_take_a_core_and_the_time_of_the_disk_besides(tmp_path: Path) -> None:
    root = save_fp8(tmp_path, "llama")
    stored = load_file(root / "model.safetensors")
    packed = sum(
        one.nbytes
        for name, one in stored.items()
        if any(f".layers.{layer}." in name for layer in (0, 1))
        and (one.dtype == torch.float8_e4m3fn or "scale_inv" in name)
    )
    (fit,) = [one for one in price(root).stages if one.name == "fit"]
    assert fit.parts["unpack"] == pytest.approx(1.5 * packed / 1e9)
    assert fit.seconds is not None
    beside = fit.parts["disk"] + fit.parts["unpack"]
    assert fit.seconds >= fit.parts["start"] + beside + fit.parts["solve"]


def test_a_pass_sets_aside_what_is_said(tmp_path: Path) -> None:
    root = save_fp8(tmp_path, "llama")
    skeleton = Skeleton(root, dtype=torch.bfloat16)
    taken, _ = PassMemory(skeleton, MemoryBudget(), 64, micro_batch=4).taken()
    found = estimate(
        Recovery(
            remove="1:2",
            calibration=Text(spec="ids:none.npy", sequences=4, length=64),
            method=Method(operator="ghost"),
            compute=Compute(micro_batch=4),
        ),
        model=root,
        machine="laptop",
    )
    states, sizes = 4 * 64 * 32 * 2, found.model
    work = max(sizes.unit_bytes // 2, 4 * 64 * (4 * sizes.widest + 8 * 32) * 2)
    assert taken == 2 * sizes.unit_bytes + work + sizes.packed_bytes
    need = found.needs["memory, capture"]
    assert "+ a packed weight" in need.formula
    assert need.n_bytes > taken + states


@pytest.mark.parametrize(
    ("name", "seconds", "packed"),
    [
        # 36 layers of 128 experts: (2 x 2,880 + 2,880) x 2,880 numbers of 4.25 bits; the first is the larger.
        ("gpt-oss-120b", 5.0 * 36 * 128 * 3 * 2880**2 * 4.25 / 8 / 1e9, 128 * 2 * 2880**2 * 4.25 / 8),
        ("llama-3-8b", 0.0, 0),
    ],
)
def test_a_published_release_is_counted_from_its_configuration(
    name: str, seconds: float, packed: float
) -> None:
    found = price(name)
    assert found.model.packed_bytes == packed
    assert sum(layer.unpacking for layer in found.model.layers) == pytest.approx(seconds)
    # All processors make numbers of four bits; the fit ends behind layer 1.
    (fit,) = [one for one in found.stages if one.name == "fit"]
    shared = seconds / 36 * 2 / find_machine("h100").processors
    assert fit.parts.get("unpack", 0.0) == pytest.approx(shared)


def test_planned_experts_of_eight_bits_are_made_one_by_one() -> None:
    # A matrix of an expert of DeepSeek-V3; shared and dense ones are larger.
    assert 7168 * 2048 < price("deepseek-v3").model.packed_bytes < 7168 * 18432 * 1.01 * 2
