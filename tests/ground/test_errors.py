"""The kinds of errors: one root, the fitting builtin, the exit code."""

from __future__ import annotations

import inspect

import pytest

from ghoststream import errors
from ghoststream.errors import DataError, GhoststreamError, RequestError, StoppedError

pytestmark = pytest.mark.unit
KINDS = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, GhoststreamError)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_every_kind_has_the_exit_code_of_its_family(kind: type[GhoststreamError]) -> None:
    families: dict[type[GhoststreamError], int] = {
        RequestError: 2,
        DataError: 3,
        StoppedError: 75,
    }  # EX_TEMPFAIL of sysexits.h
    expected = next((code for family, code in families.items() if issubclass(kind, family)), 1)
    assert kind.exit_code == expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_every_kind_keeps_its_message(kind: type[GhoststreamError]) -> None:
    assert str(kind("what, where, what to do")) == "what, where, what to do"
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.RequestError, ValueError),
        (errors.InputNotFoundError, FileNotFoundError),
        (errors.OutputExistsError, FileExistsError),
        (errors.UnsupportedModelError, NotImplementedError),
        (errors.BudgetError, MemoryError),
        (errors.BusyError, BlockingIOError),
        (errors.CheckpointError, OSError),
        (errors.StoreError, OSError),
        (errors.ArtifactError, OSError),
        (errors.NumericsError, ArithmeticError),
        (errors.DiskFullError, OSError),
    ],
)
def test_kinds_can_be_caught_as_builtins(kind: type[GhoststreamError], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)
