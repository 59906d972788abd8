"""``estimate`` says how often the store is read: the numbers must be those that the engine then shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ghoststream.cli import main
from ghoststream.costs import SelectionShape
from ghoststream.operators import make_operator
from ghoststream.options import Compute, Method, Recovery, Reduction, Search, Source, Text
from ghoststream.progress import SilentProgress
from ghoststream.selection import make_criterion
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.estimation.report import Estimate, SweepCost
from ghoststream.stages.estimation.sweeps import StoreShape, select_sweeps, solve_sweeps
from ghoststream.stages.fit import fit
from ghoststream.stages.select import select
from ghoststream.statistics import BoundaryMoments
from ghoststream.statistics.boundary import BoundaryReducer, MomentSpec
from ghoststream.testing.states import random_states, store_of

pytestmark = pytest.mark.integration
L, SHAPE = 9, (8, 32, 12)
STORE = StoreShape(*SHAPE)
PLAN = PruningPlan.parse(L, "1:2 3:4 5:6 7:8")


class Told(SilentProgress):
    """The tasks that a stage tells of, those that do not read the store left out."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def start(self, task: str, total: int, unit: str) -> None:
        if unit == "sequences":
            self.tasks.append(task)

    def sweeps(self) -> dict[str, int]:
        """How often each statistic swept the store."""
        names = [task.partition(", sweep")[0] for task in self.tasks]
        return {name: names.count(name) for name in names}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_of(tmp_path_factory.mktemp("sweeps") / "store", random_states(L, SHAPE), norm_epsilon=1e-5)


def _largest(spec: MomentSpec | None = None) -> int:
    reducers = [BoundaryReducer((span,), spec or MomentSpec()) for span in PLAN.spans]
    return max(reducer.task_bytes(SHAPE[2], SHAPE[1]) for reducer in reducers)


def _sweeps(
    method: Method, spans: tuple[Span, ...] = PLAN.spans, memory: int = 10**9, folds: int = 4
) -> tuple[SweepCost, ...]:
    reduction = Reduction.make({"memory": memory, "workers": 1})
    return solve_sweeps(make_operator(method), spans, STORE, folds=folds, reduction=reduction)


