"""Staging folders: whole or not there, resumable, and never over what exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ghoststream.errors import ArtifactError, BusyError, MismatchError, OutputExistsError, RequestError
from ghoststream.files import JOURNAL_NAME, StagingFolder
from ghoststream.files.atomic import temporary_name
from ghoststream.files.work import MARK

pytestmark = pytest.mark.unit
KILLED = """
import os, signal, sys
from pathlib import Path
from ghoststream.files import JOURNAL_NAME, StagingFolder
from ghoststream.files.atomic import temporary_name
from ghoststream.files.work import MARK
with StagingFolder(Path(sys.argv[1]), request={"remove": 9}) as staging:
    (staging.path / "a").write_text("first half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*"))


def test_the_target_appears_at_commit_only(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with StagingFolder(target, request={"remove": 9}) as staging:
        assert not staging.resumed
        (staging.path / "sub").mkdir()
        (staging.path / "sub" / "a").write_text("x")
        assert not target.exists()
        staging.commit()
    assert names(tmp_path) == ["deep", "deep/out", "deep/out/sub", "deep/out/sub/a"]


def test_an_empty_folder_may_be_the_target(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with StagingFolder(target) as staging:
        (staging.path / "a").write_text("x")
        staging.commit()
    assert names(target) == ["a"]


def test_a_link_to_an_empty_folder_is_filled_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with StagingFolder(tmp_path / "link") as staging:
        (staging.path / "a").write_text("x")
        staging.commit()
    assert names(tmp_path / "real") == ["a"]
    assert (tmp_path / "link").is_symlink()


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(OutputExistsError, match=r"out is not empty \(1 entries, among them precious\)"):
        StagingFolder(target).__enter__()
    with pytest.raises(OutputExistsError, match="is a file, a folder was to be made there"):
        StagingFolder(target / "precious").__enter__()
    with pytest.raises(RequestError, match="one of the folders above it is a file"):
        StagingFolder(target / "precious" / "out").__enter__()
    assert names(tmp_path) == ["out", "out/precious"]


def test_a_target_filled_meanwhile_is_kept_and_so_is_the_work(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with StagingFolder(target) as staging:
        (staging.path / "a").write_text("mine")
        target.mkdir()
        (target / "b").write_text("theirs")
        with pytest.raises(OutputExistsError, match="not empty"):
            staging.commit()
    assert names(target) == ["b"]
    assert names(tmp_path / "out.partial") == [MARK, "folder", "folder/a"]


@pytest.mark.parametrize("name", ["out.partial", "out.partial/thesis.txt"])
def test_what_lies_in_the_place_of_the_unfinished_work_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    for request in (None, {"remove": 9}):
        with pytest.raises(OutputExistsError, match=r"out\.partial is a .* did not make"):
            StagingFolder(tmp_path / "out", request=request).__enter__()
    assert (tmp_path / name).read_text() == "x"


def test_a_killed_run_is_resumed_by_the_same_request(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False).returncode == -9
    with pytest.raises(
        MismatchError, match=r"out\.partial/folder holds the unfinished work .* \(remove is 9, asked for 6\)"
    ):
        StagingFolder(target, request={"remove": 6}).__enter__()
    with StagingFolder(target, request={"remove": 9}) as staging:
        assert staging.resumed
        assert (staging.path / "a").read_text() == "first half"
        (staging.path / "a").write_text("whole")
        staging.commit()
    assert names(tmp_path) == ["out", "out/a"]


def test_work_without_commit_is_kept_and_a_run_that_did_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), StagingFolder(tmp_path / "none", request={}):
        raise KeyError("x")
    assert names(tmp_path) == []
    with StagingFolder(tmp_path / "out") as staging:
        (staging.path / "a").write_text("x")
    assert names(tmp_path / "out.partial") == [MARK, "folder", "folder/a"]


@pytest.mark.parametrize("marker", [None, "{", '{"request": {"remove": 9}}'])
def test_work_of_an_unknown_request_is_not_continued(tmp_path: Path, marker: str | None) -> None:
    with StagingFolder(tmp_path / "out", request={"remove": 9}) as staging:
        (staging.path / "a").write_text("x")
    place = tmp_path / "out.partial" / "folder.request.json"
    place.unlink() if marker is None else place.write_text(marker)
    with pytest.raises((MismatchError, ArtifactError), match=r"request.*; delete .*out\.partial"):
        StagingFolder(tmp_path / "out", request={"remove": 9}).__enter__()
    assert (tmp_path / "out.partial" / "folder" / "a").read_text() == "x"


def test_a_stale_request_without_work_is_replaced(tmp_path: Path) -> None:
    with StagingFolder(tmp_path / "out", request={"remove": 1}) as staging:
        staging.work.part("other").mkdir()
    with StagingFolder(tmp_path / "out", request={"remove": 2}) as staging:
        assert not staging.resumed
        staging.commit()
    assert names(tmp_path) == ["out", "out.partial", f"out.partial/{MARK}", "out.partial/other"]


def test_who_holds_the_lock_may_hand_it_on(tmp_path: Path) -> None:
    place = StagingFolder(tmp_path / "out")
    with place.lock:
        with StagingFolder(tmp_path / "out", lock=place.lock) as staging:
            staging.commit()
        assert place.lock.held
    assert names(tmp_path) == ["out"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with StagingFolder(tmp_path / "out"), pytest.raises(BusyError, match="out is being written"):
        StagingFolder(tmp_path / "out").__enter__()


def test_half_written_files_of_a_killed_run_do_not_reach_the_target(tmp_path: Path) -> None:
    with StagingFolder(tmp_path / "out") as staging:
        temporary_name(staging.path / "a.json").write_text("{")
        (staging.path / JOURNAL_NAME).write_text("{}")
        (staging.path / "a.json").write_text("{}")
        staging.commit()
    assert names(tmp_path / "out") == ["a.json"]


def test_discarded_work_is_gone(tmp_path: Path) -> None:
    with StagingFolder(tmp_path / "out", request={"remove": 9}) as staging:
        (staging.path / "a").write_text("x")
        staging.discard()
    assert names(tmp_path) == []
