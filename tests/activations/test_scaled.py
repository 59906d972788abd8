"""States as 8-bit integers: the closed form of their scales and errors, and a store of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from zarr.storage import MemoryStore

from ghoststream.activations import ActivationStore, PartStore, verify_store
from ghoststream.activations.scaled import dequantise, quantise
from ghoststream.errors import NumericsError, StoreError
from ghoststream.spans import Span
from ghoststream.statistics import reduce, store_ranges
from ghoststream.statistics.device_boundary import DeviceBoundaryReducer
from ghoststream.testing.states import random_states, store_of
from ghoststream.testing.stores import small_layout, small_request, small_states, small_store, write_layer
from tests.helpers.reducing import reducer_of

pytestmark = pytest.mark.unit
LAYOUT = small_layout(store_dtype="int8")
TINY = float(np.finfo(np.float32).tiny)
States = npt.NDArray[np.float32]


def _parts(states: States) -> tuple[npt.NDArray[Any], ...]:
    return tuple(part.numpy() for part in quantise(torch.from_numpy(states)))


def _back(states: States) -> States:
    found: States = dequantise(*(part[None] for part in _parts(states)))[0]
    return found


@pytest.mark.property
@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.one_of(st.floats(-4, 4, width=32), st.floats(-(2.0**100), 2.0**100, width=32)),
    )
)
def test_scales_and_errors_are_those_of_the_closed_form(states: States) -> None:
    integers, channels, tokens = _parts(states)
    wide = states.astype(np.float64)
    rms = np.maximum(np.sqrt((wide**2).mean(1, keepdims=True)), TINY)
    largest = np.maximum(np.abs(wide / rms).max(0, keepdims=True) / 127, TINY)
    np.testing.assert_allclose(tokens, rms, rtol=1e-6)
    np.testing.assert_allclose(channels, largest, rtol=1e-6)
    assert integers.dtype == np.int8
    assert integers.min() >= -127
    error = np.abs(_back(states).astype(np.float64) - wide)
    # Beside the rounding to integers the four operations in float32, and what float32 cannot hold at all.
    assert (error <= channels.astype(np.float64) * tokens * (0.5 + 1e-4) + TINY).all()


def test_a_massive_activation_costs_the_other_tokens_nothing() -> None:
    states = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    error = np.abs(_back(states) - states)[1:].max()
    states[0, 5] = 25_000
    assert np.abs(_back(states) - states)[1:].max() < 1.5 * error
    alone = np.abs(states).max(0) / 127  # a scale for each channel, and none for tokens
    assert not np.rint(states / alone)[1:, 5].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_comes_back_as_nan_and_alone(bad: float) -> None:
    states = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    expected = _back(np.delete(states, 2, axis=0))
    states[2, 3] = bad
    found = _back(states)
    assert np.isnan(found[2]).all()
    np.testing.assert_array_equal(np.delete(found, 2, axis=0), expected)


def test_zeros_come_back_as_zeros() -> None:
    assert not _back(np.zeros((3, 4), np.float32)).any()


def test_values_that_are_not_finite_are_refused_by_name_but_on_padding() -> None:
    states = small_states(LAYOUT, 0)
    states[0, 3, 1] = torch.nan  # the first sequence is one token short
    with ActivationStore.create(MemoryStore(), **small_request(LAYOUT)) as store:
        write_layer(store, 0, states)
        found = store.read(0, 0, 10, require_finite=True)
        assert torch.isfinite(found).all(dim=-1).sum() == 39
        states[5, 1, 2] = torch.inf
        message = r"hidden/1 as int8: NaN or infinite .* sequence 5, at 1 of 4 .* position 1"
        with pytest.raises(NumericsError, match=message):
            write_layer(store, 1, states)
        assert store.completed_layers() == (0,)


def test_no_batch_range_or_part_changes_a_bit(tmp_path: Path) -> None:
    small_store(tmp_path / "whole", LAYOUT)
    expected = {path: path.read_bytes() for path in _files(tmp_path / "whole")}
    request = small_request(LAYOUT)
    for rows in ((4, 10), (0, 4)):
        with PartStore.create_or_resume(tmp_path / "parts", rows, **request) as store:
            for layer in LAYOUT.layers:
                with store.writer(layer) as writer:
                    for first in range(*rows):
                        writer.write(first, small_states(LAYOUT, layer)[first : first + 1])
                    writer.commit()
                if rows[0] == 4:
                    store.read(layer, 4, 10)
            store.finish()
    found = {path: path.read_bytes() for path in _files(tmp_path / "parts")}
    assert [path.relative_to(tmp_path / "parts") for path in found] == [
        path.relative_to(tmp_path / "whole") for path in expected
    ]
    assert list(found.values()) == list(expected.values())
    whole = ActivationStore.open(tmp_path / "whole")
    rows_of = whole.read(1, 0, 10)
    assert all(torch.equal(whole.read(1, row, row + 1)[0], rows_of[row]) for row in range(10))
    np.testing.assert_array_equal(whole.read_numpy(1, 3, 9, np.float64), rows_of[3:9].double().numpy())


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("folder", ["hidden", "channel_scales", "token_scales"])
def test_damage_in_any_of_the_arrays_is_found_once_and_named(tmp_path: Path, folder: str) -> None:
    small_store(tmp_path, LAYOUT)
    assert verify_store(tmp_path) == []
    path = tmp_path / folder / "2" / "c.1.0.0"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert [f"{folder}/2/c.1.0.0" in problem for problem in verify_store(tmp_path)] == [True]
    place = re.escape(f"shard {folder}/2/c.1.0.0, chunk 0 (sequences [4,6)) cannot be read")
    with pytest.raises(StoreError, match=place):
        ActivationStore.open(tmp_path).read(2, 5, 6)
    path.unlink()
    assert verify_store(tmp_path) == [f"{folder}/2/c.1.0.0 is missing, though it was committed"]


def test_what_a_killed_writer_left_of_scales_is_removed(tmp_path: Path) -> None:
    with ActivationStore.create(tmp_path, **small_request(LAYOUT)) as store:
        write_layer(store, 0, small_states(LAYOUT, 0))
    stray = tmp_path / "token_scales/1/c.0.0.0"
    stray.write_bytes(b"half")
    with ActivationStore.open(tmp_path, "r+"):
        assert not stray.exists()
    stray.write_bytes(b"half")
    with PartStore.create_or_resume(tmp_path, (0, 4), **small_request(LAYOUT)):
        assert not stray.exists()


def test_moments_are_those_of_the_states_that_plain_zarr_reads(tmp_path: Path) -> None:
    states = random_states(2, (6, 8, 5))
    for layer in states:
        layer[:, 0, 3] += 2000
    uri = store_of(tmp_path / "store", states, store_dtype="int8")
    group: Any = zarr.open_group(uri, mode="r")
    x, y = (
        (group[f"hidden/{n}"][:] * group[f"channel_scales/{n}"][:] * group[f"token_scales/{n}"][:])
        .reshape(-1, 5)
        .astype(np.float64)
        for n in (0, 2)
    )
    on_device = reducer_of([Span(0, 2)], DeviceBoundaryReducer, device="cpu")
    for reducer in (reducer_of([Span(0, 2)]), on_device):
        total = reduce(uri, reducer, store_ranges(uri, folds=2))[Span(0, 2)].total()
        np.testing.assert_allclose(total.gram, x.T @ x, rtol=1e-11)
        np.testing.assert_allclose(total.cross, x.T @ (y - x), rtol=1e-11, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_states_of_an_accelerator_give_the_bits_of_the_cpu() -> None:
    states = torch.randn(10, 4, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        with ActivationStore.create(MemoryStore(), **small_request(LAYOUT)) as store:
            write_layer(store, 0, states.to(device))
            found.append(store.read(0, 0, 10))
    assert torch.equal(*found)
