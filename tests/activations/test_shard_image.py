"""Shards that are laid out by hand are those that zarr's own codecs write, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from ghoststream.activations import StoreLayout
from ghoststream.activations.dtypes import StoreDtype, numpy_dtype
from ghoststream.activations.scaled import quantise
from ghoststream.activations.shard_image import ShardImage
from ghoststream.testing.stores import small_layout

pytestmark = pytest.mark.unit
_SHARD_SEQUENCES = 6


def _layout(dtype: str, per_chunk: int, n_sequences: int) -> StoreLayout:
    return small_layout(
        n_sequences=n_sequences,
        length=5,
        hidden=7,
        store_dtype=dtype,
        sequences_per_shard=_SHARD_SEQUENCES,
        sequences_per_chunk=per_chunk,
    )


def _image(layout: StoreLayout) -> ShardImage:
    """Return an image in memory that has served before."""
    room = ShardImage.room(layout, layout.store_dtype)
    return ShardImage(torch.full((room + 3,), 0xA5, dtype=torch.uint8), layout, layout.store_dtype)


def _written_by_zarr(
    folder: Path, layout: StoreLayout, values: torch.Tensor, dtype: StoreDtype | None = None
) -> bytes:
    shape = tuple(values.shape[1:])
    array: Any = zarr.create_array(
        str(folder),
        shape=(layout.n_sequences, *shape),
        shards=(layout.sequences_per_shard, *shape),
        chunks=(layout.sequences_per_chunk, *shape),
        dtype=numpy_dtype(dtype or layout.store_dtype),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[:] = (values.view(torch.uint16) if layout.store_dtype == "bfloat16" else values).numpy()
    return (folder / "c" / "0" / "0" / "0").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("per_chunk", [1, 2, 6])
@pytest.mark.parametrize("n_sequences", [1, 3, 4, 6])
def test_the_bytes_are_those_of_zarr(tmp_path: Path, dtype: str, per_chunk: int, n_sequences: int) -> None:
    layout = _layout(dtype, per_chunk, n_sequences)
    values = torch.randn(n_sequences, 5, 7).to(getattr(torch, dtype))
    image = _image(layout)
    image.put(0, values[:1])
    image.put(1, values[1:])
    ((content, record),), finite = image.seal(n_sequences)
    assert finite
    assert content.tobytes() == _written_by_zarr(tmp_path, layout, values)
    assert record.size == len(content)
    assert record.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert torch.equal(image.values(n_sequences), values)


@pytest.mark.parametrize("per_chunk", [1, 2])
def test_integers_and_their_scales_are_files_of_zarr_too(tmp_path: Path, per_chunk: int) -> None:
    layout = _layout("int8", per_chunk, 3)
    values = torch.randn(3, 5, 7)
    image = _image(layout)
    image.put(0, values)
    files, finite = image.seal(3)
    assert finite
    parts = [torch.stack(part) for part in zip(*(quantise(one) for one in values), strict=True)]
    dtypes: tuple[StoreDtype, ...] = ("int8", "float32", "float32")
    for number, ((content, _), part, dtype) in enumerate(zip(files, parts, dtypes, strict=True)):
        assert content.tobytes() == _written_by_zarr(tmp_path / str(number), layout, part, dtype)
    assert torch.equal(image.values(3), parts[0].float() * parts[1] * parts[2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 2])
def test_one_value_that_is_not_finite_is_seen(dtype: str, bad: float, place: int) -> None:
    layout = _layout(dtype, 2, 3)
    values = torch.randn(3, 5, 7)
    values[place, 4, 6] = bad
    image = _image(layout)
    image.put(0, values)
    assert not image.seal(3)[1]


def test_a_value_that_is_too_large_for_the_store_is_seen() -> None:
    layout = _layout("float16", 1, 1)
    image = _image(layout)
    image.put(0, torch.full((1, 5, 7), 65520.0))  # rounds to 2**16
    assert not image.seal(1)[1]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_values_are_rounded_to_nearest_even(values: list[float]) -> None:
    finite = np.array(values, dtype=np.float32)
    layout = small_layout(
        n_sequences=1, length=1, hidden=len(finite), sequences_per_shard=1, sequences_per_chunk=1
    )
    name: StoreDtype = layout.store_dtype
    image = ShardImage(torch.zeros(ShardImage.room(layout, name), dtype=torch.uint8), layout, name)
    image.put(0, torch.from_numpy(finite).view(1, 1, -1))
    wide = finite.view(np.uint32).astype(np.uint64)
    expected = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(image.values(1).view(torch.uint16).numpy().reshape(-1), expected)
