"""Files that a user names: regular ones are read, all others refused at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.files import file_digest, read_input, read_json
from ghoststream.files.inputs import names_file

pytestmark = pytest.mark.unit


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    assert read_input(tmp_path / "a") == b"abc"
    assert read_input(tmp_path / "link") == b"abc"


@pytest.mark.parametrize("read", [read_input, read_json, file_digest])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path, read: object) -> None:
    assert callable(read)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="pipe is a pipe; give a regular file"):
        read(tmp_path / "pipe")
    with pytest.raises(RequestError, match="/dev/zero is a device"):
        read(Path("/dev/zero"))
    with pytest.raises(InputNotFoundError, match="but a folder of that name"):
        read(tmp_path)
    with pytest.raises(InputNotFoundError, match="there is no file"):
        read(tmp_path / "none")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(RequestError, match=r"socket \(No such device or address\)"):
            read(tmp_path / "socket")


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for name, says in (
        ("x" * 300, "shorter"),
        ("loop", "circle"),
        ("file/x", "a part"),
        ("a\0b", "zero byte"),
    ):
        with pytest.raises(RequestError, match=says):
            read_input(tmp_path / name)


def test_a_long_text_names_no_file(tmp_path: Path) -> None:
    assert not names_file(" ".join(f"{n}:{n + 1}" for n in range(0, 4000, 2)))
    assert not names_file("a\0b")
    assert not names_file(tmp_path)
    (tmp_path / "plan").write_text("")
    assert names_file(str(tmp_path / "plan"))
