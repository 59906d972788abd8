"""A fit whose sequences workers share leaves the file of one process, however many workers there are."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import numpy as np
import pytest

from ghoststream.errors import RequestError
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Recovery
from ghoststream.progress import KeptLines
from ghoststream.stages.choosing import fit_shares
from ghoststream.stages.choosing.fit_shares import sum_share
from ghoststream.stages.choosing.moments import place_fits
from ghoststream.stages.recover import RecoveryReport, run
from ghoststream.streaming import StreamedPass
from ghoststream.testing.models import save_tiny
from tests.helpers.crews import cluster_of
from tests.helpers.requests import fit

pytestmark = pytest.mark.integration
S, T = 23, 12
"""Windows, of which four folds have ranges of one, and tokens of each."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("fit") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(S, T)))
    return f"ids:{path}"


def _fit(plan: str, model: Path, text: str, out: Path, **options: Any) -> OperatorSet:
    windows: dict[str, Any] = {
        "calibration": text,
        "sequences": S,
        "length": T,
        "micro_batch": 2,
        "dtype": "float32",
    }
    return fit(plan, model=model, out=out, **{**windows, **options})


@pytest.mark.parametrize(
    ("counts", "plan", "options"),
    [
        ((1, 2, 3), "2:4", {"operator": "ghost"}),
        ((1, 2, 3), "1:2 3:5", {"features": "hidden"}),
        ((1, 2, 3), "1:2 3:5", {"features": "hidden+mlp"}),
        ((3,), "1:2 3:5", {"features": "hidden+mlp", "inputs": "dense"}),
        ((3,), "1:2 3:4 5:6", {"features": "normed", "solver": "tsqr", "micro_batch": 5, "folds": 3}),
    ],
)
def test_workers_leave_the_file_of_one_process(
    counts: tuple[int, ...],
    plan: str,
    options: dict[str, Any],
    model: Path,
    text: str,
    tmp_path: Path,
) -> None:
    ways: dict[str, Any] = {"operator": "least-squares", "token_weights": "drop_sinks", **options}
    if ways["operator"] == "ghost":
        del ways["token_weights"]
    _fit(plan, model, text, tmp_path / "one", **ways)
    for n_workers in counts:
        with cluster_of(n_workers) as client:
            _fit(plan, model, text, tmp_path / f"by {n_workers}", scheduler=client, **ways)
        assert (tmp_path / f"by {n_workers}").read_bytes() == (tmp_path / "one").read_bytes(), n_workers


def test_lines_of_workers_are_told_once_a_round(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*given: Any) -> None:
        given[-1].log("here" if current_thread() is main_thread() else "on a worker")
        place_fits(*given)

    monkeypatch.setattr(fit_shares, "place_fits", said)
    told = KeptLines()
    with cluster_of(2) as client:
        _fit("1:2 3:5", model, text, tmp_path / "shared", operator="ghost", scheduler=client, progress=told)
    lines = [line for line in told.lines if line in ("here", "on a worker")]
    assert lines == 2 * ["on a worker", "here"]


def test_ways_that_are_tried_are_measured_by_the_same_workers(model: Path, text: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"held_out": 6, "folds": 2}
    _fit("1:2 4:5", model, text, tmp_path / "one", **options)
    with cluster_of(2) as client:
        found = _fit("1:2 4:5", model, text, tmp_path / "shared", scheduler=client, **options)
    assert len(found.metadata["chosen"]) > 2
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "one").read_bytes()


def _recover(model: Path, text: str, out: Path, **groups: Any) -> RecoveryReport:
    windows: dict[str, Any] = {"spec": text, "sequences": S, "length": T}
    request = {"model": str(model), "remove": 2, "calibration": windows, "evaluate": windows}
    compute = {"micro_batch": 2, "dtype": "float32", **groups.pop("compute", {})}
    return run(Recovery.make({**request, "compute": compute, **groups}), out)


