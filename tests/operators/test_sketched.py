from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators import BoundaryOperator, make_operator
from ghoststream.operators.least_squares import reduce_rank
from ghoststream.operators.sketch_run import Sketch, SketchRun, project_by_features
from ghoststream.operators.sketched import ProjectedLeastSquares, missed_energies, reduce_rank_thin
from ghoststream.options import Method, Reduction
from ghoststream.statistics import MomentSpec, open_source, store_ranges
from ghoststream.statistics.sketch_projection import ProjectedMoments, ProjectionReducer
from ghoststream.statistics.sketch_range import PowerReducer, RangeReducer
from ghoststream.statistics.sketches import FEATURES, GAP, Bases, gaussian
from ghoststream.testing.states import random_states, store_of
from tests.helpers.peak import Peak
from tests.helpers.reducing import moments_of, reduced_by
from tests.helpers.sketch_problems import DECAYS, SPAN, Problem, make_problem

pytestmark = pytest.mark.unit
Array = npt.NDArray[np.float64]
RATIO = 1e-3
ONE_RANGE = {"folds": 1, "range_sequences": 8, "workers": 1}
BOTH = ("sketch-features", "sketch-range")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Problem]:
    folder = tmp_path_factory.mktemp("sketches")
    return {name: make_problem(folder / name, decay=decay) for name, decay in DECAYS.items()}


def sketched(problem: Problem, solver: Any, *, run: Any = None, **options: Any) -> BoundaryOperator:
    family = make_operator(Method(operator="least-squares", solver=solver, ridge=RATIO, **options))
    assert isinstance(family, ProjectedLeastSquares)
    return family.fit(reduced_by(family, problem.uri, [SPAN], **(run or ONE_RANGE))[SPAN])


def matrix_of(operator: BoundaryOperator) -> Array:
    assert operator.weight is not None
    return operator.weight.T.astype(np.float64)


@pytest.mark.parametrize("solver", BOTH)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rank", [None, 5])
def test_a_sketch_as_large_as_the_problem_is_exact(
    problems: dict[str, Problem], solver: str, decay: str, rank: int | None
) -> None:
    problem = problems[decay]
    size, ridge = problem.features.shape[1], problem.ridge(RATIO)
    best, fitted = problem.best(ridge), problem.fitted_values(ridge)
    if rank is not None:
        right = np.linalg.svd(fitted)[2][:rank]
        best = best @ right.T @ right
    operator = sketched(problem, solver, rank=rank, sketch_size=size)
    np.testing.assert_allclose(matrix_of(operator), best, rtol=1e-4, atol=1e-5)
    missed = ((problem.features @ best - problem.gap) ** 2).sum() / (problem.gap**2).sum()
    assert operator.diagnostics["relative_residual"] == pytest.approx(np.sqrt(missed), rel=1e-6)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("rank", "oversampling"), [(2, 2), (2, 8), (6, 6)])
def test_the_feature_sketch_keeps_its_guarantee(
    problems: dict[str, Problem], decay: str, rank: int, oversampling: int
) -> None:
    """Halko, Martinsson, Tropp, theorem 10.5, in the mean over seeds, for the best split of the columns."""
    problem, columns = problems[decay], rank + oversampling
    ridge = problem.ridge(RATIO)
    best = problem.best(ridge)
    least = problem.objective(best, ridge)
    values = np.linalg.svd(problem.fitted_values(ridge), compute_uv=False) ** 2
    operators = [sketched(problem, "sketch-features", sketch_size=columns, seed=seed) for seed in range(5)]
    excess = np.array([problem.objective(matrix_of(operator), ridge) - least for operator in operators])
    assert excess.min() >= values[columns:].sum() * (1 - 1e-5), "better than the best of that rank"
    tails = np.linalg.svd(problem.features, compute_uv=False) ** 2 + ridge
    assert excess.mean() <= np.linalg.norm(best, 2) ** 2 * theorem(tails, columns)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("rank", "oversampling"), [(3, 3), (3, 12), (8, 8)])
