"""Checksum files: readable by coreutils, and every kind of damage found."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ghoststream.errors import InputNotFoundError
from ghoststream.files import SUMS_NAME, verify_sums, write_sums

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "sub" / "b with blank").write_bytes(b"")
    (tmp_path / "back\\slash\nand newline").write_bytes(b"x")
    for name in ("run.json", "capture.log", ".lock", ".a.partial"):
        (tmp_path / name).write_bytes(b"left out")
    write_sums(tmp_path)
    return tmp_path


def test_coreutils_accepts_the_file(folder: Path) -> None:
    result = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS_NAME],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.count(": OK") == 3


def test_an_intact_folder_has_no_problems(folder: Path) -> None:
    (folder / "added later").write_bytes(b"x")
    assert verify_sums(folder) == []


def test_sums_do_not_depend_on_what_differs_between_runs(folder: Path) -> None:
    before = (folder / SUMS_NAME).read_bytes()
    (folder / "run.json").write_bytes(b"another host")
    write_sums(folder)
    assert (folder / SUMS_NAME).read_bytes() == before


def test_damage_is_named(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"abd")
    (folder / "sub" / "b with blank").unlink()
    assert verify_sums(folder) == [
        f"{folder / 'a.bin'} has changed: its SHA-256 is not the one noted",
        f"{folder / 'sub' / 'b with blank'} is missing",
    ]


def test_a_damaged_checksum_file_is_a_problem(folder: Path) -> None:
    sums = folder / SUMS_NAME
    sums.write_text("nonsense\n" + "0" * 64 + "  ../outside\n" + "0" * 64 + "  /etc/hosts\n")
    problems = verify_sums(folder)
    assert [problem.removeprefix(f"{sums} ") for problem in problems] == [
        "line 1 is not a checksum line",
        "lists ../outside, which lies outside the folder",
        "lists /etc/hosts, which lies outside the folder",
    ]
    sums.unlink()
    assert verify_sums(folder) == [
        f"{sums} cannot be read (No such file or directory): the folder cannot be checked"
    ]


def test_a_file_that_cannot_be_read_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ghoststream.files.sums.file_digest", broken)
    assert all("cannot be read (Input/output error)" in problem for problem in verify_sums(folder))
    assert len(verify_sums(folder)) == 3


def test_sums_of_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="there is no folder"):
        write_sums(tmp_path / "none")


def test_a_list_that_was_cut_off_is_found(folder: Path) -> None:
    content = (folder / SUMS_NAME).read_bytes()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    listed = {name for name in names if name in content.decode()}
    assert verify_sums(folder, required=listed) == []
    for end in range(len(content)):
        (folder / SUMS_NAME).write_bytes(content[:end])
        assert verify_sums(folder, required=listed), end


def test_known_digests_are_taken_as_they_are(folder: Path) -> None:
    before = (folder / SUMS_NAME).read_text()
    write_sums(folder, known={"a.bin": "sha256:" + "0" * 64, "not there": "sha256:" + "1" * 64})
    known = [line for line in (folder / SUMS_NAME).read_text().splitlines() if line not in before]
    assert known == ["0" * 64 + "  a.bin"]
