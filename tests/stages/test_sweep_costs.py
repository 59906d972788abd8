"""``plan`` says how often the store is read: the numbers must be those that the engine then shows, task by task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ghoststream.stages.solve import solve

from ghoststream.cli import main
from ghoststream.errors import PlanError
from ghoststream.options import Method
from ghoststream.progress import SilentProgress
from ghoststream.spans import PruningPlan
from ghoststream.stages.planning.plan import MomentOptions, plan_run
from ghoststream.stages.planning.sweep_costs import MomentRequest, StoreShape, select_sweeps, solve_sweeps
from ghoststream.stages.select import select
from ghoststream.statistics import BoundaryMoments
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.testing.states import random_states, store_of

pytestmark = pytest.mark.integration
L, SHAPE = 9, (8, 32, 12)
STORED: dict[str, Any] = {"criterion": "streamline", "operator": "ghost"}
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


def _largest(**statistic: Any) -> int:
    return max(BoundaryReducer((span,), **statistic).task_bytes(SHAPE[2], SHAPE[1]) for span in PLAN.spans)


@pytest.mark.parametrize("factor", [1.0, 100.0])
@pytest.mark.parametrize(
    "fit",
    [
        {"operator": "ghost"},
        {"operator": "least-squares", "features": "hidden+normed", "weights": "relative", "folds": 2},
        {"operator": "least-squares", "solver": "tsqr", "intercept": True, "ridge": 1e-4},
        {"operator": "least-squares", "solver": "sketch-features", "rank": 3, "power_iterations": 2},
        {"operator": "least-squares", "solver": "sketch-range", "sketch_size": 6, "folds": 0},
        {"operator": "least-squares", "solver": "sketch-rows"},
    ],
    ids=lambda fit: "-".join(map(str, fit.values())),
)
def test_the_sweeps_of_solve_are_those_that_it_makes(
    uri: str, tmp_path: Path, fit: dict[str, Any], factor: float
) -> None:
    given = dict(fit)
    operator, weights = given.pop("operator"), given.pop("weights", "uniform")
    folds = given.pop("folds", 4)
    options = Method(**given)
    request = MomentRequest(PLAN.spans, operator, options, weights, folds=folds, memory=10**9, workers=1)
    shape = StoreShape(*SHAPE)
    spacious = solve_sweeps(request, shape)
    assert [cost.sweeps for cost in spacious] == [1] * len(spacious)
    # What a task over one span may take at most, in any of the statistics.
    alone = [solve_sweeps(MomentRequest((span,), *_rest(request)), shape) for span in PLAN.spans]
    memory = int(factor * max(cost.task_bytes for costs in alone for cost in costs))
    costs = solve_sweeps(MomentRequest(PLAN.spans, *_rest(request, memory)), shape)
    told = Told()
    solve(
        uri,
        PLAN,
        operator=operator,
        options=options,
        weights=weights,
        folds=folds,
        out=tmp_path / "operators.safetensors",
        memory=memory,
        workers=1,
        progress=told,
    )
    assert {cost.statistic: cost.sweeps for cost in costs} == told.sweeps()
    assert all(cost.task_bytes <= memory and cost.problem is None for cost in costs)
    assert sum(cost.sweeps for cost in costs) > len(costs) or factor > 1.0


def _rest(request: MomentRequest, memory: int = 10**9) -> tuple[Any, ...]:
    return (request.operator, request.options, request.weights, "float64", request.folds, 0, memory, 1)


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
    solve(uri, PLAN, out=out, memory=memory, workers=1)
    request = MomentRequest(PLAN.spans, memory=memory, workers=1)
    (cost,) = solve_sweeps(request, StoreShape(*SHAPE))
    assert cost.sweeps == 4
    # Four folds keep a state of every span; beyond that the run at work may hold some more.
    states = 4 * sum(BoundaryReducer((span,)).state_bytes(SHAPE[2], SHAPE[1]) for span in PLAN.spans)
    assert states <= max(seen) <= cost.disk_bytes


@pytest.mark.parametrize("criterion", ["residual", "residual-in-sample"])
def test_the_sweeps_of_select_are_those_that_it_makes(uri: str, tmp_path: Path, criterion: str) -> None:
    bounds = MomentRequest(PLAN.spans, memory=_largest(weights="drop_sinks"), workers=1)
    (cost,) = select_sweeps(criterion, L, 3, StoreShape(*SHAPE), bounds)
    told = Told()
    select(
        uri, 3, criterion=criterion, out=tmp_path / "p.json", memory=bounds.memory, workers=1, progress=told
    )
    assert told.sweeps() == {"moments": cost.sweeps}
    assert cost.sweeps > 1
    assert cost.spans == 5
    assert select_sweeps("streamline", L, 3, StoreShape(*SHAPE), bounds) == ()


def test_wide_features_are_reduced_span_by_span() -> None:
    # Llama 3 70B: C = 8,192, I = 28,672; a Gram of 6.1 GiB, and 8 p C of a cross-moment beside it.
    shape = StoreShape(128, 512, 8192)
    options = Method(features="mlp")
    spans = PruningPlan.parse(80, "40:48 60:64").spans
    request = MomentRequest(spans, "least-squares", options, tap_width=28672, memory=2**36, workers=1)
    (cost,) = solve_sweeps(request, shape)
    assert (cost.spans, cost.sweeps, cost.positions_read) == (2, 2, 4)
    gram, cross = 8 * 28672**2, 8 * 28672 * 8192
    assert gram + cross < cost.task_bytes < 1.5 * (gram + cross)
    (small,) = solve_sweeps(
        MomentRequest(spans, "least-squares", options, tap_width=28672, memory=2**32, workers=1), shape
    )
    assert small.sweeps == 0
    assert small.problem is not None
    assert "solve: the moments of [40,48) alone take" in small.problem


def test_the_plan_of_a_run_has_them(tiny_llama: Path) -> None:
    request: dict[str, Any] = {"n_remove": 2, "sequences": 8, "length": 16, "measure": False}
    one = plan_run(tiny_llama, **STORED, **request)
    assert [(cost.stage, cost.spans, cost.sweeps) for cost in one.sweeps] == [("solve", 1, 1)]
    few = MomentOptions("1:2 4:5", memory=BoundaryReducer((_span(),)).task_bytes(32, 16), workers=1)
    several = plan_run(tiny_llama, criterion="residual", operator="ghost", moments=few, **request)
    assert [cost.stage for cost in several.sweeps] == ["select", "solve"]
    solving = several.sweeps[1]
    assert (solving.spans, solving.sweeps) == (2, 2)
    read = {stage.name: stage.read_bytes for stage in several.stages}
    assert read["solve"] == 2 * {stage.name: stage.read_bytes for stage in one.stages}["solve"]
    # Weights other than uniform take more than is allowed here.
    assert several.sweeps[0].sweeps == 0
    assert any(problem.startswith("select: the moments of") for problem in several.problems)
    assert several.to_json()["sweeps"][1]["sweeps"] == 2
    fitted = STORED | {"operator": "least-squares"}
    taps = plan_run(tiny_llama, options=Method(features="mlp"), **fitted, **request).sweeps[0]
    assert taps.task_bytes > one.sweeps[0].task_bytes
    sketch = Method(solver="sketch-range", rank=2)
    sketched = plan_run(tiny_llama, options=sketch, **fitted, **request)
    assert [cost.statistic for cost in sketched.sweeps] == ["range finder", "projected moments"]
    assert "24 p^2 + 16 p C, as p = 32 to fit" in sketched.needs["memory, solve"].formula
    with pytest.raises(PlanError, match="removes 1 layers, and 2 were asked for"):
        plan_run(tiny_llama, moments=MomentOptions("1:2"), **STORED, **request)


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
    plan = plan_run(
        tiny_llama,
        n_remove=2,
        criterion="streamline",
        operator=operator,
        options=Method(features=features),
        measure=False,
    )
    (cost,) = plan.sweeps
    # The model is so small that blocks of hidden states outweigh any fit.
    assert plan.needs["memory, solve"].n_bytes == cost.task_bytes


def test_the_command_prints_them(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        str(tiny_llama),
        "--remove",
        "2",
        "--plan",
        "1:2 4:5",
        "--memory",
        "100MB",
        "--no-measure",
        "--criterion",
        "streamline",
    ]
    sketch = [
        "--operator",
        "least-squares",
        "--solver",
        "sketch-features",
        "--rank",
        "2",
        "--power-iterations",
        "1",
    ]
    for options in (["--operator", "ghost"], sketch):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *options])
        assert ended.value.code in (0, None)
    plain, sketched = capsys.readouterr().out.split("whole model")[1:]
    assert "tasks at a time" in plain
    assert "power iteration" not in plain
    assert "power iteration 1 of 1" in sketched
    assert "projected moments" in sketched


def _span() -> Any:
    return PruningPlan.parse(6, "1:2").spans[0]
