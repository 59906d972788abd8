"""Atomic writes, JSON and digests: whole files or the old ones, one spelling, known digests."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from ghoststream.errors import (
    ArtifactError,
    DiskFullError,
    InputNotFoundError,
    NumericsError,
    OutputExistsError,
    RequestError,
)
from ghoststream.files import (
    atomic_write_bytes,
    atomic_write_json,
    bytes_digest,
    canonical_json,
    differences,
    file_digest,
    format_digest,
    fsync_path,
    json_digest,
    read_json,
)
from ghoststream.files.atomic import is_temporary, temporary_name

pytestmark = pytest.mark.unit


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.bin"
    atomic_write_bytes(path, b"old and longer")
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_written_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_link_is_replaced_and_what_it_points_to_is_left(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    atomic_write_bytes(tmp_path / "a", b"new")
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
def test_a_temporary_name_that_is_taken_is_never_written_to(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    (taken,) = [temporary_name(tmp_path / "a")]
    (tmp_path / "victim").write_text("precious")
    if kind == "file":
        taken.write_text("precious")
    elif kind == "link":
        taken.symlink_to(tmp_path / "victim")
    else:
        os.mkfifo(taken)
    before = sorted((path.name, path.lstat().st_ino) for path in tmp_path.iterdir())
    with pytest.raises(RequestError, match=r"cannot write .*/a \(File exists\)"):
        atomic_write_bytes(tmp_path / "a", b"new")
    assert sorted((path.name, path.lstat().st_ino) for path in tmp_path.iterdir()) == before
    assert (tmp_path / "victim").read_text() == "precious"


def test_temporary_names_are_known_and_differ(tmp_path: Path) -> None:
    names = {temporary_name(tmp_path / "a.b").name for _ in range(100)}
    assert len(names) == 100
    assert all(is_temporary(name) and is_temporary(name, of="a.b") for name in names)
    assert not any(is_temporary(name, of="a") or is_temporary(name, of="a+b") for name in names)
    assert not is_temporary(".a.b.partial")


def test_threads_that_write_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = [bytes([number]) * 20_000 for number in range(8)]
    failures: list[BaseException] = []

    def write(data: bytes) -> None:
        try:
            for _ in range(20):
                atomic_write_bytes(path, data)
                assert path.read_bytes() in contents
        except BaseException as error:  # noqa: BLE001  (handed to the main thread)
            failures.append(error)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    atomic_write_bytes(path, b"old")

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        DiskFullError, match=r"no space left while writing .*/a \(.* free of 3 bytes needed\)"
    ):
        atomic_write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    atomic_write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_data_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "file")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    atomic_write_bytes(tmp_path / "a", b"x")
    assert events == ["file", "rename", "folder"]


def test_a_folder_is_not_overwritten_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="there is a folder of that name"):
        atomic_write_bytes(tmp_path, b"x")


def test_a_place_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(RequestError, match=r"cannot write .*/a \(Permission denied\)"):
        atomic_write_bytes(tmp_path / "a", b"x")


def test_fsync_of_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()

    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        fsync_path(tmp_path / "a")


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": (1, 2.5), "a": None}) == '{"a":null,"b":[1,2.5]}'
    assert json_digest({"b": 1, "a": 2}) == json_digest({"a": 2, "b": 1})
    assert json_digest([]) == "sha256:" + hashlib.sha256(b"[]").hexdigest()


def test_written_json_is_sorted_and_ends_in_a_newline(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    assert read_json(tmp_path / "a.json") == {"a": [2], "b": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_numbers_that_are_not_finite_by_place(value: float) -> None:
    with pytest.raises(NumericsError, match=r"the value at 'scores\.cosine\[1\]' is NaN or infinite"):
        canonical_json({"scores": {"cosine": [1.0, value]}})


def test_a_circular_structure_is_not_blamed_on_numbers() -> None:
    data: list[Any] = []
    data.append(data)
    with pytest.raises((ValueError, RecursionError)) as caught:
        canonical_json(data)
    assert not isinstance(caught.value, NumericsError)


def test_reading_json_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="there is no file"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ArtifactError, match=r"a\.json is not readable JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'"\xff"')
    with pytest.raises(ArtifactError, match="not readable JSON"):
        read_json(tmp_path / "a.json")


def test_differences_are_named_by_place() -> None:
    found = {"a": 1, "t": {"x": [1, 2], "y": "s"}, "gone": None}
    asked = {"a": 1, "t": {"x": (1, 2), "y": "z"}, "more": True}
    assert differences(found, asked) == [
        "gone is null, asked for absent",
        "more is absent, asked for true",
        't.y is "s", asked for "z"',
    ]
    assert differences(1, 2) == ["value is 1, asked for 2"]
    assert differences({"a": True}, {"a": 1}) == ["a is true, asked for 1"]


def test_long_values_are_shortened_in_differences() -> None:
    (line,) = differences({"a": list(range(1000))}, {"a": []})
    assert len(line) < 200


def test_digests_agree_with_coreutils(tmp_path: Path) -> None:
    data = b"ghost" * 100_000
    (tmp_path / "a").write_bytes(data)
    expected = subprocess.run(
        ["sha256sum", tmp_path / "a"], capture_output=True, text=True, check=True
    ).stdout
    assert file_digest(tmp_path / "a") == bytes_digest(data) == f"sha256:{expected.split()[0]}"
    assert format_digest(hashlib.sha256(data)) == bytes_digest(data)


def test_a_digest_of_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputNotFoundError, match="there is no file"):
            file_digest(path)
