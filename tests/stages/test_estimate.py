"""``estimate`` against sizes counted from the resident model and the formulas of the design."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ghoststream.activations import StoreLayout
from ghoststream.costs import Cost, FitShape, Need, SelectionShape
from ghoststream.errors import InputNotFoundError, RequestError, UnsupportedModelError
from ghoststream.machine import processors
from ghoststream.operators import OperatorKind, register_operator
from ghoststream.options import Compute, Method, Recovery, Search, Storage, Text
from ghoststream.selection import Criterion, register_criterion
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.estimation.rates import measure_rates
from ghoststream.stages.estimation.report import Estimate, StageCost, describe_problem
from ghoststream.stages.session import usable_device
from ghoststream.testing.models import save_tiny, tiny_model

pytestmark = pytest.mark.unit


def price(model: Path, remove: int | str = 1, **given: Any) -> Estimate:
    """The estimate of a recovery by way of a store; options go to the groups that have them."""

    def own(group: Any, **defaults: Any) -> Any:
        return group(**{**defaults, **{key: given.pop(key) for key in group.model_fields if key in given}})

    out, measure, store = given.pop("out", None), given.pop("measure", False), given.pop("store", None)
    search = own(Search, **({"criterion": "streamline"} if isinstance(remove, int) else {}))
    parts = {"search": search, "method": own(Method, operator="ghost"), "compute": own(Compute, device="cpu")}
    text = own(Text, spec="ids:none.npy")
    recovery = Recovery(remove=remove, calibration=text, storage=own(Storage), store=store, **parts)
    assert not given
    return estimate(recovery, model=model, out=out, measure=measure)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_sizes_are_those_of_the_resident_model(
    tiny_checkpoint: Callable[[str], Path], model_type: str
) -> None:
    model = tiny_model(model_type)
    plan = price(tiny_checkpoint(model_type), remove=2, sequences=4, length=16)
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
    storage = {"store_dtype": "bfloat16", "layers": (1, 3, 4)}
    plan = price(tiny_llama, remove="1:3", sequences=3, length=10, **storage)
    tokens = 3 * 10
    copies = 3 * tokens * 32 * 4
    assert plan.needs["disk, store"].n_bytes == 3 * tokens * 32 * 2 + tokens * 5 + 3 * 4 + copies
    expected = plan.model.checkpoint_bytes - 2 * plan.model.layer_bytes + 4 * 32**2
    assert plan.needs["disk, export"].n_bytes == expected
    whole = price(tiny_llama, remove=2, sequences=3, length=10)
    assert whole.needs["disk, store"].n_bytes == 7 * tokens * 32 * 4 + tokens * 5 + 3 * 4


def test_the_ways_to_keep_states_are_compared(tiny_llama: Path) -> None:
    plan = price(tiny_llama, remove="1:3", sequences=3, length=10, store_dtype="int8")
    layout: dict[str, Any] = {"n_layers": 6, "n_sequences": 3, "length": 10, "hidden": 32, "layers": (1, 3)}
    shards = {"sequences_per_shard": 3, "sequences_per_chunk": 1}
    found = {way.dtype: way for way in plan.stores}
    assert set(found) == {"float32", "bfloat16", "float16", "int8", None}
    for dtype, way in found.items():
        if dtype is not None:
            on_disk = StoreLayout.from_json({**layout, **shards, "store_dtype": dtype}).total_bytes()
            # What the estimate leaves out: checksums of chunks, and the index of a shard.
            arrays = 2 * (3 if dtype == "int8" else 1)
            assert on_disk == way.n_bytes + arrays * (3 * 4 + 3 * 16 + 4) + 3 * 4
    assert [way.dtype for way in plan.stores if way.is_taken] == ["int8"]
    assert plan.needs["disk, store"].n_bytes == found["int8"].n_bytes + 3 * 3 * 10 * 32 * 4
    assert plan.to_json()["stores"][-1] == {
        "dtype": None,
        "hidden_states": 0,
        "n_bytes": 0,
        "is_taken": False,
    }


def test_compute_dtype_changes_the_unit_not_the_checkpoint(tiny_llama: Path) -> None:
    full = price(tiny_llama, remove=1)
    half = price(tiny_llama, remove=1, dtype="bfloat16")
    assert half.model.unit_bytes * 2 == full.model.unit_bytes
    assert half.model.checkpoint_bytes == full.model.checkpoint_bytes
    assert half.model.layer_elements == full.model.layer_elements


def test_flops_of_the_pass(tiny_llama: Path) -> None:
    plan = price(tiny_llama, remove=1, sequences=2, length=8)
    capture = next(stage for stage in plan.stages if stage.name == "capture")
    matrices = plan.model.layer_elements - 2 * 32
    assert capture.flops == 6 * 16 * (2 * matrices + 2 * 8 * 32), "half of the scores, as attention is causal"
    assert capture.read_bytes == plan.model.checkpoint_bytes - plan.model.head_bytes
    eager = price(tiny_llama, remove=1, sequences=2, length=8, attention="eager").stages[0]
    assert eager.flops == 6 * 16 * (2 * matrices + 4 * 8 * 32)
    assert capture.seconds is None
    assert plan.seconds is None


def test_the_operator_decides_what_solving_takes(tiny_llama: Path) -> None:
    ghost = price(tiny_llama, remove=1)
    diagonal = price(tiny_llama, remove=1, operator="linear-patch-diagonal")
    # A state, four blocks of 2,048 tokens and a panel; sums a channel and a position, for C = 32 and T = 512.
    blocks, sums = 4 * 2048 * 32 * 8 + 8 * 32**2, 8 * (6 * 32 + 3 * 512 + 5)
    assert ghost.needs["memory, solve"].n_bytes == 8 * (2 * 32**2 + 32) + sums + blocks
    assert diagonal.needs["memory, solve"].n_bytes == sums + blocks
    assert ghost.stages[2].flops > diagonal.stages[2].flops


def test_what_does_not_fit_is_said(tiny_llama: Path) -> None:
    plan = price(tiny_llama, remove=1, sequences=10**9)
    assert any(problem.startswith("disk, store needs") for problem in plan.problems)
    assert all("; " in problem for problem in plan.problems)
    assert plan.to_json()["fits"] is False
    small = price(tiny_llama, remove=1, sequences=2, length=8)
    assert small.problems == ()
    assert small.to_json()["fits"] is True


def test_states_beyond_the_budget_go_to_disk(tiny_llama: Path) -> None:
    states = 4 * 16 * 32 * 4
    request: dict[str, Any] = {
        "remove": 1,
        "sequences": 4,
        "length": 16,
        "micro_batch": 4,
    }
    whole = price(tiny_llama, **request).needs["memory, capture"]
    limits = (whole.n_bytes, whole.n_bytes - 1, whole.n_bytes - states, whole.n_bytes - states - 1)
    plans = [price(tiny_llama, **request, host_memory=limit) for limit in limits]
    inside, outside, least, too_little = plans
    assert "disk, scratch" not in inside.needs
    assert outside.needs["disk, scratch"].n_bytes == states
    assert outside.needs["memory, capture"].n_bytes == inside.needs["memory, capture"].n_bytes - states
    assert least.problems == ()
    assert [problem.split(" needs ")[0] for problem in too_little.problems] == ["memory, capture"]


def test_the_pass_needs_what_its_formula_says(tiny_llama: Path) -> None:
    plan = price(tiny_llama, remove=1, sequences=8, length=64, micro_batch=8)
    work = max(plan.model.unit_bytes // 2, 8 * 64 * (4 * 64 + 8 * 32) * 4)
    states = 8 * 64 * 32 * 4
    # A shard, which is the whole text here, for each thread that writes and one that is filled.
    buffers = (min(4, processors()) + 1) * states
    assert plan.needs["memory, capture"].n_bytes == 2 * plan.model.unit_bytes + work + states + buffers


def test_a_remote_store_has_no_disk_to_check(tiny_llama: Path) -> None:
    plan = price(tiny_llama, remove=1, store="s3://bucket/store")
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
    plan = price(tiny_llama, remove=1, sequences=2, length=8, measure=True)
    assert plan.rates is not None
    assert set(plan.rates.flops) == {"float32"}
    assert plan.machine.is_here
    assert plan.seconds is not None
    assert plan.seconds == pytest.approx(sum(stage.seconds or 0.0 for stage in plan.stages))
    for stage in plan.stages:
        assert stage.limited_by == max(stage.parts, key=stage.parts.__getitem__)
        assert max(stage.parts.values()) <= (stage.seconds or 0.0) <= sum(stage.parts.values())


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1024))
    rates = measure_rates([path], ["float32", "float16"], torch.device("cpu"), tmp_path, seconds=0.01)
    assert set(rates.flops) == {"float32", "float16"}
    assert rates.bus is rates.device_float64 is None
    assert [one.name for one in tmp_path.iterdir()] == ["data"], "what was written for it is gone"


@pytest.mark.parametrize("n_remove", [6, 7])
def test_too_many_layers(tiny_llama: Path, n_remove: int) -> None:
    with pytest.raises(RequestError, match=rf"cannot remove {n_remove} of 6 layers: .* number from 1 to 4"):
        price(tiny_llama, remove=n_remove)


def test_positions_past_the_end(tiny_llama: Path) -> None:
    with pytest.raises(RequestError, match=r"no hidden state h\[7\]: .* h\[0\] to h\[6\]"):
        price(tiny_llama, remove=1, layers=(0, 7))


def test_unknown_device(tiny_llama: Path) -> None:
    with pytest.raises(RequestError, match="unknown device 'tpu9'; use auto, cpu, cuda or cuda:N"):
        price(tiny_llama, remove=1, device="tpu9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_missing_accelerator(tiny_llama: Path) -> None:
    with pytest.raises(RequestError, match="torch sees no CUDA device here; use --device cpu"):
        price(tiny_llama, remove=1, device="cuda")


def test_an_accelerator_of_a_number_that_is_not_there(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RequestError, match=r"'cuda:7' was asked for, and torch sees 2 CUDA device.*cuda:1"):
        usable_device("cuda:7")
    assert usable_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["mps", "meta", "tpu9"])
def test_a_device_of_a_kind_that_is_not_computed_on(name: str) -> None:
    with pytest.raises(RequestError, match=f"unknown device '{name}'; use auto, cpu, cuda or cuda:N"):
        usable_device(name)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no model folder at"):
        price(tmp_path / "nothing", remove=1)


def test_the_criterion_decides_what_selecting_takes(tiny_llama: Path) -> None:
    def plan(criterion: str) -> tuple[StageCost, dict[str, Need]]:
        run = price(tiny_llama, remove=2, sequences=4, length=8, criterion=criterion)
        return next(stage for stage in run.stages if stage.name == "select"), dict(run.needs)

    store = price(tiny_llama, remove=2, sequences=4, length=8).needs["disk, store"].n_bytes
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
    layer = price(tiny_llama, remove=2).model.stored_layer_bytes
    assert plan("magnitude")[0].read_bytes == 6 * layer
    cost, needs = plan("residual")
    assert cost.flops == candidates * (3 * c**2 * tokens + 5 * 7 / 3 * c**3)
    assert needs["disk, select"].n_bytes == cost.write_bytes == 16 * candidates * 16 * c**2
    assert plan("residual-in-sample")[1]["disk, select"].n_bytes == 4 * candidates * 16 * c**2
    assert needs["memory, select"].n_bytes == 16 * c**2 + 131072 * c


def test_taps_and_absorbed_operators_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    tokens, c, intermediate = 5 * 8, 32, 64

    def needs(features: str) -> Mapping[str, Need]:
        named = {"operator": "least-squares", "features": features}
        return price(tiny_llama, remove=2, sequences=5, length=8, out=tmp_path, **named).needs

    hidden, mlp, both = needs("hidden"), needs("mlp"), needs("hidden+mlp")
    assert "disk, taps" not in hidden
    assert mlp["disk, taps"].n_bytes == tokens * intermediate * 4
    assert needs("mlp_output")["disk, taps"].n_bytes == tokens * c * 4
    assert hidden["disk, export"].n_bytes - mlp["disk, export"].n_bytes == 4 * c * c
    assert both["disk, taps"].n_bytes == tokens * (c + intermediate) * 4
    assert both["disk, export"].n_bytes == hidden["disk, export"].n_bytes
    with pytest.raises(UnsupportedModelError, match="the norm"):
        price(save_tiny("olmo2", tmp_path / "olmo2"), remove=2, operator="replace-me-ls")


@register_operator("priced-for-a-test")
class _Own(OperatorKind):
    needs_gram = True

    def cost(self, shape: FitShape) -> Cost:
        needed = Need(10**9 * shape.features, "1 GB p")
        return Cost(needed, flops=7.0 * shape.n_tokens, write_bytes=12 * shape.hidden)


@register_criterion("priced-for-a-test")
class _OwnCriterion(Criterion):
    meaning = "nothing"

    def cost(self, shape: SelectionShape) -> Cost:
        needed = Need(3 * shape.hidden, "3 C")
        return Cost(needed, Need(11, "11"), read_bytes=shape.store_bytes * 2, flops=5.0 * shape.remove)


def test_what_a_user_registered_is_priced_by_its_own_cost(tiny_llama: Path) -> None:
    plan = price(
        tiny_llama,
        remove=2,
        sequences=4,
        length=8,
        operator="priced-for-a-test",
        criterion="priced-for-a-test",
    )
    stages = {stage.name: stage for stage in plan.stages}
    assert stages["select"].read_bytes == 2 * plan.needs["disk, store"].n_bytes
    assert (stages["select"].write_bytes, stages["select"].flops) == (11, 10.0)
    assert plan.needs["memory, select"].n_bytes == 3 * 32
    assert plan.needs["disk, select"].n_bytes == 11
    spilled = plan.sweeps[-1].spilled_bytes
    assert (stages["solve"].flops, stages["solve"].write_bytes) == (7.0 * 4 * 8, 12 * 32 + spilled)
    assert plan.needs["memory, solve"].n_bytes == 32 * 10**9
    assert plan.needs["memory, solve"].formula.startswith("max(1 GB p to fit")
    model = plan.model
    assert plan.needs["disk, export"].n_bytes == model.checkpoint_bytes - 2 * model.layer_bytes + 12 * 32
    in_passes = price(tiny_llama, remove=2, operator="priced-for-a-test", criterion="perplexity")
    assert in_passes.needs["memory, fit"].formula.endswith(" sums of 30,504 + 1 GB p to fit")
    assert in_passes.needs["memory, fit"].n_bytes > 32 * 10**9


def test_what_says_no_cost_is_priced_by_what_it_reads(tiny_llama: Path) -> None:
    @register_operator("silent-for-a-test")
    class Silent(OperatorKind):
        needs_gram = True

    @register_criterion("silent-for-a-test")
    class SilentCriterion(Criterion):
        meaning = "nothing"

    given = {"remove": 2, "sequences": 4, "length": 8}
    plan = price(tiny_llama, operator="silent-for-a-test", criterion="silent-for-a-test", **given)
    linear = price(tiny_llama, operator="least-squares", criterion="shortgpt", **given)
    assert plan.stages == linear.stages
    assert plan.needs["memory, solve"].n_bytes == linear.needs["memory, solve"].n_bytes
    assert Silent.__name__ != SilentCriterion.__name__


def test_a_given_plan_needs_its_boundaries_only(tiny_llama: Path) -> None:
    plan = price(tiny_llama, "1:2 4:5", sequences=3, length=10)
    assert [stage.name for stage in plan.stages] == ["capture", "solve", "export"]
    copies = " + 3 S T C b to go on from"
    assert plan.needs["disk, store"].formula == "4 S T C b" + copies
    assert plan.n_removed == 2
    inside = price(tiny_llama, "1:4", sequences=3, length=10, per_layer=True)
    assert inside.needs["disk, store"].formula == "4 S T C b" + copies
    taps = price(tiny_llama, "2:4", sequences=3, length=10, operator="least-squares", features="mlp")
    again = "the layer before is run again on what enters it"
    assert taps.needs["disk, store"].formula == "3 S T C b" + copies, again
    passes = price(tiny_llama, "1:2 4:5", sequences=4, length=10, operator="auto")
    assert [stage.name for stage in passes.stages] == ["fit", "export"]
    model = passes.model
    to_layer_5 = model.checkpoint_bytes - model.head_bytes - model.layer_bytes
    assert passes.stages[0].read_bytes == 2 * model.checkpoint_bytes + to_layer_5, "one a span, one to fit"
    assert "disk, store" not in passes.needs


def test_an_evaluation_is_a_pass_of_both_models(tiny_llama: Path) -> None:
    request = Recovery(
        remove=2,
        calibration=Text(spec="c4", sequences=4, length=8),
        evaluate=Text(spec="c4", sequences=3, length=16),
        compute=Compute(device="cpu"),
    )
    found = estimate(request, model=tiny_llama, measure=False)
    model, last = found.model, found.stages[-1]
    assert last.name == "evaluate"
    assert last.read_bytes == model.checkpoint_bytes, "the recovered model is a lane of the base's pass"
    # Two layers are shared up to the gap, two removed and two run by both; then the head, for both.
    layers = (6 + 2) * 3 * 16 * (2 * (model.layer_elements - 64) + 2 * 16 * 32)
    assert last.flops == layers + 2 * 3 * 16 * 2 * 128 * 32
    assert "memory, evaluate" in found.needs
    unknown = request.model_copy(update={"evaluate": Text(spec="c4")})
    assert estimate(unknown, model=tiny_llama, measure=False).stages[-1].name == "export"


def test_a_request_without_a_model() -> None:
    with pytest.raises(RequestError, match="recovery names no model"):
        estimate(Recovery(remove=1, calibration=Text(spec="c4")))


@pytest.mark.parametrize("given", [(), ("--criterion", "streamline", "--operator", "ghost")])
def test_neither_torch_nor_transformers_nor_zarr_is_waited_for(
    tiny_llama: Path, given: tuple[str, ...]
) -> None:
    arguments = ["estimate", str(tiny_llama), "--remove", "2", "--no-measure", "--device", "cpu", *given]
    code = (
        "import sys\nfrom ghoststream.cli import main\n"
        f"try:\n    main({arguments!r})\nfinally:\n"
        "    print({'torch', 'transformers', 'zarr', 'dask'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
    assert "it fits" in done.stdout
