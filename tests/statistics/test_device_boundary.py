"""Moments by torch: on the CPU here, where they must agree with numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ghoststream.errors import NumericsError, RequestError
from ghoststream.spans import Span
from ghoststream.statistics import (
    BoundaryTokens,
    Feature,
    ModelFacts,
    MomentSpec,
    Precision,
    Ranges,
    device_products,
    devices,
    reduce,
    register_feature,
    register_token_weight,
    store_ranges,
)
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.device_boundary import DeviceBoundaryReducer
from ghoststream.statistics.device_products import PRODUCT_ERROR, add_product, mirror_upper
from ghoststream.statistics.devices import sums_device
from ghoststream.statistics.streamed import device_sums, folded, streamed_sums
from ghoststream.testing.states import ragged_mask, random_states, store_of
from tests.helpers.requests import fit

pytestmark = pytest.mark.unit
SPANS = (Span(0, 2), Span(0, 3), Span(1, 3))
CHANNELS = ("input_energy", "gap_energy", "input_gap", "input_sum", "gap_sum", "position_energy", "ratio_sum")
COUNTS = ("tokens", "dropped", "sequences", "zero_ratios")
EPSILON = 1e-5


class _Absolutes(Feature):
    name = "absolutes-for-a-test"

    def rows(self, states: Any, facts: ModelFacts) -> Any:
        assert isinstance(states, np.ndarray)
        return np.abs(states)


class _Quieter:
    name = "quieter-for-a-test"

    def values(self, tokens: BoundaryTokens) -> npt.NDArray[np.float64]:
        assert isinstance(tokens.inputs, np.ndarray)
        weights: npt.NDArray[np.float64] = 1.0 / (1.0 + np.abs(tokens.inputs).sum(axis=1))
        return weights


register_feature(_Absolutes())
register_token_weight(_Quieter())


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("torch") / "store"
    return store_of(folder, random_states(3, (12, 40, 24)), mask=ragged_mask(12, 40), norm_epsilon=EPSILON)


def _close(found: Any, expected: Any, precision: Precision) -> None:
    """Compare moments of one boundary; products are as precise as was asked for, the rest is float64."""
    tolerance = 1e-13 if precision == "float64" else PRODUCT_ERROR
    energy, gap = np.diag(expected.gram), expected.gap_energy
    assert (np.abs(found.gram - expected.gram) <= tolerance * np.sqrt(np.outer(energy, energy))).all()
    assert (np.abs(found.cross - expected.cross) <= tolerance * np.sqrt(np.outer(energy, gap))).all()
    assert (found.gram == found.gram.T).all()
    for name in (*CHANNELS, "feature_sum"):
        one, other = found.state.arrays[name], expected.state.arrays[name]
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11 * np.abs(other).max(), err_msg=name)
    for name in COUNTS:
        assert np.array_equal(found.state.arrays[name], expected.state.arrays[name]), name


@pytest.mark.parametrize("n_rows", [1, 255, 256, 2300])
def test_a_product_is_that_of_numpy(n_rows: int) -> None:
    rng = np.random.default_rng(n_rows)
    left, right, total = (rng.standard_normal(shape) for shape in ((n_rows, 6), (n_rows, 9), (6, 9)))
    expected = total + left.T @ right
    double, blocked = torch.from_numpy(total.copy()), torch.from_numpy(total.copy())
    add_product(double, torch.from_numpy(left), torch.from_numpy(right), exact=True)
    np.testing.assert_allclose(double.numpy(), expected, rtol=1e-12, atol=1e-12)
    add_product(blocked, torch.from_numpy(left), torch.from_numpy(right), exact=False)
    assert (np.abs(blocked.numpy() - expected) <= PRODUCT_ERROR * (np.abs(left).T @ np.abs(right))).all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
def test_products_of_bfloat16_parts_keep_the_bound(
    stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tensor cores do, with the multiplication itself in float32: exact for factors of 8 bits."""

    def widened(left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        return left.to(out_dtype) @ right.to(out_dtype)

    monkeypatch.setattr(device_products, "multiplies_bfloat16", lambda _: True)
    monkeypatch.setattr(torch, "mm", widened)
    torch.manual_seed(0)
    states = torch.randn(700, 8, dtype=torch.float64).to(stored)
    gap = torch.randn(700, 5, dtype=torch.float64) * torch.logspace(-6, 6, 5)
    for left, right in ((states, states), (states, gap)):
        total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
        add_product(total, left, right, exact=False)
        one, other = left.double(), right.double()
        bound = one.abs().T @ other.abs()
        assert ((total - one.T @ other).abs() <= PRODUCT_ERROR * bound).all()
        if stored == torch.bfloat16 and right is states:
            assert ((total - one.T @ other).abs() <= 2e-5 * bound).all()


@pytest.mark.parametrize("precision", ["float64", "float32-blocked"])
@pytest.mark.parametrize(
    ("feature", "weights"),
    [
        ("hidden", "uniform"),
        ("hidden", "drop_sinks"),
        ("hidden+normed", "relative"),
        ("normed", "quieter-for-a-test"),
        ("absolutes-for-a-test", "uniform"),
    ],
)
def test_moments_on_a_device_are_those_of_the_host(
    uri: str, feature: str, weights: str, precision: Precision
) -> None:
    host = BoundaryReducer(SPANS, MomentSpec(feature, weights, block_tokens=80))
    device = DeviceBoundaryReducer(SPANS, MomentSpec(feature, weights, precision, 80), device="cpu")
    found, expected = (reduce(uri, reducer, store_ranges(uri, folds=2)) for reducer in (device, host))
    for span in SPANS:
        _close(found[span].total(), expected[span].total(), precision)


def test_massive_activations_are_dropped_there_too(tmp_path: Path) -> None:
    states = random_states(2, (4, 16, 8))
    states[2][1, 0] *= 1000.0
    uri = store_of(tmp_path / "store", states)
    spec = MomentSpec(token_weights="drop_sinks")
    moments = reduce(
        uri, DeviceBoundaryReducer((Span(0, 2),), spec, device="cpu"), store_ranges(uri, folds=0)
    )
    assert moments[Span(0, 2)].total().n_dropped == 1


@pytest.mark.parametrize("size", [1, 128, 300])
def test_what_is_above_the_diagonal_counts(size: int) -> None:
    gram = torch.randn(size, size, dtype=torch.float64)
    expected = np.triu(gram.numpy()) + np.triu(gram.numpy(), 1).T
    mirror_upper(gram)
    assert np.array_equal(gram.numpy(), expected)


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize(("folds", "range_sequences"), [(4, None), (3, 2), (0, 23)])
def test_states_that_come_by_are_summed_where_they_are(
    batch: int, folds: int, range_sequences: int | None
) -> None:
    n_sequences, length = 23, 6
    span, mask = Span(1, 3), ragged_mask(n_sequences, length)
    states = [torch.from_numpy(one).to(torch.bfloat16) for one in random_states(4, (n_sequences, length, 8))]
    ranges = Ranges.make(n_sequences, folds=folds, range_sequences=range_sequences)
    about: dict[str, Any] = {"mask": mask, "facts": ModelFacts(EPSILON), "n_layers": 3}
    pairs = _Pairs(states[span.start], states[span.stop], batch)
    rows = ((x.float().numpy(), y.float().numpy()) for x, y in map(pairs.of, pairs.batches))
    spec = MomentSpec("hidden+normed", "relative")
    host, device = BoundaryReducer((span,), spec), DeviceBoundaryReducer((span,), spec, device="cpu")
    expected, found = (
        folded(reducer, sums, ranges.n_folds, ModelFacts(EPSILON))
        for reducer, sums in (
            (host, streamed_sums(host, ranges.ranges(), rows, **about)),
            (device, device_sums(device, ranges.ranges(), pairs, **about)),
        )
    )
    assert found.n_folds == expected.n_folds == ranges.n_folds
    for fold in range(found.n_folds):
        _close(found.fold(fold), expected.fold(fold), "float64")


class _Part:
    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop


class _Pairs:
    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, size: int) -> None:
        self._inputs, self._targets = inputs, targets
        self.batches = [_Part(first, min(first + size, len(inputs))) for first in range(0, len(inputs), size)]

    def of(self, batch: _Part) -> tuple[torch.Tensor, torch.Tensor]:
        return self._inputs[batch.start : batch.stop], self._targets[batch.start : batch.stop]


