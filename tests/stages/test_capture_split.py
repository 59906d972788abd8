"""A capture that is split over workers leaves the files of a single one, however many there are and in any
order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream import costs
from ghoststream.activations import ActivationStore, verify_store
from ghoststream.errors import MismatchError, RequestError
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.sharing import rows_of
from ghoststream.streaming import StreamedPass
from tests.helpers.command_bench import last_line, run
from tests.helpers.groups import capture_arguments

pytestmark = pytest.mark.integration
S, T, BYTES = 21, 16, 32 * 4
SHARD_BYTES = 4 * T * BYTES + 100
"""Room for four sequences in float32: six shards, the last of one sequence, eleven micro-batches of two."""


class Lines:
    """A progress that keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    def start(self, *_: object) -> None: ...

    def advance(self, *_: object) -> None: ...

    def finish(self) -> None: ...


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(S, T), dtype=np.int32))
    return path


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SHARD_BYTES", SHARD_BYTES)


def _capture(model: Path, ids: Path, store: Path, **options: Any) -> ActivationStore:
    settings = {"sequences": S, "length": T, "micro_batch": 2, **options}
    return capture(model, store=store, **capture_arguments(f"ids:{ids}", settings))


def _files(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != "run.json"
    }


@pytest.mark.parametrize(
    ("options", "orders"),
    [
        ({}, [(4, 2, 1, 3)]),
        ({"store_dtype": "bfloat16"}, [(2, 3, 1)]),
        ({"layers": (2, 5), "store_dtype": "int8"}, [(3, 2, 1)]),
        ({"micro_batch": 3}, [(2, 1)]),
        ({"micro_batch": 6}, [(2, 1)]),
    ],
    ids=["all", "narrower", "some-narrower", "shard-of-one-batch", "batch-of-two-shards"],
)
def test_any_number_of_workers_in_any_order_leave_the_same_files(
    options: dict[str, Any], orders: list[tuple[int, ...]], tiny_llama: Path, ids: Path, tmp_path: Path
) -> None:
    _capture(tiny_llama, ids, tmp_path / "one", **options)
    expected = _files(tmp_path / "one")
    assert sum(name.startswith("hidden/5/c.") for name in expected) > 2
    for order in orders:
        store = tmp_path / str(len(order))
        complete = [
            _capture(tiny_llama, ids, store, worker=(number, len(order)), **options).complete
            for number in order
        ]
        assert complete[-1]
        assert _files(store) == expected
        assert verify_store(store) == []


