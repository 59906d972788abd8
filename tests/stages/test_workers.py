"""Workers that share the sequences leave what one process does, bit for bit, however many there are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.errors import MismatchError, RequestError
from ghoststream.evaluation import EvaluationReport
from ghoststream.options import Compute, Method, Text
from ghoststream.progress import KeptLines, SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.choosing.moments import place_fits
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.shares import Measuring
from ghoststream.stages.choosing.shares import measure_share as measure_candidates
from ghoststream.stages.choosing.shares import measure_shares as measure_all
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.measuring.measurement import Measurement
from ghoststream.stages.measuring.model_groups import group_models
from ghoststream.stages.measuring.shares import measure_share, measure_shares
from ghoststream.stages.session import ModelSession
from ghoststream.stages.sharing import is_shared, rows_of
from ghoststream.stages.workers import Shared
from ghoststream.statistics import Ranges
from tests.helpers.crews import cluster_of
from tests.helpers.groups import capture_arguments, evaluate_arguments
from tests.helpers.requests import select
from tests.helpers.searching import HELD, on_windows, open_model, save_windows

pytestmark = pytest.mark.integration
S, T = 13, 16


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(S, T)))
    return path


class Shares(SilentProgress):
    """Counts the sequences of the shares that are done."""

    def __init__(self) -> None:
        self.label, self.done = "", 0

    def start(self, label: str, total: int, unit: str) -> None:
        del total, unit
        self.label = label

    def advance(self, count: int) -> None:
        self.done += count


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


def _evaluate(model: Path, ids: Path, **options: Any) -> EvaluationReport:
    settings = {"length": T, "micro_batch": 2, **options}
    return evaluate([model], **evaluate_arguments(f"ids:{ids}", settings))


@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 7))
def test_shares_are_whole_steps_and_all_sequences_once(count: int, n_sequences: int, step: int) -> None:
    rows = [rows_of(number, count, n_sequences, step) for number in range(1, count + 1)]
    assert [row for start, stop in rows for row in range(start, stop)] == list(range(n_sequences))
    assert all(start % step == 0 for start, stop in rows if start < stop)
    sizes = [-(-(stop - start) // step) for start, stop in rows]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_a_cluster_gives_the_figures_and_files_of_one_process(
    n_workers: int, tiny_llama: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghoststream.costs.SHARD_BYTES", 4 * T * 32 * 4)
    settings = {"sequences": S, "length": T, "micro_batch": 2}
    expected = _evaluate(tiny_llama, ids)
    alone = capture(tiny_llama, store=tmp_path / "one", **capture_arguments(f"ids:{ids}", settings))
    progress = Shares()
    with cluster_of(n_workers) as client:
        found = _evaluate(tiny_llama, ids, scheduler=client, progress=progress)
        from_store = evaluate([tiny_llama], store=alone.uri, scheduler=client)
        together = capture(
            tiny_llama,
            store=tmp_path / "shared",
            scheduler=client.scheduler.address,
            **capture_arguments(f"ids:{ids}", settings),
        )
    assert found.to_json() == expected.to_json()
    assert from_store.rows[0].losses == expected.rows[0].losses
    assert (progress.label, progress.done) == (f"shares of {n_workers} workers", S)
    assert together.complete
    assert _files(tmp_path / "shared") == _files(tmp_path / "one")


def test_candidates_shared_by_workers_give_the_plan_of_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    windows = on_windows(save_windows(tmp_path))
    options = {"model": tiny_llama, "held_out": HELD, "operator": "ghost", **windows}
    select(2, out=tmp_path / "one.json", **options)
    with cluster_of(3) as client:
        found = select(2, out=tmp_path / "shared.json", scheduler=client, **options)
    assert len(found.candidates) > 3
    assert (tmp_path / "shared.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_lines_of_workers_come_with_their_answers_each_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*given: Any) -> None:
        given[-1].log("the fit goes to the host")
        place_fits(*given)

    monkeypatch.setattr("ghoststream.stages.choosing.fitted_lanes.place_fits", said)
    session, tokens = open_model(tiny_llama, save_windows(tmp_path))
    n_layers = session.skeleton.n_layers
    repairs = [
        Repair.alike(PruningPlan(n_layers, (Span(layer, layer + 1),)), Method(operator="ghost"))
        for layer in range(1, 4)
    ]
    measuring, told = Measuring(tokens, Ranges.make(tokens.n_sequences - HELD, folds=1), 2), KeptLines()
    with cluster_of(3) as client, Shared(Compute(), client).workers(SilentProgress()) as crew:
        found = measure_all(crew, session, measuring, repairs, told)
    assert len(found.candidates) == 3
    assert told.lines == ["the fit goes to the host"]


def test_a_worker_that_measures_another_model_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    session, tokens = open_model(tiny_llama, save_windows(tmp_path))
    repair = Repair.alike(PruningPlan(session.skeleton.n_layers, (Span(1, 2),)), Method(operator="none"))
    with pytest.raises(MismatchError, match="give a path that all workers share"):
        measure_candidates(session.compute, str(tiny_llama), "other", Measuring(tokens, None, 2), [repair])


def _die_once(compute: Compute, mark: Path, number: int) -> tuple[int, str]:
    if number == 1 and not mark.exists():
        mark.touch()
        os._exit(1)
    return number, compute.device


def _device(compute: Compute, number: int) -> tuple[int, str, bool]:
    return number, compute.device, compute.host_memory is not None


def test_each_worker_of_this_machine_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # The processes themselves are started in the slow tests.
    monkeypatch.setattr("ghoststream.stages.workers._processes", cluster_of)
    with Shared(Compute(device="cpu, cuda:7"), None).workers(SilentProgress()) as crew:
        assert crew.rows(9, 4) == [(0, 8), (8, 9)]
        assert crew.rows(3, 4) == [(0, 3)]
        found = crew.run(_device, Compute(device="cpu, cuda:7"), [(n,) for n in range(9)], [1] * 9, Shares())
    assert [number for number, _, _ in found] == list(range(9))
    assert {device for _, device, _ in found} == {"cpu", "cuda:7"}
    assert all(is_limited for _, _, is_limited in found)  # both have a part of the free memory


_EVENTS: list[str] = []


def _note(compute: Compute, number: int) -> None:
    del compute
    _EVENTS.append(f"share {number}")


def test_what_this_process_keeps_of_a_device_is_given_back_before_a_share_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: _EVENTS.append("given back"))
    with cluster_of(1) as client, Shared(Compute(), client).workers(SilentProgress()) as crew:
        for number in range(2):
            crew.run(_note, Compute(), [(number,)], [1], SilentProgress())
    assert [
        line for number in range(2) for line in ("given back", f"share {number}", "given back")
    ] == _EVENTS


@pytest.mark.soak
def test_processes_of_this_machine_and_one_that_is_lost(tiny_llama: Path, ids: Path, tmp_path: Path) -> None:
    compute = Compute(device="cpu,cpu", micro_batch=2)
    text, models = Text(spec=f"ids:{ids}", length=T), [tiny_llama]
    (group,) = group_models(models, Compute(device="cpu", micro_batch=2))
    shared, alone = (Measurement(group, text, SilentProgress()) for _ in range(2))
    alone.run(SilentProgress())
    with Shared(compute, None).workers(SilentProgress()) as crew:
        measure_shares(crew, shared, models, 0, text, compute, SilentProgress())
        assert [result[1] for result in shared.results()] == [result[1] for result in alone.results()]
        shares = [(tmp_path / "mark", number) for number in range(2)]
        done = crew.run(_die_once, compute, shares, [1, 1], SilentProgress())
    assert done == [(0, "cpu"), (1, "cpu")]
    assert (tmp_path / "mark").exists()


def test_a_worker_that_finds_another_model_is_told(tiny_llama: Path, ids: Path) -> None:
    text, compute = Text(spec=f"ids:{ids}", length=T), Compute(micro_batch=2)
    (group,) = group_models([tiny_llama], compute)
    measurement = Measurement(group, text, SilentProgress())
    asked = [(number, {**request, "fingerprint": "other"}) for number, request in measurement.requests()]
    with pytest.raises(MismatchError, match=r"fingerprint is .* asked for .other.*for all workers"):
        measure_share(compute, [tiny_llama], 0, text, measurement.tokens, asked, (0, 2))


def test_what_cannot_be_shared_is_refused(tiny_llama: Path, ids: Path, tmp_path: Path) -> None:
    several = Compute(device="cpu,cpu")
    assert is_shared(several, None)
    assert not is_shared(Compute(), None)
    with pytest.raises(RequestError, match="leave one of the two out"):
        is_shared(several, "tcp://127.0.0.1:9")
    with pytest.raises(RequestError, match="of which this command runs on one; name one"):
        ModelSession(tiny_llama, several)
    with pytest.raises(RequestError, match="--worker is one share"):
        capture(tiny_llama, calibration=f"ids:{ids}", store=tmp_path / "s", compute=several, worker=(1, 2))
    with pytest.raises(RequestError, match="unknown device 'abacus'"):
        evaluate([tiny_llama], text=f"ids:{ids}", compute=Compute(device="abacus,cpu"))