def test_partial_states_of_a_device_are_its_own(uri: str, tmp_path: Path) -> None:
    for reducer in (BoundaryReducer(SPANS), DeviceBoundaryReducer(SPANS, device="cpu")):
        reduce(uri, reducer, store_ranges(uri, folds=2), workdir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    whole = reduce(uri, DeviceBoundaryReducer(SPANS, device="cpu"), store_ranges(uri, folds=2))
    kept = reduce(
        uri, DeviceBoundaryReducer(SPANS, device="cpu"), store_ranges(uri, folds=2), workdir=tmp_path
    )
    for span in SPANS:
        one, other = (moments[span].total() for moments in (whole, kept))
        assert np.array_equal(one.gram, other.gram)


def test_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    states = random_states(2, (4, 8, 3))
    uri = store_of(tmp_path / "store", states)
    source_of = DeviceBoundaryReducer((Span(0, 2),), device="cpu")
    sums = source_of.begin(3, 8)
    sums.arrays["span/0-2/gap_sum"][1] = float("nan")
    with pytest.raises(NumericsError, match=r"h\[0\] or h\[2\] holds NaN or infinity"):
        source_of.finish(sums)
    assert reduce(uri, source_of, store_ranges(uri, folds=0))[Span(0, 2)].total().n_tokens == 32


def test_workers_without_the_device_are_named(uri: str, tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RequestError, match="the device cuda was asked for, and torch sees none of that name"):
        fit("0:2", store=uri, out=tmp_path / "here.safetensors", device="cuda")
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
        pytest.raises(
            RequestError, match=r"1 of 1 workers .*: the device cuda:1 was asked for, and torch sees none"
        ),
    ):
        fit("0:2", store=uri, out=tmp_path / "there.safetensors", device="cuda:1", scheduler=client)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_store_is_reduced_on_the_host_where_nothing_else_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sums_device("cpu") is None
    assert sums_device("cpu:0") is None
    assert sums_device("cuda:1", elsewhere=True) == "cuda:1"
    for here, expected in ((False, None), (True, "cuda")):
        monkeypatch.setattr(devices, "may_have_accelerator", lambda here=here: here)
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        assert sums_device("auto") == expected
        assert sums_device("auto", elsewhere=True) is None


