from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators import BoundaryOperator, OperatorOptions, make_operator
from ghoststream.operators.sketched_rows import RowSketchedLeastSquares
from ghoststream.spans import Span
from ghoststream.statistics import open_source, reduce_boundaries
from ghoststream.statistics.sketch_rows import CHECK_ROWS, RowSketches, RowSketchReducer, count_sketch
from ghoststream.testing.states import ragged_mask, random_states, store_of
from tests.helpers.sketch_problems import DECAYS, SPAN, Problem, make_problem

pytestmark = pytest.mark.unit
Array = npt.NDArray[np.float64]
ONE_RANGE = {"folds": 1, "range_sequences": 32, "workers": 1}


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return make_problem(tmp_path_factory.mktemp("rows") / "store", shape=(32, 64, 12))


def family(**options: Any) -> RowSketchedLeastSquares:
    made = make_operator(
        "least-squares", OperatorOptions(**{"solver": "sketch-rows", "ridge": 0.0, **options})
    )
    assert isinstance(made, RowSketchedLeastSquares)
    return made


def sketched(problem: Problem, *, run: Any = None, **options: Any) -> BoundaryOperator:
    rows = family(**options)
    return rows.fit(rows.reduce(problem.uri, [SPAN], **(run or ONE_RANGE))[SPAN])


def matrix_of(operator: BoundaryOperator) -> Array:
    assert operator.weight is not None
    return operator.weight.T.astype(np.float64)


def whole_sketch(tokens: npt.NDArray[np.int64], n_rows: int, seed: int, purpose: int) -> Array:
    rows, signs = count_sketch(tokens, n_rows, seed, purpose)
    whole = np.zeros((n_rows, len(tokens)))
    whole[rows, np.arange(len(tokens))] = signs
    return whole


def token_numbers(problem: Problem, length: int) -> npt.NDArray[np.int64]:
    return np.flatnonzero(ragged_mask(problem.sequences.max() + 1, length).reshape(-1))


def test_every_token_has_one_row_and_one_sign_of_its_own() -> None:
    tokens = np.arange(20_000)
    rows, signs = count_sketch(tokens, 50, 3, 1)
    counts = np.bincount(rows, minlength=50)
    assert ((counts - 400) ** 2 / 400).sum() < 49 + 5 * np.sqrt(2 * 49)
    assert set(signs.tolist()) == {-1, 1}
    assert abs(signs.sum()) < 5 * np.sqrt(20_000)
    some = np.array([19_999, 4, 4_096, 4_095])
    assert (count_sketch(some, 50, 3, 1)[0] == rows[some]).all()
    assert (count_sketch(some, 50, 3, 1)[1] == signs[some]).all()
    for other in (count_sketch(tokens, 50, 4, 1), count_sketch(tokens, 50, 3, 2)):
        assert abs((other[0] == rows).mean() - 1 / 50) < 5 * np.sqrt(1 / 50 / 20_000)
        assert abs((other[1] * signs).sum()) < 5 * np.sqrt(20_000)