def test_the_range_sketch_is_close_to_reduced_rank_regression(
    problems: dict[str, Problem], decay: str, rank: int, oversampling: int
) -> None:
    """What it exceeds the best of that rank by is, in the mean over seeds, at most the error estimate, and
    that at most
    what theorem 10.5 says."""
    problem, columns = problems[decay], rank + oversampling
    ridge, energy = problem.ridge(RATIO), (problem.gap**2).sum()
    values = np.linalg.svd(problem.fitted_values(ridge), compute_uv=False) ** 2
    best = problem.objective(problem.best(ridge), ridge) + values[rank:].sum()
    operators = [
        sketched(problem, "sketch-range", rank=rank, sketch_size=columns, seed=seed) for seed in range(5)
    ]
    excess = np.array([problem.objective(matrix_of(operator), ridge) - best for operator in operators])
    assert np.linalg.matrix_rank(matrix_of(operators[0]), tol=1e-5) == rank
    assert excess.min() >= -1e-5 * energy, "better than the best of that rank"
    estimates = np.array([operator.diagnostics["excess_estimate"] for operator in operators]) * energy
    assert excess.mean() <= 1.1 * estimates.mean()
    assert estimates.mean() <= theorem(values, columns)
    assert estimates.mean() >= values[columns:].sum()


def theorem(squares: Any, columns: int) -> float:
    """What a range finder of so many columns misses in the mean, at most, of a matrix of these squared
    singular values."""
    return min((1 + t / (columns - t - 1)) * float(squares[t:].sum()) for t in range(columns - 1))


def test_error_estimates_are_without_bias(problems: dict[str, Problem]) -> None:
    problem = problems["slow"]
    ridge = problem.ridge(RATIO)
    least, energy = problem.objective(problem.best(ridge), ridge), (problem.gap**2).sum()
    augmented = np.vstack([problem.features, np.sqrt(ridge) * np.eye(problem.features.shape[1])])
    errors: dict[str, list[float]] = {name: [] for name in BOTH}
    deviations: dict[str, list[float]] = {name: [] for name in BOTH}
    spreads = []
    for seed in range(16):
        found = {name: sketched(problem, name, sketch_size=6, seed=seed) for name in BOTH}
        basis = np.linalg.qr(augmented @ gaussian(seed, FEATURES, 24, 6))[0]
        lost = ((augmented - basis @ (basis.T @ augmented)) ** 2).sum() / (augmented**2).sum()
        excess = (problem.objective(matrix_of(found["sketch-range"]), ridge) - least) / energy
        for name, key, truth in (
            ("sketch-range", "excess", excess),
            ("sketch-features", "lost_features", lost),
        ):
            diagnostics = found[name].diagnostics
            errors[name].append(diagnostics[f"{key}_estimate"] / truth - 1)
            deviations[name].append(diagnostics[f"{key}_standard_error"] / truth)
    for name in BOTH:
        spread = np.std(errors[name], ddof=1)
        spreads.append(spread)
        assert abs(np.mean(errors[name])) < 4 * spread / np.sqrt(16), name
        assert np.mean(deviations[name]) == pytest.approx(spread, rel=0.5), name
    assert max(spreads) < np.sqrt(2 / 10)