def test_each_worker_computes_its_own_sequences_only(
    tiny_llama: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    original = StreamedPass.run

    def watched(self: StreamedPass) -> None:
        seen.append([batch.start for batch in self._batches])
        original(self)

    monkeypatch.setattr(StreamedPass, "run", watched)
    logs = [Lines() for _ in range(7)]
    for number, log in enumerate(logs, start=1):
        _capture(tiny_llama, ids, tmp_path, worker=(number, 7), progress=log)
    assert seen == [[0, 2], [4, 6], [8, 10], [12, 14], [16, 18], [20]]
    assert logs[1].lines == ["worker 2 of 7: sequences [4,8) of 21"]
    assert logs[6].lines[0].startswith("worker 7 of 7 has nothing to do: 21 sequences make 6 shares at most")
    _capture(tiny_llama, ids, tmp_path, worker=(1, 7))
    assert len(seen) == 6, "a complete store is not captured again"


@pytest.mark.parametrize("broken_at", [0, 3])
def test_an_interrupted_worker_repeats_the_layer_that_was_interrupted(
    broken_at: int, tiny_llama: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"layers": (1, 5), "store_dtype": "bfloat16"}
    _capture(tiny_llama, ids, tmp_path / "one", **options)
    original, ran = StreamedPass._through_layer, list[int]()

    def failing(self: StreamedPass, layer: int, *rest: Any) -> None:
        ran.append(layer)
        if ran.count(broken_at) == 1 and layer == broken_at:
            raise KeyboardInterrupt
        original(self, layer, *rest)

    monkeypatch.setattr(StreamedPass, "_through_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        _capture(tiny_llama, ids, tmp_path / "two", worker=(1, 2), **options)
    monkeypatch.setattr(StreamedPass, "_through_layer", original)
    _capture(tiny_llama, ids, tmp_path / "two", worker=(2, 2), **options)
    monkeypatch.setattr(StreamedPass, "_through_layer", failing)
    ran.remove(broken_at)
    ran.extend([broken_at, -1])
    store = _capture(tiny_llama, ids, tmp_path / "two", worker=(1, 2), **options)
    assert ran[ran.index(-1) + 1 :] == list(range(broken_at, 5))
    assert store.complete
    assert _files(tmp_path / "two") == _files(tmp_path / "one")


def test_an_unfinished_store_says_whose_turn_it_is(tiny_llama: Path, ids: Path, tmp_path: Path) -> None:
    _capture(tiny_llama, ids, tmp_path / "store", worker=(2, 2))
    before = _files(tmp_path / "store")
    with pytest.raises(RequestError, match=r"in parts \(sequences \[12,21\)\), and not all are complete"):
        _capture(tiny_llama, ids, tmp_path / "store")
    with pytest.raises(RequestError, match=r"\[8,16\) overlaps one; give every worker the same number"):
        _capture(tiny_llama, ids, tmp_path / "store", worker=(2, 3))
    with pytest.raises(MismatchError, match=r"recipe.layers"):
        _capture(tiny_llama, ids, tmp_path / "store", worker=(1, 2), layers=(0, 1))
    with pytest.raises(RequestError, match="no worker 3 of 2; workers are counted from 1"):
        _capture(tiny_llama, ids, tmp_path / "store", worker=(3, 2))
    assert _files(tmp_path / "store") == before
    facts = inspect_path(tmp_path / "store").facts
    assert facts["complete"] is False
    assert facts["captured in parts"] == "sequences [12,21): 7 of 7"
    assert verify_store(tmp_path / "store") == []


def test_the_command_takes_a_worker(tiny_llama: Path, ids: Path, tmp_path: Path) -> None:
    text = ("--calibration", f"ids:{ids}", "--sequences", S, "--length", T, "--micro-batch", 2)
    command = ("capture", tiny_llama, *text, "--store", tmp_path / "store", "--worker")
    for worker, says in (("1/2", "next: the other workers"), ("2/2", "next: ghoststream select")):
        result = run(*command, worker)
        assert result.exit_code == 0, result.stderr
        assert says in result.stdout
    for worker in ("0/2", "3/2", "2", "a/b"):
        result = run(*command, worker)
        assert result.exit_code == 2
        assert "is no worker of so many; write for example 1/4" in last_line(result.stderr)


@pytest.mark.parametrize(
    ("n_sequences", "most", "micro_batch", "expected"),
    [(21, 4, 2, 4), (21, 5, 2, 4), (21, 5, 3, 3), (21, 4, 8, 4), (21, 4, 6, 3), (21, 4, 7, 1), (3, 9, 2, 3)],
)
def test_a_shard_is_whole_micro_batches_or_an_even_part_of_one(
    n_sequences: int, most: int, micro_batch: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "SHARD_BYTES", 10 * most + 9)
    assert costs.sequences_per_shard(n_sequences, 10, micro_batch) == expected
    # One shard is filled while another is written.
    assert (
        costs.store_buffer_bytes(
            sequence=5,
            sequences=n_sequences,
            micro_batch=micro_batch,
            itemsizes=(2,),
            threads=1,
            is_page_locked=False,
        )
        == 2 * 10 * expected
    )


@pytest.mark.parametrize("step", [1, 2, 7, 21, 40])
def test_shares_are_even_and_cut_at_whole_steps(step: int) -> None:
    for count in range(1, 30):
        shares = [rows_of(number, count, S, step) for number in range(1, count + 1)]
        assert [row for start, stop in shares for row in range(start, stop)] == list(range(S))
        assert all(start % step == 0 for start, stop in shares if start < stop)
        steps = [-(-(stop - start) // step) for start, stop in shares]
        assert max(steps) - min(steps) <= 1
        assert steps == sorted(steps, reverse=True)
