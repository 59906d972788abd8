"""What the system refuses, in words: every number of it has a kind, a place and advice."""

from __future__ import annotations

import errno
import os

import pytest

from ghoststream.errors import DataError, MachineError, RequestError
from ghoststream.files.system_errors import error_number, system_error, system_errors

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_number_of_the_system_is_the_requests_or_the_machines(number: int) -> None:
    said = system_error(OSError(number, "whatever", "/some/file"))
    assert isinstance(said, RequestError | DataError)
    assert said.exit_code in {2, 3}
    assert os.strerror(number) in str(said) or number == errno.ENOMEM
    assert "/some/file" in str(said)
    assert "; " in str(said)


def test_the_file_that_the_error_names_comes_before_that_of_the_context() -> None:
    with pytest.raises(MachineError, match="cannot read /inner "), system_errors("/outer", doing="read"):
        raise OSError(errno.EIO, "I/O", "/inner")
    with pytest.raises(MachineError, match="cannot read /outer "), system_errors("/outer", doing="read"):
        raise OSError(errno.EIO, "I/O")


def test_numbers_are_found_in_causes_groups_and_the_words_of_rust() -> None:
    assert error_number(Exception("Permission denied (os error 13)")) == errno.EACCES
    error = RuntimeError("failed")
    error.__cause__ = OSError(errno.EIO, "I/O")
    assert error_number(error) == errno.EIO
    assert error_number(ExceptionGroup("two", [KeyError(1), error])) == errno.EIO
    assert error_number(KeyError("x")) is None


def test_what_is_looked_for_in_passing_is_not_what_failed() -> None:
    error = KeyError("lost")
    error.__context__ = FileNotFoundError(errno.ENOENT, "nothing", "/x")
    assert system_error(error) is None