def test_probes_measure_what_a_subspace_misses() -> None:
    rng = np.random.default_rng(0)
    data, columns = rng.standard_normal((50, 12)), rng.standard_normal((12, 7))
    images = np.vstack([data, np.sqrt(0.5) * np.eye(12)]) @ columns
    basis = np.linalg.qr(images[:, :4])[0]
    rest = images[:, 4:] - basis @ (basis.T @ images[:, 4:])
    found = missed_energies((data @ columns).T @ (data @ columns), columns, 3, 0.5)
    np.testing.assert_allclose(found, (rest**2).sum(axis=0), rtol=1e-10)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_thin_rank_reduction_is_that_of_least_squares(rank: int) -> None:
    rng = np.random.default_rng(0)
    root, cross = rng.standard_normal((30, 7)), rng.standard_normal((7, 20))
    gram = root.T @ root
    matrix: Any = np.linalg.solve(gram, cross)
    left = np.linalg.svd(np.linalg.cholesky(gram).T @ matrix, full_matrices=False)
    truth = np.linalg.solve(np.linalg.cholesky(gram).T, (left[0][:, :rank] * left[1][:rank]) @ left[2][:rank])
    np.testing.assert_allclose(reduce_rank_thin(matrix, gram, rank), truth, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(reduce_rank(matrix, cross.T @ matrix, rank), truth, rtol=1e-9, atol=1e-12)


def test_power_iterations_span_powers_of_the_gram(problems: dict[str, Problem]) -> None:
    problem = problems["slow"]
    gram = problem.features.T @ problem.features
    lost = []
    for power in range(4):
        run = SketchRun(problem.uri, store_ranges(problem.uri, folds=2), Reduction(), None, None)
        projected = project_by_features(run, Sketch((SPAN,), MomentSpec(), None, 24, 5, 3), power)[SPAN]
        assert isinstance(projected, ProjectedMoments)
        basis, _ = projected.basis()
        wanted = np.linalg.qr(np.linalg.matrix_power(gram, power) @ gaussian(3, FEATURES, 24, 5))[0]
        np.testing.assert_allclose(basis @ basis.T, wanted @ wanted.T, atol=1e-7)
        lost.append(((problem.features - problem.features @ basis @ basis.T) ** 2).sum())
    assert lost == sorted(lost, reverse=True)
    least = (np.linalg.svd(problem.features, compute_uv=False)[5:] ** 2).sum()
    assert lost[0] > 1.2 * least
    assert lost[3] < 1.1 * least


@pytest.mark.parametrize("n_sequences", [8, 2])
def test_residuals_out_of_sample_are_of_subspaces_that_have_not_seen_the_fold(
    tmp_path: Path, n_sequences: int
) -> None:
    """With two sequences there are fewer tokens than features in a fold: what has seen it would predict it
    perfectly."""
    problem = make_problem(tmp_path / "store", shape=(n_sequences, 20, 24))
    columns, seed = 20, 4
    operator = sketched(
        problem,
        "sketch-range",
        sketch_size=columns,
        seed=seed,
        run={"folds": 2, "range_sequences": 1},
    )
    folds = problem.sequences % 2
    total, in_sample = 0.0, 0.0
    sketch = gaussian(seed, GAP, 24, columns + 10)[:, :columns]
    for fold in range(2):
        part = Problem("", problem.features[folds != fold], problem.gap[folds != fold], problem.sequences)
        ridge = part.ridge(RATIO)
        basis = np.linalg.qr(part.best(ridge) @ sketch)[0]
        inner = Problem("", part.features @ basis, part.gap, part.sequences).best(ridge)
        held = problem.features[folds == fold] @ basis @ inner - problem.gap[folds == fold]
        total += (held**2).sum()
        in_sample += ((part.features @ basis @ inner - part.gap) ** 2).sum()
    energy = (problem.gap**2).sum()
    found = operator.diagnostics["relative_residual_out_of_sample"]
    assert found == pytest.approx(np.sqrt(total / energy), rel=1e-6)
    assert found > 1.05 * np.sqrt(in_sample / energy)


@pytest.mark.parametrize("weights", ["relative", "drop_sinks"])
def test_features_and_weights_enter_as_in_exact_moments(tmp_path: Path, weights: str) -> None:
    states = random_states(3, (6, 12, 8))
    states[3][:, 0] *= 300
    uri = store_of(tmp_path / "store", states, norm_epsilon=0.1)
    spans = [SPAN, type(SPAN)(1, 3)]
    method = Method(operator="least-squares", features="hidden+normed", token_weights=weights, ridge=RATIO)
    plain = make_operator(method)
    exact = reduced_by(plain, uri, spans, folds=3)
    for solver in BOTH:
        family = make_operator(method.model_copy(update={"solver": solver, "sketch_size": 8}))
        assert isinstance(family, ProjectedLeastSquares)
        moments = reduced_by(family, uri, spans, folds=3)
        for span in spans:
            total, reference = moments[span].total(), exact[span].total()
            basis, _ = moments[span].basis()  # type: ignore[attr-defined]
            np.testing.assert_allclose(total.gram, basis.T @ reference.gram @ basis, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(total.cross, basis.T @ reference.cross, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(total.feature_sum, reference.feature_sum @ basis, rtol=1e-9, atol=1e-9)
            assert total.state.arrays["feature_energy"][0] == pytest.approx(np.trace(reference.gram))
            found, best = family.fit(moments[span]), plain.fit(exact[span])
            assert found.diagnostics["n_tokens"] == best.diagnostics["n_tokens"]
            assert found.diagnostics["dropped_share"] == best.diagnostics["dropped_share"]
            assert found.norm_epsilon == 0.1
            if solver == "sketch-range":  # 8 channels: the range of all of them
                for key in ("relative_residual", "relative_residual_out_of_sample", "r2"):
                    assert found.diagnostics[key] == pytest.approx(best.diagnostics[key], rel=1e-6), key


@pytest.mark.parametrize("solver", BOTH)
def test_bits_depend_on_the_seed_only(problems: dict[str, Problem], tmp_path: Path, solver: str) -> None:
    options = {"sketch_size": 6, "rank": 4, "power_iterations": int(solver == "sketch-features")}
    runs: list[dict[str, Any]] = [
        {"workers": 1},
        {"workers": 3},
        {"workers": 3, "workdir": tmp_path / "work"},
        {"workers": 2, "workdir": tmp_path / "work"},
    ]
    found = [
        sketched(problems["slow"], solver, run={**run, "folds": 2, "range_sequences": 1}, **options)
        for run in runs
    ]
    for other in found[1:]:
        assert matrix_of(other).tobytes() == matrix_of(found[0]).tobytes()
        assert other.diagnostics == found[0].diagnostics
    reseeded = sketched(problems["slow"], solver, seed=1, run={"folds": 2, "range_sequences": 1}, **options)
    assert not np.allclose(matrix_of(reseeded), matrix_of(found[0]), rtol=1e-3)


def test_finished_sweeps_are_not_repeated(
    problems: dict[str, Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"folds": 2, "workdir": tmp_path}
    first = sketched(problems["slow"], "sketch-range", rank=3, run=run)
    monkeypatch.setattr(RangeReducer, "reduce", None)
    monkeypatch.setattr(ProjectionReducer, "reduce", None)
    again = sketched(problems["slow"], "sketch-range", rank=3, run=run)
    assert matrix_of(again).tobytes() == matrix_of(first).tobytes()


@pytest.mark.parametrize("kind", ["range", "power", "projection", "in memory"])
def test_a_range_task_stays_within_the_stated_memory(tmp_path: Path, kind: str) -> None:
    hidden, length = 256, 128
    source = open_source(store_of(tmp_path / "store", random_states(2, (8, length, hidden))))
    columns = [np.linalg.qr(gaussian(0, 1, hidden, width))[0] for width in (40, 24, 24)]
    bases = Bases.make({SPAN: columns}, None if kind == "in memory" else tmp_path)
    if kind == "range":
        reducer: Any = RangeReducer((SPAN,), MomentSpec(block_tokens=256), columns=40)
    elif kind == "power":
        reducer = PowerReducer(
            (SPAN,), MomentSpec(block_tokens=256), bases=Bases.make({SPAN: columns[:1]}, tmp_path)
        )
    else:
        reducer = ProjectionReducer((SPAN,), MomentSpec(block_tokens=256), bases=bases)
    reducer.reduce(source, 0, 2)
    with Peak() as peak:
        state = reducer.reduce(source, 0, 8)
    assert state.n_bytes <= reducer.state_bytes(hidden, length) <= 1.01 * state.n_bytes
    assert peak.bytes < 1.1 * reducer.task_bytes(hidden, length)


def test_what_sketches_cannot_do_is_refused(problems: dict[str, Problem]) -> None:
    def make(**options: Any) -> Any:
        return make_operator(Method.make({"operator": "least-squares", **options}))

    for options, message in (
        ({"rank": 2, "intercept": True}, "by the solver sketch-range is defined without an intercept"),
        ({"rank": 2, "ridge": "auto"}, "defined without a ridge chosen by folds"),
        ({"rank": 2, "shrink": "zero"}, "defined without a ridge towards zero"),
        ({"rank": 2, "per_layer": True}, "defined without one map a removed layer"),
        ({"rank": 2, "power_iterations": 1}, "sketch-range takes no power iterations"),
        ({}, "needs a rank or a sketch size"),
        ({"rank": 0}, "rank: .*greater than or equal to 1"),
        ({"sketch_size": 0}, "sketch_size: .*greater than or equal to 1"),
        ({"rank": 2, "seed": -1}, "seed: .*greater than or equal to 0"),
        ({"rank": 2, "ridge": -1.0}, "-1.0 is no ridge"),
    ):
        with pytest.raises(RequestError, match=message):
            make(solver="sketch-range", **options)
    extras: tuple[dict[str, Any], ...] = ({"sketch_size": 4}, {"power_iterations": 1}, {"seed": 3})
    for options in extras:
        with pytest.raises(
            RequestError, match=r"least-squares is defined without .*; use the solver sketch-features"
        ):
            make(**options)
        with pytest.raises(RequestError, match="ghost is defined without "):
            make_operator(Method(operator="ghost", **options))
    problem = problems["slow"]
    for options in ({"sketch_size": 25}, {"sketch_size": 4, "rank": 5}, {"rank": 25}):
        with pytest.raises(RequestError, match="allow 24 columns at most, and the rank cannot exceed"):
            sketched(problem, "sketch-range", **options)
    with pytest.raises(RequestError, match="sketches are built in float64, not float32-blocked"):
        sketched(problem, "sketch-features", rank=2, precision="float32-blocked")
    with pytest.raises(RequestError, match=r"needs moments of its own sketch at \[0,1\)"):
        make(solver="sketch-range", rank=2).fit(moments_of(problem.uri, [SPAN])[SPAN])


@pytest.mark.parametrize("solver", BOTH)
def test_a_store_without_tokens_or_with_an_empty_fold_is_refused(tmp_path: Path, solver: str) -> None:
    states = random_states(1, (4, 6, 5))
    for name, kept, folds, message in (("none", 0, 1, "no token entered"), ("one", 1, 4, "holds no tokens")):
        mask = np.arange(4)[:, None] < np.full((4, 6), kept)
        uri = store_of(tmp_path / name, states, mask=mask)
        with pytest.raises(NumericsError, match=message):
            sketched(
                Problem(uri, *(np.zeros((0, 5)),) * 2, np.zeros(0, dtype=np.int64)),
                solver,
                rank=2,
                run={"folds": folds},
            )


def test_bases_are_found_again_in_their_file(tmp_path: Path) -> None:
    bases = {
        SPAN: [np.eye(4)[:, :3], np.ones((4, 2))],
        type(SPAN)(1, 2): [np.zeros((4, 3)), np.eye(4)[:, :2]],
    }
    stored, held = Bases.make(bases, tmp_path), Bases.make(bases, None)
    assert stored == held
    assert stored.widths == (3, 2)
    for span, arrays in bases.items():
        for found in (stored.load(span), held.load(span)):
            assert all((a == b).all() for a, b in zip(found, arrays, strict=True))
    assert Bases.make({**bases, SPAN: [np.eye(4)[:, :3], np.zeros((4, 2))]}, None) != held
