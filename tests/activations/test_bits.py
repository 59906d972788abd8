from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.activations.bits import all_finite, bits_to_float32, decode_numpy
from ghoststream.activations.dtypes import require_store_dtype
from ghoststream.activations.layout import StoreLayout
from ghoststream.errors import RequestError
from ghoststream.testing.stores import small_layout

pytestmark = pytest.mark.property
ALL_BITS = np.arange(2**16, dtype=np.uint16)


def test_float32_of_every_bfloat16_is_torchs() -> None:
    expected = torch.from_numpy(ALL_BITS).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(bits_to_float32(ALL_BITS).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_value_of_two_bytes_is_finite_or_not_as_torch_says(name: str) -> None:
    finite = torch.from_numpy(ALL_BITS).view(getattr(torch, name)).isfinite().tolist()
    stored = ALL_BITS.reshape(-1, 1).view(np.uint8)
    assert [all_finite(one, require_store_dtype(name)) for one in stored] == finite


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_float32_values_are_finite_as_numpy_says(values: list[float]) -> None:
    stored = np.array(values, dtype=np.float32)
    assert all_finite(stored.view(np.uint8), "float32") == bool(np.isfinite(stored).all())


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20))
def test_decode_to_float64_is_exact(bits: list[int]) -> None:
    stored = np.array(bits, dtype=np.uint16).reshape(-1, 1)
    found = decode_numpy(stored, "bfloat16", np.float64)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, bits_to_float32(stored).astype(np.float64))


def test_unknown_store_dtype() -> None:
    with pytest.raises(
        RequestError, match=r"cannot be stored as 'float8'; choose one of bfloat16, float16, float32, int8"
    ):
        require_store_dtype("float8")


@given(
    n_sequences=st.integers(1, 200),
    chunk=st.integers(1, 8),
    chunks_per_shard=st.integers(1, 8),
)
def test_shards_cover_every_sequence_once(n_sequences: int, chunk: int, chunks_per_shard: int) -> None:
    layout = small_layout(
        n_sequences=n_sequences, sequences_per_chunk=chunk, sequences_per_shard=chunk * chunks_per_shard
    )
    ranges = [layout.shard_rows(shard) for shard in range(layout.n_shards)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(n_sequences))
    assert StoreLayout.from_json(layout.to_json()) == layout
