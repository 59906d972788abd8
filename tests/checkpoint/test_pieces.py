"""Runs of files are the file's bytes, whichever way they are read; rows are those of the tensor."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ghoststream.checkpoint import pieces
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.pieces import PieceReader
from ghoststream.checkpoint.reader import TensorReader
from ghoststream.errors import CheckpointError, NumericsError

pytestmark = pytest.mark.unit
_SIZE = 150_001


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(_SIZE))
    return path


@pytest.fixture(params=["one thread", "several threads", "past the page cache"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PieceReader:
    """A reader of pieces of 8 KiB."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 8192)
    monkeypatch.setattr(pieces, "processors", lambda: 1 if request.param == "one thread" else 64)
    return PieceReader(direct=request.param == "past the page cache")


@pytest.mark.parametrize(
    ("offset", "length"), [(0, _SIZE), (8, 100_000), (4096, 8192), (4095, 65_538), (3, 0)]
)
def test_a_run_is_the_bytes_of_the_file(file: Path, reader: PieceReader, offset: int, length: int) -> None:
    target = bytearray(length)
    ends = 0
    for begin, piece, got in reader.arriving(file, offset, memoryview(target), 1000):
        stop = begin + len(piece)
        assert (begin, got) == (ends, len(piece))
        assert piece == target[begin:stop] == file.read_bytes()[offset + begin : offset + stop]
        ends = stop
    reader.close()
    assert ends == length


@pytest.mark.parametrize(
    ("offset", "length"), [(0, _SIZE), (8, 100_000), (4096, 8192), (4095, 65_538), (3, 0)]
)
@pytest.mark.parametrize("room", [16, 1001, 2 * 8192, 5 * 8192, 2**18])
def test_a_run_that_passes_through_a_room_is_the_bytes_of_the_file(
    file: Path, reader: PieceReader, offset: int, length: int, room: int
) -> None:
    run, ends, last = file.read_bytes()[offset : offset + length], 0, (0, memoryview(b""))
    for begin, piece, got in reader.passing(file, offset, length, memoryview(bytearray(room)), 1000):
        assert (begin, got) == (ends, len(piece))
        assert begin % 8 == 0
        ends = begin + len(piece)
        # The one before is still what it was.
        for start, held in (last, (begin, piece)):
            assert held == run[start : start + len(held)]
        last = (begin, piece)
    reader.close()
    assert ends == length


def test_a_file_that_ends_too_early_gives_what_it_has(file: Path, reader: PieceReader) -> None:
    target = memoryview(bytearray(50_000))
    found = list(reader.arriving(file, _SIZE - 20_000, target, 1000))
    reader.close()
    assert sum(got for _, _, got in found) == 20_000
    assert target[:20_000] == file.read_bytes()[-20_000:]


def test_what_is_left_early_writes_no_more(file: Path, reader: PieceReader) -> None:
    target = bytearray(_SIZE)
    arriving = reader.arriving(file, 0, memoryview(target), 1000)
    next(arriving)
    arriving.close()
    before = bytes(target)
    reader.close()
    assert bytes(target) == before


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(
    file: Path, reader: PieceReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    target = bytearray(_SIZE)
    assert sum(got for _, _, got in reader.arriving(file, 0, memoryview(target), 1000)) == _SIZE
    reader.close()
    assert target == file.read_bytes()
    assert not reader.direct


def test_a_checkpoint_that_memory_cannot_keep_is_read_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(64, 64)}, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    for free, direct in ((64 * 64 * 4, False), (64 * 64 * 4 - 1, True)):
        monkeypatch.setattr("ghoststream.checkpoint.content_reader.free_host_memory", lambda free=free: free)
        with TensorReader(index) as tensors:
            assert tensors._files.direct == direct
            assert torch.equal(tensors.read("a"), torch.zeros(64, 64))


@pytest.fixture
def matrix(tmp_path: Path, reader: PieceReader, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, torch.Tensor]:
    """A checkpoint of one matrix, whose rows are no whole pieces, read in blocks of some rows."""
    del reader  # how it is read
    values = torch.randn(300, 333).to(torch.bfloat16)
    save_file({"other": torch.zeros(3, dtype=torch.uint8), "a": values}, tmp_path / "model.safetensors")
    monkeypatch.setattr("ghoststream.checkpoint.reader.CHUNK_BYTES", 7 * 666 + 5)
    return tmp_path, values


@pytest.mark.parametrize("rows", [[], [0], [299], [6, 7, 8, 150], list(range(300))])
def test_gathered_rows_are_those_of_the_tensor(matrix: tuple[Path, torch.Tensor], rows: list[int]) -> None:
    folder, values = matrix
    with TensorReader(CheckpointIndex.open(folder)) as tensors:
        found = tensors.gather("a", torch.tensor(rows, dtype=torch.int64))
        assert torch.equal(found, values[rows])
        assert tensors.bytes_read == len(rows) * 666
        digests = tensors.digests.of(["a"])
        tensors.check("a")
        assert tensors.digests.of(["a"]) == digests


def test_rows_that_are_not_there_and_values_that_are_none_are_refused(
    matrix: tuple[Path, torch.Tensor],
) -> None:
    folder, values = matrix
    with TensorReader(CheckpointIndex.open(folder)) as tensors:
        with pytest.raises(CheckpointError, match="row 300 asked of tensor a with 300 rows: the token ids"):
            tensors.gather("a", torch.tensor([3, 300]))
        tensors.digests.expect({"a": "xxh3_128:" + "0" * 32}, "yesterday")
        with pytest.raises(CheckpointError, match="the base changed since yesterday: tensor a"):
            tensors.gather("a", torch.tensor([3]))
    values[200, 5] = torch.nan
    save_file({"a": values}, folder / "model.safetensors")
    with (
        TensorReader(CheckpointIndex.open(folder)) as tensors,
        pytest.raises(NumericsError, match=r"tensor a .* holds NaN"),
    ):
        tensors.gather("a", torch.tensor([3]))
