"""Stores that are damaged or do not fit the request: nothing is fitted, and what was sound is kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ghoststream.activations import StoreRef
from ghoststream.errors import NumericsError, StoreError
from ghoststream.options import Solver
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.cluster import Needs, _problem_of
from ghoststream.statistics.sums import SumState
from ghoststream.testing.states import random_states, store_of
from tests.helpers.requests import fit, ranges_of

pytestmark = pytest.mark.integration
SHAPE = (16, 8, 12)
SHARD = "hidden/3/c.3.0.0"  # sequences 12 to 15


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return store_of(tmp_path / "store", random_states(5, SHAPE))


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_flipped_bit_stops_the_range_that_reads_it_and_no_other_is_repeated(
    uri: str, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "operators.safetensors"
    fit("1:3", store=uri, out=whole)
    reduce, reduced = BoundaryReducer.reduce, []

    def counted(self: BoundaryReducer, source: object, start: int, stop: int) -> SumState:
        state = reduce(self, source, start, stop)  # type: ignore[arg-type]
        reduced.append(start)
        return state

    monkeypatch.setattr(BoundaryReducer, "reduce", counted)
    _flip(Path(uri, SHARD), 40)
    with pytest.raises(StoreError, match=r"shard hidden/3/c\.3\.0\.0, chunk 0 \(sequences \[12,13\)\)"):
        fit("1:3", store=uri, out=out, workers=workers)
    assert not out.exists()
    _flip(Path(uri, SHARD), 40)
    fit("1:3", store=uri, out=out, workers=workers)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(reduced) == list(range(SHAPE[0])), "each range once, the one that failed when it was sound"


def test_a_missing_shard_is_found_before_anything_is_read(uri: str, tmp_path: Path) -> None:
    Path(uri, SHARD).unlink()
    with pytest.raises(StoreError, match=r"hidden/3/c\.3\.0\.0 is missing, though it was committed"):
        fit("1:3", store=uri, out=tmp_path / "operators.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


@pytest.mark.parametrize("range_sequences", [1, 3, 4])
@pytest.mark.parametrize("part", [SHARD, "hidden/3"])
def test_a_store_with_a_part_of_another_models_is_refused(
    uri: str, tmp_path: Path, part: str, range_sequences: int
) -> None:
    other = store_of(tmp_path / "other", random_states(5, SHAPE, seed=1))
    source, target = Path(other, part), Path(uri, part)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)
    out = tmp_path / "operators.safetensors"
    # Every chunk is sound in itself; ranges that are no whole shards read parts of them only.
    with (
        ranges_of(range_sequences),
        pytest.raises(StoreError, match=r"shard hidden/3/c\.\d.* is not what was committed"),
    ):
        fit("1:3", store=uri, out=out)
    assert not out.exists()


def test_a_fold_without_tokens_is_named(tmp_path: Path) -> None:
    mask = np.ones(SHAPE[:2], dtype=bool)
    mask[[1, 5, 9, 13]] = False
    uri = store_of(tmp_path / "store", random_states(2, SHAPE), mask=mask)
    out = tmp_path / "operators.safetensors"
    with pytest.raises(NumericsError, match=r"fold 1 of 4 .* holds no tokens"):
        fit("0:1", store=uri, out=out)
    assert not out.exists()


@pytest.mark.parametrize("solver", ["gram", "tsqr"])
def test_a_rank_beyond_the_tokens_is_warned_of_and_finite(tmp_path: Path, solver: Solver) -> None:
    uri = store_of(tmp_path / "store", random_states(2, (2, 3, 12)))
    found = fit(
        "0:1",
        store=uri,
        operator="least-squares",
        rank=8,
        ridge=1e-6,
        solver=solver,
        out=tmp_path / "operators.safetensors",
    )
    assert any("6 tokens for 12 features" in text for text in found.warnings)


def test_a_worker_that_finds_another_store_or_none_says_so(uri: str, tmp_path: Path) -> None:
    seen = StoreRef.of(uri)
    needs = Needs(seen, None, 0)
    assert _problem_of(needs, None) is None
    assert "does not see" in str(_problem_of(needs, tmp_path / "mark"))
    assert "torch knows no device" in str(_problem_of(replace(needs, device="gpu"), None))
    elsewhere = replace(seen, uri=str(tmp_path / "nothing"))
    assert "cannot open the store" in str(_problem_of(replace(needs, store=elsewhere), None))
    other = store_of(tmp_path / "other", random_states(4, SHAPE))
    changed = replace(needs, store=replace(seen, uri=other))
    assert "has another store" in str(_problem_of(changed, None))
