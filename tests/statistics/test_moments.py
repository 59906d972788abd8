from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ghoststream.errors import (
    ArtifactError,
    InputNotFoundError,
    MismatchError,
    NumericsError,
    RequestError,
    StoreError,
)
from ghoststream.spans import Span
from ghoststream.statistics import (
    BoundaryMoments,
    FoldedMoments,
    MomentSpec,
    Ranges,
    SumState,
    get_feature,
    mean_cosine,
    open_source,
    register_feature,
)
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.engines import default_workers
from ghoststream.statistics.features import HiddenFeature
from ghoststream.statistics.ranges import tree_root
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.peak import Peak
from tests.helpers.reducing import moments_of

pytestmark = pytest.mark.unit
SHAPE = (10, 12, 7)
SPANS = (Span(0, 2), Span(1, 3), Span(1, 4))


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    return random_states(4, SHAPE)


@pytest.fixture(scope="module")
def mask() -> npt.NDArray[np.bool_]:
    return ragged_mask(*SHAPE[:2])


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden], mask: npt.NDArray[np.bool_]) -> str:
    return store_of(tmp_path_factory.mktemp("moments") / "store", states, mask=mask)


def rows(states: list[Hidden], mask: npt.NDArray[np.bool_], layer: int) -> npt.NDArray[np.float64]:
    selected: npt.NDArray[np.float64] = states[layer][mask].astype(np.float64)
    return selected


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_moments_of_overlapping_spans_are_the_sums_over_unmasked_tokens(
    uri: str, states: list[Hidden], mask: npt.NDArray[np.bool_], span: Span
) -> None:
    total = moments_of(uri, SPANS, block_tokens=24)[span].total()
    x, y = rows(states, mask, span.start), rows(states, mask, span.stop)
    gap = y - x
    for found, expected in (
        (total.gram, x.T @ x),
        (total.cross, x.T @ gap),
        (total.feature_sum, x.sum(0)),
        (total.gap_energy, (gap**2).sum(0)),
        (total.gap_sum, gap.sum(0)),
        (total.input_energy, (x**2).sum(0)),
        (total.input_gap, (x * gap).sum(0)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-10)
    assert (total.gram == total.gram.T).all()
    assert (total.n_tokens, total.n_sequences, total.weight) == (mask.sum(), SHAPE[0], mask.sum())
    assert total.target_energy == pytest.approx((y**2).sum())
    assert total.gap_variation == pytest.approx(((gap - gap.mean(0)) ** 2).sum())


def test_position_energy_and_ratios_are_per_position_and_per_sequence(
    uri: str, states: list[Hidden], mask: npt.NDArray[np.bool_]
) -> None:
    span = Span(1, 3)
    total = moments_of(uri, [span], grams=False)[span].total()
    x, y = (np.where(mask[..., None], states[layer], 0).astype(np.float64) for layer in (1, 3))
    expected = [(values**2).sum(axis=(0, 2)) for values in (x, y, y - x)]
    np.testing.assert_allclose(total.position_energy, expected, rtol=1e-12)
    ratios = np.abs(y).sum(1) / np.abs(x).sum(1)  # the number of tokens cancels
    np.testing.assert_allclose(total.ratio_sum, ratios.sum(0), rtol=1e-12)


def test_folds_are_whole_sequences_and_sum_to_the_total(
    uri: str, states: list[Hidden], mask: npt.NDArray[np.bool_]
) -> None:
    span = Span(0, 2)
    absorbed = moments_of(uri, [span], folds=3, range_sequences=2)[span]
    plan = Ranges.make(SHAPE[0], folds=3, range_sequences=2)
    for index in range(3):
        mine = np.array([plan.fold_of(i) == index for i in range(SHAPE[0])])
        x = states[0][mine][mask[mine]].astype(np.float64)
        np.testing.assert_allclose(absorbed.fold(index).gram, x.T @ x, rtol=1e-12, atol=1e-10)
    assert absorbed.total().n_tokens == mask.sum()


def test_residuals_from_moments_are_the_residuals_on_the_data(
    uri: str, states: list[Hidden], mask: npt.NDArray[np.bool_]
) -> None:
    span = Span(1, 4)
    total = moments_of(uri, [span])[span].total()
    x = rows(states, mask, 1)
    gap = rows(states, mask, 4) - x
    rng = np.random.default_rng(1)
    matrix, scale = rng.standard_normal((7, 7)), rng.standard_normal(7)
    assert total.linear_residual(matrix) == pytest.approx(((x @ matrix - gap) ** 2).sum(), rel=1e-10)
    assert total.diagonal_residual(scale) == pytest.approx(((x * scale - gap) ** 2).sum(), rel=1e-10)


def test_save_and_load_keep_every_bit(uri: str, tmp_path: Path) -> None:
    total = moments_of(uri, [Span(1, 3)])[Span(1, 3)].total()
    total.save(tmp_path / "moments.safetensors")
    loaded = BoundaryMoments.load(tmp_path / "moments.safetensors")
    assert loaded.span == total.span
    assert all((loaded.state.arrays[name] == array).all() for name, array in total.state.arrays.items())
    assert [path.name for path in tmp_path.iterdir()] == ["moments.safetensors"]


def test_bits_do_not_depend_on_workers_or_on_where_partial_states_are_kept(uri: str, tmp_path: Path) -> None:
    runs = [
        moments_of(uri, SPANS, range_sequences=1, workers=1),
        moments_of(uri, SPANS, range_sequences=1, workers=4),
        moments_of(uri, SPANS, range_sequences=1, workers=3, workdir=tmp_path),
    ]
    for span in SPANS:
        first, *others = [run[span].total().state.arrays for run in runs]
        assert all((other[name] == first[name]).all() for other in others for name in first)
    assert len(list(tmp_path.glob("moments-*/*.safetensors"))) == 4, "one merged state for each fold"


def test_a_second_reduction_takes_up_partial_states(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = moments_of(uri, [Span(1, 3)], workdir=tmp_path)[Span(1, 3)].total()

    def never(*_: object) -> SumState:
        raise AssertionError("read again")

    monkeypatch.setattr(BoundaryReducer, "reduce", never)
    again = moments_of(uri, [Span(1, 3)], workdir=tmp_path)[Span(1, 3)].total()
    assert (again.gram == first.gram).all()


def test_reduction_memory_is_one_state_and_four_blocks(tmp_path: Path) -> None:
    # C = 256: state 8 (2 C^2 + small) = 1.0 MiB; block of 512 tokens = 1.0 MiB, four of them; panel 0.5 MiB.
    hidden, block = 256, 512
    uri = store_of(tmp_path / "store", random_states(2, (16, 128, hidden)))
    reducer = BoundaryReducer((Span(0, 2),), MomentSpec(block_tokens=block))
    source = open_source(uri)
    reducer.reduce(source, 0, 4)  # imports and caches
    with Peak() as peak:
        reducer.reduce(source, 0, 16)
    bound = reducer.task_bytes(hidden, 128)
    assert bound == reducer.state_bytes(hidden, 128) + 4 * block * hidden * 8 + 256 * hidden * 8
    assert peak.bytes < 1.1 * bound


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_hidden_states_that_are_not_finite_are_named(
    tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = store_of(tmp_path / "store", random_states(2, (4, 6, 5)))
    source_type = type(open_source(uri))
    read = source_type.read_numpy

    def broken(self: object, layer: int, start: int, stop: int, dtype: object = np.float32) -> Hidden:
        states: Hidden = read(self, layer, start, stop, dtype).copy()  # type: ignore[arg-type]
        if layer == 2 and start <= 3 < stop:
            states[3 - start, 1, 2] = value
        return states

    monkeypatch.setattr(source_type, "read_numpy", broken)
    with pytest.raises(NumericsError, match=r"h\[2\] of sequences \[3,4\) holds NaN or infinity at 1 of 6"):
        moments_of(uri, [Span(0, 2)], range_sequences=1)
    with pytest.raises(NumericsError, match=r"h\[2\].*NaN or infinity"):
        mean_cosine(uri, [(0, 2)])


def test_layers_that_are_not_there_are_named_before_anything_is_read(tmp_path: Path) -> None:
    states = random_states(3, (4, 6, 5))
    uri = store_of(tmp_path / "store", {0: states[0], 2: states[2]}, n_layers=3)
    with pytest.raises(StoreError, match=r"does not hold h\[3\] completely"):
        moments_of(uri, [Span(0, 3)])
    with pytest.raises(MismatchError, match=r"h\[4\] is needed.*3 layers"):
        moments_of(uri, [Span(2, 4)])


def test_requests_that_make_no_sense_are_refused(uri: str) -> None:
    with pytest.raises(RequestError, match="no spans"):
        moments_of(uri, [])
    with pytest.raises(RequestError, match="folds is -1"):
        moments_of(uri, SPANS, folds=-1)
    with pytest.raises(RequestError, match="at least 1"):
        moments_of(uri, SPANS, range_sequences=0)
    with pytest.raises(RequestError, match="at most 3 sequences a range"):
        moments_of(uri, SPANS, folds=4, range_sequences=4)
    with pytest.raises(RequestError, match="no sequences"):
        Ranges.make(0, folds=1)
    with pytest.raises(RequestError, match="no feature 'nonsense'"):
        moments_of(uri, SPANS, feature="nonsense")
    with pytest.raises(RequestError, match="no pairs"):
        mean_cosine(uri, [])


def test_more_folds_than_sequences_become_one_a_sequence() -> None:
    assert Ranges.make(3, folds=5).n_folds == 3
    assert Ranges.make(3, folds=0).n_folds == 1


def test_the_merge_tree_covers_every_leaf_once() -> None:
    for n_leaves in range(1, 20):
        pending, leaves = [tree_root(0, n_leaves)], []
        while pending:
            node = pending.pop()
            children = node.children(n_leaves)
            pending += children
            leaves += [] if children else [node.index]
        assert sorted(leaves) == list(range(n_leaves))


def test_moments_of_different_boundaries_or_kinds_do_not_combine(uri: str) -> None:
    full = moments_of(uri, [Span(0, 2), Span(1, 3)])
    bare = moments_of(uri, [Span(0, 2)], grams=False)[Span(0, 2)].total()
    with pytest.raises(RequestError, match="different boundaries"):
        full[Span(0, 2)].total().merge(full[Span(1, 3)].total())
    with pytest.raises(ArtifactError, match="different layout"):
        full[Span(0, 2)].total().merge(bare)
    with pytest.raises(RequestError, match="hold no gram"):
        _ = bare.gram


def test_files_that_are_no_moments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(InputNotFoundError, match="no file"):
        SumState.load(path)
    SumState({"a": np.ones(100)}).save(path, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"not a complete safetensors file .*run the same command again"):
        SumState.load(path)
    with pytest.raises(ArtifactError, match=r"not a complete .*give a file that BoundaryMoments\.save wrote"):
        BoundaryMoments.load(path)
    from safetensors.numpy import save_file

    save_file({"a": np.ones(1)}, path)
    with pytest.raises(ArtifactError, match="carries no ghoststream metadata"):
        SumState.load(path)


def test_a_users_feature_is_known_by_its_name() -> None:
    assert get_feature("hidden").width(5) == 5

    class Other(HiddenFeature):
        name = "hidden"

    with pytest.raises(RequestError, match="registered already"):
        register_feature(Other())


def test_mean_cosine_of_all_pairs_is_that_of_brute_force(
    uri: str, states: list[Hidden], mask: npt.NDArray[np.bool_]
) -> None:
    found = mean_cosine(uri)
    assert len(found) == 5 * 4 // 2
    for (a, b), value in found.items():
        x, y = rows(states, mask, a), rows(states, mask, b)
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert value == pytest.approx(cosine.mean(), abs=1e-14)


def test_a_zero_hidden_state_counts_as_cosine_zero(tmp_path: Path) -> None:
    states = [np.ones((1, 4, 3), dtype=np.float32) for _ in range(2)]
    states[0][0, 1] = 0
    assert mean_cosine(store_of(tmp_path / "store", states))[0, 1] == pytest.approx(0.75)


def test_default_workers_stay_within_processors_and_memory() -> None:
    assert default_workers(1) >= 1
    assert default_workers(1 << 60) == 1


@pytest.mark.parametrize("in_files", [False, True])
def test_tokens_of_folds_are_counted_where_they_are(
    in_files: bool, uri: str, mask: npt.NDArray[np.bool_], tmp_path: Path
) -> None:
    moments = moments_of(uri, SPANS, folds=3)[SPANS[1]]
    if in_files:
        files = [tmp_path / f"{number}.safetensors" for number in range(3)]
        for file, state in zip(files, moments.states, strict=True):
            assert isinstance(state, SumState)
            state.save(file, {})
        moments = FoldedMoments(SPANS[1], files)
    ranges = Ranges.make(len(mask), folds=3)
    folds = np.array([ranges.fold_of(sequence) for sequence in range(len(mask))])
    # A device that is not there is not missed.
    found = moments.on_device("cuda:7").n_tokens
    assert found == tuple(int(mask[folds == fold].sum()) for fold in range(3))
