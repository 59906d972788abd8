"""What is said of workers whose libraries are not those of the client; the answers have the form of
Dask's."""

from __future__ import annotations

from typing import Any

import pytest

from ghoststream.errors import RequestError
from ghoststream.progress import SilentProgress
from ghoststream.statistics.cluster import require_versions

pytestmark = pytest.mark.unit
Versions = dict[str, str | None]

OURS: Versions = {
    "ghoststream": "0.1.0",
    "numpy": "2.4.6",
    "scipy": "1.17.1",
    "torch": "2.13.0",
    "zarr": "3.1.6",
    "dask": "1",
}


class Client:
    """Answers as ``distributed.Client`` does."""

    def __init__(self, *workers: Versions) -> None:
        self.workers = {f"tcp://10.0.0.{number}:1": worker for number, worker in enumerate(workers)}

    def get_versions(self, *, packages: tuple[str, ...]) -> dict[str, Any]:
        assert set(packages) < OURS.keys()
        workers = {address: {"packages": OURS | other} for address, other in self.workers.items()}
        return {"client": {"packages": OURS}, "workers": workers, "scheduler": {"packages": {}}}


class Log(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


def test_equal_libraries_are_no_word_worth() -> None:
    log = Log()
    for client in (Client(), Client({}, {}), Client({"dask": "2"})):
        require_versions(client, log)
    assert log.lines == []


def test_other_libraries_are_a_warning_that_names_worker_and_versions() -> None:
    log = Log()
    require_versions(Client({}, {"numpy": "1.26.0", "zarr": None}), log)
    (line,) = log.lines
    assert line.startswith("warning: 1 of 2 workers have other libraries")
    assert "tcp://10.0.0.1:1: numpy 1.26.0 (here 2.4.6), zarr None (here 3.1.6)" in line


def test_another_version_of_this_library_is_an_error() -> None:
    log = Log()
    many: list[Versions] = [{"ghoststream": f"0.{number}.0"} for number in range(1, 6)]
    with pytest.raises(RequestError) as caught:
        require_versions(Client(*many, {"ghoststream": None}), log)
    text = str(caught.value)
    assert text.startswith(
        "5 of 6 workers run another ghoststream than this process (0.1.0): tcp://10.0.0.1:1: 0.2.0;"
    )
    assert "; and 2 more; install one version everywhere" in text
    assert log.lines == []
