"""Work folders: ours by their mark, and never anybody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghoststream.errors import OutputExistsError
from ghoststream.files import WorkFolder
from ghoststream.files.atomic import temporary_name
from ghoststream.files.work import MARK

pytestmark = pytest.mark.unit


def names(folder: Path) -> list[str]:
    return sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*"))


def test_commands_have_parts_of_their_own_and_the_last_one_removes_the_folder(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    with work.lock:
        for name in ("fit", "distill"):
            (work.make(name) / "a").write_text("x")
        work.remove("fit")
        assert names(tmp_path / "out.partial") == [MARK, "distill", "distill/a"]
        work.remove("distill")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "link", "dangling link"])
def test_what_we_did_not_make_is_refused_by_name_and_left_alone(tmp_path: Path, kind: str) -> None:
    place, mine = tmp_path / "out.partial", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to(mine)
    elif kind == "dangling link":
        place.symlink_to(tmp_path / "none")
    else:
        place.mkdir()
        if kind == "folder":
            (place / "thesis.txt").write_text("mine")
    before = names(tmp_path)
    work = WorkFolder(tmp_path / "out")
    with work.lock, pytest.raises(OutputExistsError, match=r"out\.partial is a .* did not make"):
        work.make("fit")
    work.remove_leftovers("fit")
    with work.lock:
        work.remove("fit")
    assert names(tmp_path) == before
    assert (mine / "thesis.txt").read_text() == "mine"


def test_what_killed_writers_left_is_removed_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    theirs = [tmp_path / ".out.partial", tmp_path / ".out.ghoststream-mine.partial"]
    theirs += [temporary_name(tmp_path / "other"), tmp_path / "out.txt"]
    for path in theirs:
        path.write_text("x")
    with work.lock:
        part = work.make("fit")
        (part / "kept.json").write_text("x")
        temporary_name(part / "kept.json").write_text("half")
        temporary_name(tmp_path / "out").write_text("half")
        left = temporary_name(work.path)  # killed before the folder had its name
        left.mkdir()
        (left / MARK).touch()
        assert work.make("fit") == part
    assert names(part) == ["kept.json"]
    ours = ["out.partial", f"out.partial/{MARK}", "out.partial/fit", "out.partial/fit/kept.json"]
    assert names(tmp_path) == sorted([*(path.name for path in theirs), *ours])


def test_a_block_that_fails_keeps_what_it_did_and_leaves_nothing_if_that_is_nothing(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    with work.lock:
        with pytest.raises(KeyError), work.kept("fit"):
            raise KeyError
        assert not work.path.exists()
        part = work.make("fit")
        (part / "a").write_text("x")
        with pytest.raises(KeyError), work.kept("fit"):
            raise KeyError
        assert names(part) == ["a"]
        with work.kept("fit") as part:
            assert names(part) == ["a"]
    assert names(tmp_path) == []


def test_leftovers_are_removed_where_the_result_is_found_finished(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    with work.lock:
        (work.make("fit") / "a").write_text("x")
        WorkFolder(tmp_path / "out").remove_leftovers("fit")  # somebody else is at it
        assert (work.part("fit") / "a").exists()
    work.remove_leftovers("fit")
    assert names(tmp_path) == []
