"""Products by torch: on the CPU here, where they must agree with numpy; a device only changes where they
run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.errors import RequestError
from ghoststream.spans import Span
from ghoststream.statistics import MomentSpec, Precision, devices, reduce, store_ranges
from ghoststream.statistics.blas import FLOAT32_BLOCK_TOKENS
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.torch_blas import DeviceBoundaryReducer, add_product
from ghoststream.testing.states import ragged_mask, random_states, store_of
from tests.helpers.requests import fit, ranges_of

pytestmark = pytest.mark.unit
SPANS = (Span(0, 2), Span(0, 3), Span(1, 3))
GAMMA = (FLOAT32_BLOCK_TOKENS + 2) * 2.0**-24 / (1 - (FLOAT32_BLOCK_TOKENS + 2) * 2.0**-24)
CHANNELS = ("input_energy", "gap_energy", "input_gap", "input_sum", "position_energy", "ratio_sum", "tokens")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("torch") / "store"
    return store_of(folder, random_states(3, (12, 40, 24)), mask=ragged_mask(12, 40), norm_epsilon=1e-5)


@pytest.mark.parametrize("n_rows", [1, 255, 256, 700])
def test_a_product_is_that_of_numpy(n_rows: int) -> None:
    rng = np.random.default_rng(n_rows)
    left, right, total = (rng.standard_normal(shape) for shape in ((n_rows, 6), (n_rows, 9), (6, 9)))
    expected = total + left.T @ right
    double = torch.from_numpy(total.copy())
    add_product(double, torch.from_numpy(left), torch.from_numpy(right))
    np.testing.assert_allclose(double.numpy(), expected, rtol=1e-12, atol=1e-12)
    blocked = torch.from_numpy(total.copy())
    add_product(blocked, torch.from_numpy(left).float(), torch.from_numpy(right).float())
    assert blocked.dtype == torch.float64
    assert (np.abs(blocked.numpy() - expected) <= GAMMA * (np.abs(left).T @ np.abs(right))).all()


@pytest.mark.parametrize("precision", ["float64", "float32-blocked"])
@pytest.mark.parametrize(("feature", "weights"), [("hidden", "uniform"), ("hidden+normed", "relative")])
def test_moments_on_a_device_are_those_of_the_host(
    uri: str, feature: str, weights: str, precision: Precision
) -> None:
    host = BoundaryReducer(SPANS, MomentSpec(feature=feature, token_weights=weights, block_tokens=80))
    device = DeviceBoundaryReducer(
        SPANS,
        MomentSpec(feature=feature, token_weights=weights, block_tokens=80, precision=precision),
        device="cpu",
    )
    tolerance = 1e-13 if precision == "float64" else GAMMA
    found, expected = (reduce(uri, reducer, store_ranges(uri, folds=2)) for reducer in (device, host))
    for span in SPANS:
        one, other = (moments[span].total() for moments in (found, expected))
        energy, gap = np.diag(other.gram), other.gap_energy
        assert (np.abs(one.gram - other.gram) <= tolerance * np.sqrt(np.outer(energy, energy))).all()
        assert (np.abs(one.cross - other.cross) <= tolerance * np.sqrt(np.outer(energy, gap))).all()
        assert (one.gram == one.gram.T).all()
        for name in CHANNELS:
            assert np.array_equal(one.state.arrays[name], other.state.arrays[name]), name


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


@pytest.mark.parametrize("precision", ["float64", "float32-blocked"])
def test_operators_solved_from_a_device_are_those_of_the_host(
    uri: str, tmp_path: Path, precision: Precision
) -> None:
    there, again, here = (tmp_path / f"{name}.safetensors" for name in ("there", "again", "here"))
    method: dict[str, Any] = {"operator": "least-squares", "ridge": 1e-3}
    options: dict[str, Any] = {**method, "precision": precision, "reduce_device": "cpu"}
    with ranges_of(2):
        found = fit("0:2", store=uri, out=there, **options)
        exact = fit("0:2", store=uri, out=here, **method)
        fit("0:2", store=uri, out=again, workers=2, **options)
    assert found.metadata["recipe"]["reduce_device"] == "cpu"
    assert exact.metadata["recipe"]["reduce_device"] is None
    one, other = (operators.boundaries[0].weight for operators in (found, exact))
    assert one is not None
    assert other is not None
    # A relative ridge of 1e-3 bounds the condition by 24e3, by which the error of Gram and cross-moment grows
    # at most.
    tolerance = 24e3 * (1e-13 if precision == "float64" else GAMMA) + 1e-6
    assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
    assert there.read_bytes() == again.read_bytes()


def test_what_is_no_gram_is_not_reduced_on_a_device(uri: str, tmp_path: Path) -> None:
    for refused in (
        {"operator": "diagonal"},
        {"operator": "linear-patch-rotated"},
        {"operator": "least-squares", "solver": "tsqr"},
        {"operator": "least-squares", "solver": "sketch-range", "rank": 2},
    ):
        with pytest.raises(RequestError, match=r"leave (--reduce-device )?cpu out"):
            fit("0:2", store=uri, out=tmp_path / "o.safetensors", reduce_device="cpu", **refused)
    assert not (tmp_path / "o.safetensors").exists()


def test_workers_without_the_device_are_named(uri: str, tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RequestError, match="the device cuda was asked for, and torch sees none of that name"):
        fit("0:2", store=uri, out=tmp_path / "here.safetensors", reduce_device="cuda")
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
        pytest.raises(
            RequestError, match=r"1 of 1 workers .*: the device cuda:1 was asked for, and torch sees none"
        ),
    ):
        fit("0:2", store=uri, out=tmp_path / "there.safetensors", reduce_device="cuda:1", scheduler=client)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_no_more_tasks_than_the_device_has_memory_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = DeviceBoundaryReducer(SPANS, MomentSpec(block_tokens=80))
    states = reducer.state_bytes(24, 40) + 8 * 80 * (24 + 24)
    monkeypatch.setattr(devices, "may_have_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(2.5 * states / 0.9), 10**12))
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