def _files(report: RecoveryReport) -> dict[str, bytes]:
    out = Path(report.export.out)
    work = out.with_name(f"{out.name}.work")
    results = [*out.iterdir(), *work.glob("*.safetensors"), *work.glob("plan-*.json")]
    return {path.name: path.read_bytes() for path in results if path.is_file()}


@pytest.mark.parametrize(
    ("compute", "groups"),
    [
        ({}, {"method": {"operator": "least-squares", "features": "hidden+mlp"}}),
        ({"device": "cpu,cpu"}, {"method": {"operator": "ghost"}}),
        (
            {"device": "cpu,cpu"},
            {"search": {"criterion": "streamline"}, "method": {"operator": "ghost"}},
        ),
    ],
    ids=["cluster", "devices", "devices and a store"],
)
def test_a_recovery_that_workers_share_leaves_the_files_of_one_process(
    compute: dict[str, Any],
    groups: dict[str, Any],
    model: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = _recover(model, text, tmp_path / "one" / "out", **groups)
    here: list[str] = []
    original = StreamedPass.run

    def counted(self: StreamedPass) -> None:
        here.append(current_thread().name)
        original(self)

    monkeypatch.setattr(StreamedPass, "run", counted)
    # The processes themselves are started in the slow tests.
    monkeypatch.setattr("ghoststream.stages.workers._processes", cluster_of)
    with nullcontext() if compute else cluster_of(2) as client:
        given = {} if client is None else {"reduction": {"scheduler": client.scheduler.address}}
        together = _recover(model, text, tmp_path / "shared" / "out", compute=compute, **given, **groups)
    assert _files(together) == _files(alone)
    assert _losses(together) == _losses(alone)
    assert len(set(here)) > 1, "workers ran passes"
    assert here.count(main_thread().name) <= 1, "this process ran none but the ranking of a search"


def _losses(report: RecoveryReport) -> list[float]:
    assert report.evaluation is not None
    return [row.loss for row in report.evaluation.rows]


def test_what_cannot_be_shared_is_refused_before_any_work(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("work was begun")

    monkeypatch.setattr(StreamedPass, "run", work)
    monkeypatch.setattr("ghoststream.stages.session.prepare_tokens", work)
    out = tmp_path / "out"
    for several in ({"device": "cpu,cpu"}, {"scheduler": "tcp://127.0.0.1:9"}):
        with pytest.raises(RequestError, match=r"--refit fits the layers behind a gap.*--refit 0"):
            _fit("1:2", model, text, out, refit=1, **several)
    with pytest.raises(RequestError, match=r"--refit fits the layers behind a gap"):
        _recover(model, text, out, compute={"device": "cpu,cpu"}, method={"refit": 1})
    both = {"compute": {"device": "cpu,cpu"}, "reduction": {"scheduler": "tcp://127.0.0.1:9"}}
    with pytest.raises(RequestError, match="leave one of the two out"):
        _recover(model, text, out, search={"criterion": "streamline"}, **both)
    with pytest.raises(RequestError, match="statistics of a store are reduced on one"):
        fit("1:2", store=tmp_path / "store", device="cpu,cpu", out=out)
    assert list(tmp_path.iterdir()) == []


def _dies_once(compute: Compute, *share: Any) -> Any:
    """What a share does, on a worker that is lost the first time."""
    mark = Path(os.environ["GHOSTSTREAM_TEST_MARK"])
    if not mark.exists():
        mark.touch()
        os._exit(1)
    return sum_share(compute, *share)


@pytest.mark.soak
def test_a_worker_that_is_lost_costs_its_share(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHOSTSTREAM_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(fit_shares, "sum_share", _dies_once)
    ways: dict[str, Any] = {"operator": "least-squares", "features": "hidden+mlp"}
    _fit("1:2 3:5", model, text, tmp_path / "one", **ways)
    _fit("1:2 3:5", model, text, tmp_path / "shared", device="cpu,cpu", **ways)
    assert (tmp_path / "mark").exists()
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "one").read_bytes()
