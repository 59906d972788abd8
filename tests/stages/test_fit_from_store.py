from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.errors import (
    BudgetError,
    BusyError,
    NumericsError,
    OutputExistsError,
    PlanError,
    RequestError,
    StoreError,
)
from ghoststream.files import FileLock
from ghoststream.operators import OperatorSet
from ghoststream.progress import SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.from_store.fit import _Job
from ghoststream.statistics import SumState, open_source
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.testing.states import ragged_mask, random_states, store_of
from tests.helpers.peak import Peak
from tests.helpers.requests import fit, ranges_of, select

pytestmark = pytest.mark.integration
L = 6
SHAPE = (12, 16, 24)
PLAN = PruningPlan(L, (Span(0, 1), Span(2, 4), Span(5, 6)))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_of(
        tmp_path_factory.mktemp("solve") / "store",
        random_states(L, SHAPE),
        mask=ragged_mask(*SHAPE[:2]),
        store_dtype="bfloat16",
    )


class Recorder(SilentProgress):
    def __init__(self) -> None:
        self.events: list[tuple[str, int, str]] = []
        self.done: dict[str, int] = {}
        self.messages: list[str] = []

    def start(self, task: str, total: int, unit: str) -> None:
        self.events.append((task, total, unit))
        self.done[task] = 0

    def advance(self, amount: int) -> None:
        self.done[self.events[-1][0]] += amount

    def log(self, message: str) -> None:
        self.messages.append(message)


def test_operators_predict_as_well_as_least_squares_on_the_stored_bits(uri: str, tmp_path: Path) -> None:
    found = fit(PLAN, store=uri, out=tmp_path / "operators.safetensors")
    source, mask = open_source(uri), ragged_mask(*SHAPE[:2])
    for operator in found.boundaries:
        x, y = (
            source.read_numpy(layer, 0, SHAPE[0], dtype=np.float64)[mask]
            for layer in (operator.span.start, operator.span.stop)
        )
        best = np.linalg.lstsq(x, y - x)[0]
        least = np.linalg.norm(x @ best - (y - x))
        error = np.linalg.norm(operator.apply(x) - y)
        assert abs(error / least - 1) < 1e-10
        assert operator.diagnostics["relative_residual"] == pytest.approx(
            least / np.linalg.norm(y - x), rel=1e-9
        )


@pytest.mark.parametrize("operator", ["ghost", "linear-patch-diagonal", "none"])
def test_the_file_says_what_it_is_and_a_second_run_changes_nothing(
    uri: str, tmp_path: Path, operator: str
) -> None:
    out = tmp_path / "new" / "operators.safetensors"
    made = fit(PLAN, store=uri, operator=operator, out=out)
    before = out.read_bytes()
    again = fit(PLAN, store=uri, operator=operator, out=out)
    assert out.read_bytes() == before
    assert again.diagnostics == made.diagnostics == OperatorSet.load(out).diagnostics
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert (again.kind, again.plan, again.hidden) == (operator, PLAN, SHAPE[2])
    assert again.metadata["base"] == {**open_source(uri).fingerprint["checkpoint"], "tensors": {}}
    method = again.metadata["recipe"]["method"]
    assert method["operator"] == operator
    assert method["ridge"] == (1e-6 if operator == "ghost" else None)
    assert method["token_weights"] == "uniform"
    for key in ("relative_residual", "relative_residual_out_of_sample", "r2", "n_tokens"):
        assert all(diagnostics[key] is not None for diagnostics in again.diagnostics.values())


def test_plans_come_from_select_from_spans_or_as_they_are(uri: str, tmp_path: Path) -> None:
    chosen = select(2, criterion="streamline", store=uri, out=tmp_path / "plan.json").plan
    (span,) = chosen.spans
    runs: list[PruningPlan | str | Path] = [chosen, str(span), tmp_path / "plan.json"]
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for plan, out in zip(runs, files, strict=True):
        fit(plan, store=uri, out=out)
    assert len({out.read_bytes() for out in files}) == 1


def test_workers_change_no_bit(uri: str, tmp_path: Path) -> None:
    outs = [tmp_path / f"{workers}.safetensors" for workers in (1, 2, 5)]
    for workers, out in zip((1, 2, 5), outs, strict=True):
        fit(PLAN, store=uri, out=out, workers=workers)
    assert len({out.read_bytes() for out in outs}) == 1