@pytest.mark.parametrize(
    "options", [{}, {"weights": "relative"}, {"weights": "drop_sinks"}, {"feature": "hidden+normed"}], ids=str
)
def test_sketches_of_ranges_add_up_to_that_of_the_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    states = random_states(2, (9, 10, 6))
    states[2][:, 0] *= 300
    mask = np.arange(10) < (10 - np.arange(9) % 4)[:, None]
    uri = store_of(tmp_path / "store", states, mask=mask, norm_epsilon=0.1)
    x, y = states[0][mask].astype(np.float64), states[2][mask].astype(np.float64)
    features, root = x, np.ones((len(x), 1))
    if options.get("feature"):
        features = np.hstack([x, x / np.sqrt((x**2).mean(1, keepdims=True) + 0.1)])
    if options.get("weights") == "relative":
        root = 1 / np.linalg.norm(y, axis=1, keepdims=True)
    if options.get("weights") == "drop_sinks":
        root = (np.flatnonzero(mask.reshape(-1)) % 10 != 0).astype(np.float64)[:, None]
    rows = family(sketch_size=20, seed=5, features=options.get("feature", "hidden"))
    moments = rows.reduce(uri, [Span(0, 2), SPAN], **options, folds=2, range_sequences=2, block_tokens=20)
    found = moments[Span(0, 2)]
    assert isinstance(found, RowSketches)
    sequences = np.nonzero(mask)[0]
    for fold in range(2):
        inside = (sequences // 2 % 2 == fold)[:, None] * root
        sketch = whole_sketch(np.flatnonzero(mask.reshape(-1)), 10, 5, 1)  # fewer rows than 12 features
        total = found.fold(fold)
        left, right = sketch @ (features * inside), sketch @ ((y - x) * inside)
        np.testing.assert_allclose(total.triangle.T @ total.triangle, left.T @ left, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(total.triangle.T @ total.rotated, left.T @ right, rtol=1e-9, atol=1e-9)
        matrix = np.random.default_rng(0).standard_normal((features.shape[1], 6))
        residual = ((left @ matrix - right) ** 2).sum()
        assert total.linear_residual(matrix) == pytest.approx(residual, rel=1e-9)
        assert total.n_tokens == np.count_nonzero(inside)
        check = whole_sketch(np.flatnonzero(mask.reshape(-1)), CHECK_ROWS, 5, 2)
    energies = [
        (
            (
                (check @ ((features @ matrix - (y - x)) * root * (sequences // 2 % 2 == fold)[:, None])) ** 2
            ).sum()
        )
        for fold in range(2)
    ]
    energy, deviation = found.check(matrix)
    assert energy == pytest.approx(sum(energies))
    assert deviation == pytest.approx(np.sqrt(2 / CHECK_ROWS * np.square(energies).sum()))


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_solution_is_that_of_the_sketched_problem(
    problem: Problem, ridge: float, rank: int | None
) -> None:
    sketch = whole_sketch(token_numbers(problem, 64), 40, 7, 1)
    small = Problem("", sketch @ problem.features, sketch @ problem.gap, problem.sequences)
    best = small.best(small.ridge(ridge))
    if rank is not None:
        right = np.linalg.svd(small.fitted_values(small.ridge(ridge)))[2][:rank]
        best = best @ right.T @ right
    operator = sketched(problem, sketch_size=40, seed=7, ridge=ridge, rank=rank)
    np.testing.assert_allclose(matrix_of(operator), best, rtol=1e-4, atol=1e-5)
    assert operator.diagnostics["sketch_rows"] == 40


@pytest.mark.parametrize("decay", DECAYS)
def test_the_excess_falls_with_oversampling_as_that_of_gaussian_sketches(tmp_path: Path, decay: str) -> None:
    """In the mean, the sum of squares is ``1 + p / (s - p - 1)`` times the best for a Gaussian sketch."""
    problem = make_problem(tmp_path / "store", shape=(16, 64, 12), decay=DECAYS[decay])
    least, size = problem.objective(problem.best(0.0), 0.0), 12
    for oversampling in (2, 4, 16):
        rows = oversampling * size
        excess = [
            problem.objective(matrix_of(sketched(problem, sketch_size=rows, seed=seed)), 0.0) / least - 1
            for seed in range(7)
        ]
        assert min(excess) > 0
        assert np.mean(excess) == pytest.approx(size / (rows - size - 1), rel=0.35)


def test_residuals_are_estimated_without_bias(problem: Problem) -> None:
    truths, checks, sketches, bounds = [], [], [], []
    energy = (problem.gap**2).sum()
    for seed in range(16):
        operator = sketched(problem, sketch_size=36, seed=seed)
        truth = problem.objective(matrix_of(operator), 0.0)
        found = operator.diagnostics
        truths.append(truth)
        checks.append(found["relative_residual"] ** 2 * energy / truth - 1)
        sketches.append(found["relative_residual_sketched"] ** 2 * energy / truth - 1)
        bounds.append(2 * found["relative_residual_standard_error"] / found["relative_residual"])
    spread = np.std(checks, ddof=1)
    assert abs(np.mean(checks)) < 4 * spread / np.sqrt(16)
    assert spread < np.mean(bounds)
    assert np.mean(bounds) == pytest.approx(np.sqrt(2 / CHECK_ROWS))
    assert np.mean(sketches) < -0.3


def test_held_out_folds_are_estimated_without_bias(problem: Problem) -> None:
    errors, total = [], []
    for seed in range(8):
        operator = sketched(
            problem, sketch_size=96, seed=seed, run={"folds": 2, "range_sequences": 1, "workers": 1}
        )
        sketch = whole_sketch(token_numbers(problem, 64), 48, seed, 1)
        missed = 0.0
        for fold in range(2):
            held = problem.sequences % 2 == fold
            kept = Problem(
                "",
                sketch[:, ~held] @ problem.features[~held],
                sketch[:, ~held] @ problem.gap[~held],
                problem.sequences,
            )
            best = kept.best(0.0)
            missed += ((problem.features[held] @ best - problem.gap[held]) ** 2).sum()
        total.append(missed)
        energy = (problem.gap**2).sum()
        errors.append(operator.diagnostics["relative_residual_out_of_sample"] ** 2 * energy / missed - 1)
    assert abs(np.mean(errors)) < 4 * np.std(errors, ddof=1) / np.sqrt(8)
    assert np.std(errors, ddof=1) < 1.3 * np.sqrt(2 / 96)


def test_exact_figures_are_exact(problem: Problem) -> None:
    run: dict[str, Any] = {"folds": 4, "range_sequences": 2}
    found = sketched(problem, run=run).diagnostics
    exact = make_operator("least-squares", OperatorOptions(ridge=0.0)).fit(
        reduce_boundaries(problem.uri, [SPAN], **run)[SPAN]
    )
    for key in (
        "n_tokens",
        "n_sequences",
        "relative_gap_energy",
        "dropped_share",
        "folds",
    ):
        assert found[key] == pytest.approx(exact.diagnostics[key]), key
    variation = ((problem.gap - problem.gap.mean(axis=0)) ** 2).sum()
    residual = found["relative_residual"] ** 2 * (problem.gap**2).sum()
    assert found["r2"] == pytest.approx(1 - residual / variation)
    assert (found["sketch_rows"], found["solver"], found["solver_in_sketch"]) == (48, "sketch-rows", "tsqr")


def test_bits_depend_on_the_seed_only(problem: Problem, tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [
        {"workers": 1},
        {"workers": 3},
        {"workers": 3, "workdir": tmp_path / "work"},
        {"workers": 1, "workdir": tmp_path / "work"},
    ]
    found = [sketched(problem, run={**run, "folds": 2, "range_sequences": 4}) for run in runs]
    for other in found[1:]:
        assert matrix_of(other).tobytes() == matrix_of(found[0]).tobytes()
        assert other.diagnostics == found[0].diagnostics
    reseeded = sketched(problem, seed=1, run={"folds": 2, "range_sequences": 4})
    assert not np.allclose(matrix_of(reseeded), matrix_of(found[0]), rtol=1e-3)


def test_a_range_task_stays_within_the_stated_memory(tmp_path: Path) -> None:
    hidden, length = 128, 128
    source = open_source(store_of(tmp_path / "store", random_states(2, (8, length, hidden))))
    for spans in ((SPAN,), (SPAN, Span(0, 2))):
        reducer = RowSketchReducer(spans, block_tokens=256, rows=300)
        reducer.reduce(source, 0, 2)
        tracemalloc.start()
        try:
            state = reducer.reduce(source, 0, 8)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert state.n_bytes <= reducer.state_bytes(hidden, length) <= 1.01 * state.n_bytes
        assert peak < 1.1 * reducer.task_bytes(hidden, length)


def test_what_row_sketches_cannot_do_is_refused(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="12 rows cannot tell 12 features apart"):
        sketched(problem, sketch_size=12)
    with pytest.raises(RequestError, match="sketch-rows fits without power iterations"):
        family(power_iterations=1)
    with pytest.raises(RequestError, match="sketches are built in float64, not float32-blocked"):
        sketched(problem, run={"precision": "float32-blocked"})
    with pytest.raises(RequestError, match=r"needs sketches of the rows at \[0,1\)"):
        family().fit(reduce_boundaries(problem.uri, [SPAN])[SPAN])
    with pytest.raises(RequestError, match="a sketch of 0 rows was asked for"):
        RowSketchReducer((SPAN,), rows=0)
    with pytest.raises(RequestError, match="rank 13 was asked for"):
        sketched(problem, rank=13)
    with pytest.raises(TypeError, match="sketches take no rotated"):
        family().reduce(problem.uri, [SPAN], rotated=True)
    uri = store_of(tmp_path / "none", random_states(1, (4, 6, 5)), mask=np.zeros((4, 6), dtype=bool))
    rows = family()
    with pytest.raises(NumericsError, match="no token entered"):
        rows.fit(rows.reduce(uri, [SPAN], folds=2)[SPAN])
