"""What a pass says it will need before it begins: what it then takes, or a refusal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.errors import BudgetError
from ghoststream.spans import PruningPlan
from ghoststream.streaming import (
    Lane,
    MemoryBudget,
    PassMemory,
    PassOptions,
    Skeleton,
    StatesFactory,
    StreamedPass,
    make_batches,
)
from ghoststream.streaming.rehearsal import rehearsed
from ghoststream.streaming.states import FileStates
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import fit, select
from tests.helpers.searching import HELD, on_windows, save_windows

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("rehearsed") / "model")


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_windows(save_windows(tmp_path_factory.mktemp("windows")))


@pytest.fixture
def needed_and_taken(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Of each pass: what it said of scratch and host memory, and what it took."""
    found: list[list[tuple[int, int]]] = []
    run = StreamedPass.run

    def said(lanes: Any, batches: Any, factory: StatesFactory, *where: Any) -> StatesFactory:
        needed = rehearsed(lanes, batches, factory, *where)
        assert factory.live_bytes == factory.most_scratch == 0
        found.append([(needed.most_scratch, needed.most_host)])
        return needed

    def ran(self: StreamedPass) -> None:
        run(self)
        found[-1].append((self._factory.most_scratch, self._factory.most_host))

    monkeypatch.setattr("ghoststream.streaming.executor.rehearsed", said)
    monkeypatch.setattr(StreamedPass, "run", ran)
    return found


SEARCHED: dict[str, Any] = {"search": "exhaustive", "held_out": HELD}


@pytest.mark.parametrize(
    "make",
    [
        lambda out, **more: select(2, out=out, **SEARCHED, **more),
        lambda out, **more: fit("1:2 3:4", out=out, refit=1, **more),
        lambda out, **more: fit("1:2 3:5", out=out, operator="ghost", inputs="dense", **more),
    ],
    ids=["search", "refit", "dense"],
)
@pytest.mark.parametrize("host_memory", [250_000, 600_000])
def test_a_pass_takes_what_it_says(
    make: Callable[..., Any],
    host_memory: int,
    model: Path,
    windows: dict[str, Any],
    tmp_path: Path,
    needed_and_taken: list[list[tuple[int, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders: list[Path] = []
    whole = FileStates.__init__

    def opened(self: FileStates, folder: Path, *shape: Any) -> None:
        folders.append(folder)
        whole(self, folder, *shape)

    monkeypatch.setattr(FileStates, "__init__", opened)
    make(tmp_path / "made" / "result", model=model, host_memory=host_memory, **windows)
    assert all(needed == taken for needed, taken in needed_and_taken)
    assert any(needed[0] for needed, _ in needed_and_taken) == bool(folders)
    assert host_memory > 250_000 or folders
    assert set(folders) <= {tmp_path}, "the nearest folder that was there"


def test_a_pass_that_finds_no_scratch_is_refused_before_it_reads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(4 * 24, dtype=np.int32).reshape(4, 24) % 64
    skeleton, batches = Skeleton(model), make_batches(ids, np.ones_like(ids, dtype=bool), 2)
    states = ids.size * skeleton.hidden_size * skeleton.dtype.itemsize
    lanes = [Lane(plan, PruningPlan.parse(skeleton.n_layers, plan)) for plan in ("1:3", "2:4")]
    # Both lanes part from the first one on, which waits at layer 1.
    for free in (2 * states - 1, 2 * states):
        monkeypatch.setattr("ghoststream.files.space.free_disk", lambda _, free=free: free)
        factory = StatesFactory(
            batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device, host_bytes=0
        )
        run = StreamedPass(skeleton, batches, lanes, factory, PassOptions()).run
        if free < 2 * states:
            with pytest.raises(BudgetError, match=f"hidden states .* at {tempfile.gettempdir()}, but only"):
                run()
            assert skeleton.reader.bytes_read == 0
        else:
            run()
    # What passes before have taken of the same places is not asked for again.
    monkeypatch.setattr("ghoststream.files.space.free_disk", lambda _: states)
    StreamedPass(skeleton, batches, lanes[:1], factory, PassOptions()).run()


def test_a_checkpoint_is_read_past_the_page_cache_that_a_pass_leaves_no_room(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(4 * 24, dtype=np.int32).reshape(4, 24) % 64
    skeleton, batches = Skeleton(model), make_batches(ids, np.ones_like(ids, dtype=bool), 2)
    # Two variants at most: the dense lane, and what waits at layer 1, which then goes on.
    states = 2 * ids.size * skeleton.hidden_size * skeleton.dtype.itemsize
    checkpoint = sum(entry.n_bytes for entry in skeleton.index.tensors.values())
    lanes = [
        Lane(name, PruningPlan.parse(skeleton.n_layers, plan)) for name, plan in (("a", "1:3"), ("b", ""))
    ]
    memory = PassMemory(skeleton, MemoryBudget(), ids.shape[1], micro_batch=2)
    memory.reserve_on_host(1000)
    beside, _ = memory.taken()
    needed = checkpoint + states + beside + 1000
    for free, past in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr("ghoststream.checkpoint.content_reader.free_host_memory", lambda free=free: free)
        StreamedPass(skeleton, batches, lanes, memory.states_factory(batches), PassOptions()).run()
        assert skeleton.reader._files.direct == past