def test_when_a_range_fails_the_others_have_stopped_before_the_error_leaves(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduce, save = BoundaryReducer.reduce, SumState.save
    arrivals, raised, written = itertools.count(), threading.Event(), threading.Event()
    events: list[str] = []

    def slow_or_broken(*arguments: Any) -> SumState:
        if next(arrivals) == 0:
            # Only an error that leaves too early sets it; this task is then still at work.
            raised.wait(0.5)
            return reduce(*arguments)
        raise NumericsError("broken on purpose")

    def noted(state: SumState, path: Path, metadata: dict[str, Any]) -> None:
        save(state, path, metadata)
        events.append("written")
        written.set()

    monkeypatch.setattr(BoundaryReducer, "reduce", slow_or_broken)
    monkeypatch.setattr(SumState, "save", noted)
    out = tmp_path / "operators.safetensors"
    with pytest.raises(NumericsError, match="broken on purpose"):
        fit(PLAN, store=uri, out=out, workers=2)
    events.append("raised")
    raised.set()
    assert written.wait(10)
    assert events == ["written", "raised"]
    assert [path.name for path in tmp_path.iterdir()] == [f"{out.name}.partial"]
    monkeypatch.undo()
    fit(PLAN, store=uri, out=out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_solved_boundary_that_the_disk_damaged_is_solved_again(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "operators.safetensors", tmp_path / "whole.safetensors"
    fit(PLAN, store=uri, out=whole)
    monkeypatch.setattr(_Job, "_solve", _stop_after_fitting)
    with pytest.raises(OSError, match="stopped on purpose"):
        fit(PLAN, store=uri, out=out)
    monkeypatch.undo()
    first, *_ = sorted((tmp_path / f"{out.name}.partial").glob("fit/boundary-*"))
    first.write_bytes(first.read_bytes()[:-8])
    fit(PLAN, store=uri, out=out)
    assert out.read_bytes() == whole.read_bytes()


_solve = _Job._solve


def _stop_after_fitting(*given: Any) -> None:
    _solve(*given)
    raise OSError("stopped on purpose")


def test_a_dask_cluster_gives_the_same_bits(uri: str, tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    here, address, client_out = (tmp_path / f"{name}.safetensors" for name in ("here", "address", "client"))
    expected = fit(PLAN, store=uri, out=here)
    progress = Recorder()
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        fit(PLAN, store=uri, out=address, scheduler=cluster.scheduler_address, progress=progress)
        fit(PLAN, store=uri, out=client_out, scheduler=client)
        assert select(2, criterion="streamline", store=uri, scheduler=client) == select(
            2, criterion="streamline", store=uri
        )
        path = store_of(tmp_path / "broken", random_states(2, (4, 6, 5)))
        with pytest.raises(NumericsError, match="NaN or infinity"):
            _break_reading(path, client, tmp_path)
    assert here.read_bytes() == address.read_bytes() == client_out.read_bytes()
    assert expected.warnings == ()
    assert progress.done == {"moments": SHAPE[0], "solve": 3}


def _break_reading(path: str, client: object, folder: Path) -> None:
    from ghoststream.activations import ActivationStore

    read = ActivationStore.read_numpy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationStore, "read_numpy", lambda *a, **k: read(*a, **k) * np.nan)
        fit("1:2", store=path, out=folder / "broken.safetensors", scheduler=client)


def test_a_scheduler_that_does_not_answer_is_named(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghoststream.statistics.cluster._CONNECT_SECONDS", 1)
    with pytest.raises(RequestError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        fit(PLAN, store=uri, out=tmp_path / "operators.safetensors", scheduler="tcp://127.0.0.1:9")


def test_workers_that_do_not_share_the_folder_are_named(uri: str, tmp_path: Path) -> None:
    from ghoststream.statistics import Ranges
    from ghoststream.statistics.boundary import BoundaryReducer
    from ghoststream.statistics.engines import ReductionJob, _require_shared

    job = ReductionJob(uri, BoundaryReducer(PLAN.spans), Ranges.make(4, folds=1), tmp_path)
    with pytest.raises(RequestError, match="choose an output folder that all workers share"):
        _require_shared((tmp_path / "absent.safetensors",), job)


def test_progress_counts_sequences_and_boundaries_and_passes_warnings_on(tmp_path: Path) -> None:
    progress = Recorder()
    uri = store_of(tmp_path / "store", random_states(3, (8, 2, 32)))
    found = fit("1:2", store=uri, out=tmp_path / "operators.safetensors", progress=progress)
    assert progress.events == [("moments", 8, "sequences"), ("solve", 1, "boundaries")]
    assert progress.done == {"moments": 8, "solve": 1}
    assert any("16 tokens for 32 features" in text for text in found.warnings)
    assert progress.messages == [f"warning: {text}" for text in found.warnings]


def test_what_exists_is_never_overwritten(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "operators.safetensors"
    out.write_text("precious")
    with pytest.raises(OutputExistsError, match="not the result of this request"):
        fit(PLAN, store=uri, out=out)
    assert out.read_text() == "precious"
    out.unlink()
    fit(PLAN, store=uri, out=out)
    before = out.read_bytes()
    for plan, options in (
        (PLAN, {"ridge": 1e-3}),
        (PLAN, {"folds": 2}),
        ("2:4", {}),
    ):
        with pytest.raises(OutputExistsError, match="not the result of this request"):
            fit(plan, store=uri, out=out, **options)
    with pytest.raises(OutputExistsError):
        fit(PLAN, store=uri, out=tmp_path)
    assert out.read_bytes() == before


def test_a_place_that_cannot_be_a_folder_is_refused(uri: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match=r"cannot write .*choose a place that you may write to"):
        fit(PLAN, store=uri, out=tmp_path / "file" / "operators.safetensors")


def test_what_another_process_holds_is_left_when_the_result_is_there(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "operators.safetensors"
    made = fit(PLAN, store=uri, out=out)
    lock = FileLock(out.with_name(f".{out.name}.lock"), guarded=out)
    with lock:
        assert fit(PLAN, store=uri, out=out).diagnostics == made.diagnostics
        assert lock.path.exists()


def test_two_processes_do_not_write_one_file(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "operators.safetensors"
    with (
        FileLock(out.with_name(f".{out.name}.lock"), guarded=out),
        pytest.raises(BusyError, match="being written by another process"),
    ):
        fit(PLAN, store=uri, out=out)


def test_requests_that_cannot_be_met_end_before_anything_is_written(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "operators.safetensors"
    with pytest.raises(PlanError, match="model of 7 layers, this model has 6"):
        fit(PruningPlan(7, (Span(1, 2),)), store=uri, out=out)
    with pytest.raises(RequestError, match="-1 is no ridge"):
        fit(PLAN, store=uri, out=out, ridge=-1, operator="none")
    with pytest.raises(RequestError, match="no operator 'nonsense'"):
        fit(PLAN, store=uri, out=out, operator="nonsense")
    with pytest.raises(RequestError, match="folds empty"), ranges_of(12):
        fit(PLAN, store=uri, out=out)
    states = random_states(L, SHAPE)
    partly = store_of(tmp_path / "partly", {0: states[0], 2: states[2]}, n_layers=L)
    with pytest.raises(StoreError, match=r"does not hold h\[1\]"):
        fit(PLAN, store=partly, out=out)
    assert not out.exists()


def test_a_disk_too_small_is_found_before_the_work(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghoststream.files.space.free_disk", lambda _: 1000)
    with pytest.raises(BudgetError, match="partial statistics of the boundaries needs"):
        fit(PLAN, store=uri, out=tmp_path / "operators.safetensors")


def test_solving_one_boundary_takes_56_bytes_a_pair_of_channels(tmp_path: Path) -> None:
    # C = 512: the solve holds 7 C x C float64 = 14 MiB; one range task 2 of them and 4 blocks of 1 MiB.
    hidden = 512
    uri = store_of(tmp_path / "store", random_states(2, (16, 64, hidden)))
    fit("0:1", store=uri, operator="none", out=tmp_path / "warm", workers=1)
    with Peak() as peak:
        fit("0:1", store=uri, out=tmp_path / "operators.safetensors", workers=1)
    assert peak.bytes < 1.1 * 56 * hidden**2


def test_three_spans_take_the_memory_of_one_while_solving(tmp_path: Path) -> None:
    # The states of all three are on disk; one boundary is loaded at a time. Their range task holds 6 C x C.
    hidden = 512
    uri = store_of(tmp_path / "store", random_states(6, (8, 32, hidden)))
    fit("0:1", store=uri, operator="none", out=tmp_path / "warm", workers=1)
    with Peak() as peak:
        fit("0:1 2:3 4:6", store=uri, out=tmp_path / "operators.safetensors", workers=1)
    operators = 3 * 4 * hidden**2
    assert peak.bytes < 1.1 * (56 * hidden**2 + operators)
