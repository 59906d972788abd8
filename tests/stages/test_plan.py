"""``plan_run`` against sizes counted from the resident model and the formulas of the design."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ghoststream.stages.planning import plan as stage
from ghoststream.stages.planning.costs import describe_problem
from ghoststream.stages.planning.figures import Need, StageCost
from ghoststream.stages.planning.machine import measure_rates
from ghoststream.stages.planning.plan import RunPlan

from ghoststream.errors import InputNotFoundError, PlanError, RequestError
from ghoststream.testing.models import tiny_model

pytestmark = pytest.mark.unit


def plan_run(model: Path, **request: Any) -> RunPlan:
    """The plan of a run by way of a store, whatever is the default."""
    return stage.plan_run(model, **{"criterion": "streamline", "operator": "ghost"} | request)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_sizes_are_those_of_the_resident_model(
    tiny_checkpoint: Callable[[str], Path], model_type: str
) -> None:
    model = tiny_model(model_type)
    plan = plan_run(tiny_checkpoint(model_type), n_remove=2, sequences=4, length=16, measure=False)
    layers = model.get_decoder().h if model_type == "gpt2" else model.get_decoder().layers
    layer_bytes = sum(parameter.numel() * 4 for parameter in layers[0].parameters())
    head = model.get_output_embeddings().weight
    tied = head.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert plan.model.layer_bytes == layer_bytes
    assert plan.model.stored_layer_bytes == layer_bytes
    assert plan.model.embedding_bytes == model.get_input_embeddings().weight.numel() * 4
    assert plan.model.head_bytes == head.numel() * 4
    assert plan.model.tied == tied
    assert plan.model.unit_bytes == max(layer_bytes, plan.model.head_bytes, plan.model.embedding_bytes)
    assert plan.model.checkpoint_bytes == sum(p.numel() * 4 for p in model.parameters())


def test_store_and_export_sizes(tiny_llama: Path) -> None:
    plan = plan_run(
        tiny_llama, n_remove=2, sequences=3, length=10, store_dtype="bfloat16", layers=(1, 4), measure=False
    )
    tokens = 3 * 10
    assert plan.needs["disk, store"].n_bytes == 2 * tokens * 32 * 2 + tokens * 5 + 3 * 4
    expected = plan.model.checkpoint_bytes - 2 * plan.model.layer_bytes + 4 * 32**2
    assert plan.needs["disk, export"].n_bytes == expected
    whole = plan_run(tiny_llama, n_remove=2, sequences=3, length=10, measure=False)
    assert whole.needs["disk, store"].n_bytes == 7 * tokens * 32 * 4 + tokens * 5 + 3 * 4


def test_compute_dtype_changes_the_unit_not_the_checkpoint(tiny_llama: Path) -> None:
    full = plan_run(tiny_llama, n_remove=1, measure=False)
    half = plan_run(tiny_llama, n_remove=1, dtype="bfloat16", measure=False)
    assert half.model.unit_bytes * 2 == full.model.unit_bytes
    assert half.model.checkpoint_bytes == full.model.checkpoint_bytes
    assert half.model.layer_elements == full.model.layer_elements


def test_flops_of_the_pass(tiny_llama: Path) -> None:
    plan = plan_run(tiny_llama, n_remove=1, sequences=2, length=8, measure=False)
    capture = next(stage for stage in plan.stages if stage.name == "capture")
    assert capture.flops == 6 * 16 * (2 * plan.model.layer_elements + 4 * 8 * 32)
    assert capture.read_bytes == plan.model.checkpoint_bytes
    assert capture.seconds is None
    assert plan.seconds is None


def test_the_operator_decides_what_solving_takes(tiny_llama: Path) -> None:
    ghost = plan_run(tiny_llama, n_remove=1, measure=False)
    diagonal = plan_run(tiny_llama, n_remove=1, operator="linear-patch-diagonal", measure=False)
    # A state, four blocks of 2,048 tokens and a panel; sums a channel and a position, for C = 32 and T = 512.
    blocks, sums = 4 * 2048 * 32 * 8 + 8 * 32**2, 8 * (6 * 32 + 3 * 512 + 5)
    assert ghost.needs["memory, solve"].n_bytes == 8 * (2 * 32**2 + 32) + sums + blocks
    assert diagonal.needs["memory, solve"].n_bytes == sums + blocks
    assert ghost.stages[2].flops > diagonal.stages[2].flops


def test_what_does_not_fit_is_said(tiny_llama: Path) -> None:
    plan = plan_run(tiny_llama, n_remove=1, sequences=10**9, measure=False)
    assert any(problem.startswith("disk, store needs") for problem in plan.problems)
    assert all("; " in problem for problem in plan.problems)
    assert plan.to_json()["fits"] is False
    small = plan_run(tiny_llama, n_remove=1, sequences=2, length=8, measure=False)
    assert small.problems == ()
    assert small.to_json()["fits"] is True


def test_states_beyond_the_budget_go_to_disk(tiny_llama: Path) -> None:
    states = 4 * 16 * 32 * 4
    request: dict[str, Any] = {
        "n_remove": 1,
        "sequences": 4,
        "length": 16,
        "micro_batch": 4,
        "measure": False,
    }
    whole = plan_run(tiny_llama, **request).needs["memory, capture"]
    limits = (whole.n_bytes, whole.n_bytes - 1, whole.n_bytes - states, whole.n_bytes - states - 1)
    plans = [plan_run(tiny_llama, **request, host_memory=limit) for limit in limits]
    inside, outside, least, too_little = plans
    assert "disk, scratch" not in inside.needs
    assert outside.needs["disk, scratch"].n_bytes == states
    assert outside.needs["memory, capture"].n_bytes == inside.needs["memory, capture"].n_bytes - states
    assert least.problems == ()
    assert [problem.split(" needs ")[0] for problem in too_little.problems] == ["memory, capture"]


def test_the_pass_needs_what_its_formula_says(tiny_llama: Path) -> None:
    plan = plan_run(tiny_llama, n_remove=1, sequences=8, length=64, micro_batch=8, measure=False)
    work = max(plan.model.unit_bytes // 2, 8 * 64 * (4 * 64 + 8 * 32) * 4)
    assert plan.needs["memory, capture"].n_bytes == 2 * plan.model.unit_bytes + work + 8 * 64 * 32 * 4


def test_a_remote_store_has_no_disk_to_check(tiny_llama: Path) -> None:
    plan = plan_run(tiny_llama, n_remove=1, store="s3://bucket/store", measure=False)
    assert plan.needs["disk, store"].available is None
    assert plan.needs["disk, store"].fits


def test_every_need_has_advice() -> None:
    for name in (
        "device memory",
        "memory, capture",
        "memory, solve",
        "disk, scratch",
        "disk, store",
        "disk, export",
    ):
        text = describe_problem(name, Need(2 * 10**9, "x", 10**9))
        assert text.startswith(f"{name} needs 2.00 GB, 1.00 GB are free; ")


def test_measured_rates_give_times(tiny_llama: Path) -> None:
    plan = plan_run(tiny_llama, n_remove=1, sequences=2, length=8)
    assert plan.rates is not None
    assert plan.rates.disk > 0
    assert plan.rates.compute > 0
    assert plan.seconds is not None
    assert plan.seconds == pytest.approx(sum(stage.seconds or 0.0 for stage in plan.stages))
    assert all(stage.limited_by in {"disk", "compute"} for stage in plan.stages)


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1024))
    rates = measure_rates([path], torch.float32, torch.device("cpu"), max_bytes=1024, seconds=0.01)
    assert rates.disk > 0
    assert rates.float64 > 0


@pytest.mark.parametrize("n_remove", [6, 7])
def test_too_many_layers(tiny_llama: Path, n_remove: int) -> None:
    with pytest.raises(
        PlanError, match=rf"cannot remove {n_remove} of the 6 layers .* at least one must survive"
    ):
        plan_run(tiny_llama, n_remove=n_remove, measure=False)


def test_positions_past_the_end(tiny_llama: Path) -> None:
    with pytest.raises(PlanError, match=r"no hidden state h\[7\]: .* h\[0\] to h\[6\]"):
        plan_run(tiny_llama, n_remove=1, layers=(0, 7), measure=False)


def test_unknown_device(tiny_llama: Path) -> None:
    with pytest.raises(RequestError, match="unknown device 'tpu9'; use cpu, cuda or cuda:N"):
        plan_run(tiny_llama, n_remove=1, device="tpu9", measure=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_missing_accelerator(tiny_llama: Path) -> None:
    with pytest.raises(RequestError, match="torch sees no CUDA device here; use --device cpu"):
        plan_run(tiny_llama, n_remove=1, device="cuda", measure=False)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no model folder at"):
        plan_run(tmp_path / "nothing", n_remove=1)


def test_the_criterion_decides_what_selecting_takes(tiny_llama: Path) -> None:
    def plan(criterion: str) -> tuple[StageCost, dict[str, Need]]:
        run = plan_run(tiny_llama, n_remove=2, sequences=4, length=8, criterion=criterion, measure=False)
        return next(stage for stage in run.stages if stage.name == "select"), dict(run.needs)

    store = (
        plan_run(tiny_llama, n_remove=2, sequences=4, length=8, measure=False).needs["disk, store"].n_bytes
    )
    tokens, c, candidates = 4 * 8, 32, 3
    for criterion in ("streamline", "uidl", "uidl-all"):
        cost, needs = plan(criterion)
        assert (cost.read_bytes, cost.write_bytes, cost.flops) == (store, 0, 6 * candidates * c * tokens)
        assert needs["memory, select"].n_bytes == 4 * 4 * 1024 * c
        assert "disk, select" not in needs
    assert plan("shortgpt")[0].flops == 6 * 6 * c * tokens
    assert plan("lorp")[0].flops == 2 * 36 * c * tokens
    assert plan("lorp")[1]["memory, select"].n_bytes == 4 * 6 * 8 * c
    assert plan("reverse")[0].read_bytes == 0
    layer = plan_run(tiny_llama, n_remove=2, measure=False).model.stored_layer_bytes
    assert plan("magnitude")[0].read_bytes == 6 * layer
    cost, needs = plan("residual")
    assert cost.flops == candidates * (3 * c**2 * tokens + 5 * 7 / 3 * c**3)
    assert needs["disk, select"].n_bytes == cost.write_bytes == 16 * candidates * 16 * c**2
    assert plan("residual-in-sample")[1]["disk, select"].n_bytes == 4 * candidates * 16 * c**2
    assert needs["memory, select"].n_bytes == 16 * c**2 + 131072 * c
