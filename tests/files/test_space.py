"""Disk space: checked before, named when it runs out."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from ghoststream.errors import (
    BudgetError,
    DiskFullError,
    MachineError,
    OutputExistsError,
    RequestError,
    StoreError,
)
from ghoststream.files import disk_errors, format_bytes, require_free_space, require_writable

pytestmark = pytest.mark.unit
Usage = namedtuple("Usage", "total used free")  # noqa: PYI024  (the shape of shutil's own)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 1024**2, "5.0 MiB"),
        (3 * 1024**3, "3.0 GiB"),
        (2 * 1024**4, "2.0 TiB"),
        (5000 * 1024**4, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes_in_words(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


def test_too_little_space_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 1024))
    require_free_space(tmp_path / "store", 1024, "the store")
    with pytest.raises(
        BudgetError,
        match=r"the store needs 3\.0 KiB at .*/store, but only 1\.0 KiB are free there \(2\.0 KiB short\)",
    ):
        require_free_space(tmp_path / "store", 3072, "the store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path: Path, number: int) -> None:
    message = r"no space left while writing .*/x .* of 2\.0 KiB needed"
    with pytest.raises(DiskFullError, match=message), disk_errors(tmp_path / "x", 2048):
        raise OSError(number, "full")


def test_a_full_disk_is_seen_through_other_errors(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError), disk_errors(tmp_path):
        raise RuntimeError("writer failed") from OSError(errno.ENOSPC, "full")
    with pytest.raises(DiskFullError), disk_errors(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_a_place_that_may_not_be_written_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="choose a place that you may write to"), disk_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EBUSY, errno.ENODEV])
def test_a_machine_that_fails_is_named(tmp_path: Path, number: int) -> None:
    with pytest.raises(MachineError, match=r"cannot write .*/x \(.*\); "), disk_errors(tmp_path / "x"):
        raise OSError(number, "whatever")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(KeyError), disk_errors(tmp_path):
        raise KeyError("x")
    with pytest.raises(StoreError, match="own"), disk_errors(tmp_path):
        raise StoreError("our own")


def test_a_file_that_may_not_grow_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="ulimit -f"), disk_errors(tmp_path / "x"):
        raise OSError(errno.EFBIG, "File too large")


def test_a_place_below_a_file_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="choose a place"), disk_errors(tmp_path / "file" / "a" / "b"):
        (tmp_path / "file" / "a" / "b").mkdir(parents=True)


def test_what_cannot_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "a" / "b" / "figures.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match=r"cannot write .*file/x \(.*file is a file\)"):
        require_writable(tmp_path / "file" / "x")
    with pytest.raises(OutputExistsError, match="there is a folder of that name"):
        require_writable(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(RequestError, match="is not writable"):
        require_writable(tmp_path / "x")
