from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.activations import ActivationStore, TokenArrays
from ghoststream.activations.tokens import require_tokens
from ghoststream.errors import BudgetError, RequestError
from ghoststream.testing.stores import small_layout, small_request, small_store, small_tokens
from ghoststream.text import TokenSet

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"length": 0}, r"length=0; give a positive number"),
        ({"sequences_per_shard": 3}, r"sequences_per_chunk=2 does not divide sequences_per_shard=3"),
        ({"layers": ()}, r"must be ascending, each once, and at least one"),
        ({"layers": (1, 1)}, r"\[1, 1\], must be ascending"),
        ({"layers": (0, 4)}, r"reach outside 0\.\.3 .*hidden states h\[0\] to h\[3\]"),
        ({"store_dtype": "int4"}, r"cannot be stored as 'int4'"),
    ],
)
def test_impossible_layouts_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        small_layout(**sizes)


@pytest.mark.parametrize(("n_sequences", "shard", "chunk"), [(10, 4, 2), (8, 4, 1), (3, 8, 4), (1, 1, 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_bytes_are_those_on_disk(
    tmp_path: Path, n_sequences: int, shard: int, chunk: int, dtype: str
) -> None:
    layout = small_layout(
        n_sequences=n_sequences, sequences_per_shard=shard, sequences_per_chunk=chunk, store_dtype=dtype
    )
    small_store(tmp_path / "store", layout)
    on_disk = [path.stat().st_size for path in (tmp_path / "store").rglob("c.*")]
    in_layer = [path.stat().st_size for path in (tmp_path / "store").glob("*/2/c.*")]
    assert layout.layer_bytes() == sum(in_layer)
    assert layout.total_bytes() == sum(on_disk)


def test_a_store_larger_than_the_disk_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    request = small_request(small_layout(hidden=2**50))
    with pytest.raises(BudgetError, match=r"the activation store needs .* but only .* are free"):
        ActivationStore.create(tmp_path / "store", **request)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((10, 5), np.int32)}, r"token ids have the shape \(10, 5\).*laid out for \(10, 4\)"),
        ({"ids": np.full((10, 4), 2**31)}, r"token ids of dtype int64 do not fit int32"),
        ({"ids": np.zeros((10, 4))}, r"token ids of dtype float64 do not fit int32"),
        ({"lengths": np.full(10, 5)}, r"token lengths reach from 5 to 5, outside 0\.\.4"),
        ({"mask": np.ones(10, bool)}, r"token mask have the shape \(10,\)"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    layout = small_layout()
    with pytest.raises(RequestError, match=message):
        require_tokens(small_tokens(layout)._replace(**change), layout)


def test_tokens_digest_is_that_of_a_token_set_and_sees_every_part() -> None:
    tokens = small_tokens(small_layout())
    assert tokens.digest() == TokenSet(*tokens).digest
    changed = [
        tokens._replace(ids=tokens.ids + 1),
        tokens._replace(lengths=tokens.lengths - 1),
        tokens._replace(mask=~tokens.mask),
        TokenArrays(tokens.ids.reshape(4, 10), tokens.lengths, tokens.mask.reshape(4, 10)),
    ]
    assert len({tokens.digest(), *(other.digest() for other in changed)}) == 5