@pytest.mark.parametrize("factor", [1.0, 100.0])
@pytest.mark.parametrize(
    "given",
    [
        {"operator": "ghost"},
        {"operator": "least-squares", "features": "hidden+normed", "token_weights": "relative", "folds": 2},
        {"operator": "least-squares", "solver": "tsqr", "intercept": True, "ridge": 1e-4},
        {"operator": "least-squares", "solver": "sketch-features", "rank": 3, "power_iterations": 2},
        {"operator": "least-squares", "solver": "sketch-range", "sketch_size": 6, "folds": 0},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_the_sweeps_of_a_fit_are_those_that_it_makes(
    uri: str, tmp_path: Path, given: dict[str, Any], factor: float
) -> None:
    folds = given.get("folds", 4)
    method = Method(**{name: value for name, value in given.items() if name != "folds"})
    spacious = _sweeps(method, folds=folds)
    assert [cost.sweeps for cost in spacious] == [1] * len(spacious)
    # What a task over one span may take at most, in any of the statistics.
    alone = [_sweeps(method, (span,), folds=folds) for span in PLAN.spans]
    memory = int(factor * max(cost.task_bytes for costs in alone for cost in costs))
    costs = _sweeps(method, memory=memory, folds=folds)
    told = Told()
    fit(
        PLAN,
        Source(store=uri),
        method=method,
        search=Search(folds=folds),
        reduction=Reduction.make({"memory": memory, "workers": 1}),
        out=tmp_path / "operators.safetensors",
        progress=told,
    )
    assert {cost.statistic: cost.sweeps for cost in costs} == told.sweeps()
    assert all(cost.task_bytes <= memory and cost.problem is None for cost in costs)
    assert sum(cost.sweeps for cost in costs) > len(costs) or factor > 1.0


def test_what_is_said_to_be_kept_on_disk_is_kept_at_most(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "operators.safetensors", [0]
    total = BoundaryMoments.__init__

    def measured(self: BoundaryMoments, *arguments: Any, **named: Any) -> None:
        work = out.with_name("operators.safetensors.partial")
        seen.append(sum(path.stat().st_size for path in work.rglob("fold*.safetensors")))
        total(self, *arguments, **named)

    monkeypatch.setattr(BoundaryMoments, "__init__", measured)
    memory = _largest()
    fit(PLAN, Source(store=uri), out=out, reduction=Reduction.make({"memory": memory, "workers": 1}))
    (cost,) = _sweeps(Method(operator="ghost"), memory=memory)
    assert cost.sweeps == 4
    # Four folds keep a state of every span; beyond that the run at work may hold some more.
    states = 4 * sum(BoundaryReducer((span,)).state_bytes(SHAPE[2], SHAPE[1]) for span in PLAN.spans)
    assert states <= max(seen) <= cost.disk_bytes


@pytest.mark.parametrize("criterion", ["residual", "residual-in-sample"])
def test_the_sweeps_of_select_are_those_that_it_makes(uri: str, tmp_path: Path, criterion: str) -> None:
    memory = _largest(MomentSpec(token_weights="drop_sinks"))
    reduction = Reduction.make({"memory": memory, "workers": 1})
    shape = SelectionShape(L, 3, SHAPE[2], SHAPE[0], SHAPE[1], store_bytes=1, layer_bytes=1, layer_elements=1)
    (cost,) = select_sweeps(make_criterion(criterion).cost(shape).repairs, STORE, reduction)
    told = Told()
    select(
        3,
        Source(store=uri),
        search=Search(criterion=criterion),
        reduction=reduction,
        out=tmp_path / "p.json",
        progress=told,
    )
    assert told.sweeps() == {"moments": cost.sweeps}
    assert cost.sweeps > 1
    assert cost.spans == 5
    assert select_sweeps(make_criterion("streamline").cost(shape).repairs, STORE, reduction) == ()


def test_wide_features_are_reduced_span_by_span() -> None:
    # Llama 3 70B: C = 8,192, I = 28,672; a Gram of 6.1 GiB, and 8 p C of a cross-moment beside it.
    kind = make_operator(Method(operator="least-squares", features="mlp"))
    spans, shape = PruningPlan.parse(80, "40:48 60:64").spans, StoreShape(128, 512, 8192)

    def costs(memory: int) -> tuple[SweepCost, ...]:
        reduction = Reduction.make({"memory": memory, "workers": 1})
        return solve_sweeps(kind, spans, shape, folds=4, reduction=reduction, tap_width=28672)

    (cost,) = costs(2**36)
    assert (cost.spans, cost.sweeps, cost.positions_read) == (2, 2, 4)
    gram, cross = 8 * 28672**2, 8 * 28672 * 8192
    assert gram + cross < cost.task_bytes < 1.5 * (gram + cross)
    (small,) = costs(2**32)
    assert small.sweeps == 0
    assert small.problem is not None
    assert "solve: the moments of [40,48) alone take" in small.problem


def price(model: Path, remove: int | str = 2, **given: Any) -> Estimate:
    """The estimate of a recovery by way of a store."""
    criterion = {"criterion": given.pop("criterion", "streamline")} if isinstance(remove, int) else {}
    reduction = Reduction(**{name: given.pop(name) for name in ("memory", "workers") if name in given})
    recovery = Recovery(
        remove=remove,
        calibration=Text(spec="ids:none.npy", sequences=8, length=16),
        search=Search(**criterion),
        method=Method(**{"operator": "ghost", **given}),
        compute=Compute(device="cpu"),
        reduction=reduction,
    )
    return estimate(recovery, model=model, measure=False)


def test_the_estimate_has_them(tiny_llama: Path) -> None:
    one = price(tiny_llama)
    assert [(cost.stage, cost.spans, cost.sweeps) for cost in one.sweeps] == [("solve", 1, 1)]
    memory = BoundaryReducer((Span(1, 2),)).task_bytes(32, 16)
    few = price(tiny_llama, "1:2 4:5", memory=memory, workers=1)
    (solving,) = few.sweeps
    assert (solving.stage, solving.spans, solving.sweeps) == ("solve", 2, 2)
    read = {stage.name: stage.read_bytes for stage in few.stages}
    assert read["solve"] == 2 * {stage.name: stage.read_bytes for stage in one.stages}["solve"]
    # Weights other than uniform take more than is allowed here.
    tight = price(tiny_llama, criterion="residual", memory=memory, workers=1)
    assert [cost.stage for cost in tight.sweeps] == ["select", "solve"]
    assert tight.sweeps[0].sweeps == 0
    assert any(problem.startswith("select: the moments of") for problem in tight.problems)
    assert few.to_json()["sweeps"][0]["sweeps"] == 2
    taps = price(tiny_llama, operator="least-squares", features="mlp").sweeps[0]
    assert taps.task_bytes > one.sweeps[0].task_bytes
    sketched = price(tiny_llama, operator="least-squares", solver="sketch-range", rank=2)
    assert [cost.statistic for cost in sketched.sweeps] == ["range finder", "projected moments"]
    assert "24 p^2 + 16 p C, as p = 32 to fit" in sketched.needs["memory, solve"].formula


@pytest.mark.parametrize(
    ("operator", "features"),
    [
        ("ghost", "hidden"),
        ("diagonal", "hidden"),
        ("least-squares", "hidden+normed"),
        ("least-squares", "mlp"),
        ("least-squares", "hidden+mlp"),
        ("replace-me-ls", "hidden"),
    ],
)
def test_solving_takes_what_a_task_takes(tiny_llama: Path, operator: str, features: str) -> None:
    found = price(tiny_llama, operator=operator, features=features)
    (cost,) = found.sweeps
    # The model is so small that blocks of hidden states outweigh any fit.
    assert found.needs["memory, solve"].n_bytes == cost.task_bytes


def test_the_command_prints_them(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", str(tiny_llama), "--memory", "100MB", "--no-measure"]
    sketch = ["--solver", "sketch-features", "--rank", "2", "--power-iterations", "1"]
    for options in (
        ["--remove", "1:2 4:5", "--operator", "ghost"],
        ["--remove", "2", "--criterion", "streamline", "--operator", "least-squares", *sketch],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *options])
        assert ended.value.code in (0, None)
    plain, sketched = capsys.readouterr().out.split("whole model")[1:]
    assert "tasks at a time" in plain
    assert "power iteration" not in plain
    assert "power iteration 1 of 1" in sketched
    assert "projected moments" in sketched