def test_what_is_no_gram_is_summed_on_the_host(uri: str, tmp_path: Path) -> None:
    methods: tuple[dict[str, Any], ...] = (
        {"operator": "diagonal"},
        {"operator": "least-squares", "solver": "tsqr"},
        {"operator": "least-squares", "solver": "sketch-range", "rank": 2},
    )
    for number, method in enumerate(methods):
        # A device that is not there is not missed.
        operators = fit("0:2", store=uri, out=tmp_path / f"{number}.safetensors", device="cuda:7", **method)
        assert operators.metadata["recipe"]["device"] is None


def test_no_more_tasks_than_the_device_has_memory_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = DeviceBoundaryReducer(SPANS, MomentSpec(block_tokens=80))
    task = reducer.device_bytes(24, 40)
    assert task > reducer.state_bytes(24, 40)
    monkeypatch.setattr(devices, "may_have_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(2.5 * task / 0.9), 10**12))
    assert reducer.most_tasks(24, 40) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 10**12))
    assert reducer.most_tasks(24, 40) == 1
    assert DeviceBoundaryReducer(SPANS, device="cpu").most_tasks(24, 40) is None


def test_devices_that_are_not_there_are_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="torch knows no device 'gpu'"):
        DeviceBoundaryReducer(SPANS, device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="the device cuda was asked for, and torch sees none"):
        reduce(uri, DeviceBoundaryReducer(SPANS), store_ranges(uri))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    reducer = DeviceBoundaryReducer(SPANS, MomentSpec(precision="float32-blocked"), device="cpu")
    with pytest.raises(RequestError, match="matmul precision to highest"):
        reduce(uri, reducer, store_ranges(uri))
