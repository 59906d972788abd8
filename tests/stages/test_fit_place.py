"""Which fits of a pass are on the accelerator: those that it holds beside two layers and the work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.options import Compute
from ghoststream.progress import SilentProgress
from ghoststream.stages.choosing.moments import FitPlace, place_fits
from ghoststream.stages.choosing.room import Room
from ghoststream.statistics.streamed import streamed_sums
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import fit
from tests.helpers.searching import on_windows, save_windows

pytestmark = pytest.mark.unit


class Told(SilentProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.parametrize(
    ("free", "room", "said"),
    [
        (800, 800, None),
        (799, 300, "the fit of mlp goes to the host: 1 bytes of device memory are missing"),
        (300, 300, "the fit of mlp goes to the host: 500 bytes of device memory are missing"),
        (299, 0, "the fit of mlp, hidden goes to the host: 501 bytes of device memory are missing"),
    ],
)
def test_the_largest_fit_that_has_room_and_all_smaller_ones(free: int, room: int, said: str | None) -> None:
    asked: list[int] = []
    kept: list[int] = []

    def reserve_on_device(n_bytes: int) -> bool:
        asked.append(n_bytes)
        return n_bytes <= free

    session: Any = SimpleNamespace(device=torch.device("cuda:1"), compute=Compute())
    memory: Any = SimpleNamespace(
        reserve_on_device=reserve_on_device,
        reserve_on_host=kept.append,
        limits=(None, 2000),
        taken=lambda: (0, 2000 - free),
    )
    # 0 is a fit that cannot be there.
    fits: Any = [
        SimpleNamespace(device_bytes=size, host_bytes=size + 7, kind=SimpleNamespace(features=name))
        for name, size in (("hidden", 300), ("normed", 0), ("mlp", 800), ("hidden", 300))
    ]
    place, told = FitPlace(), Told()
    place_fits(place, session, memory, fits, told)
    assert [place.of(size) for size in (0, 300, 800)] == [
        None,
        "cuda:1" if room >= 300 else None,
        "cuda:1" if room >= 800 else None,
    ]
    assert 0 not in asked
    assert kept == [807]
    assert told.lines == ([] if said is None else [said])


@pytest.mark.parametrize(
    ("room", "tasks"),
    [
        (Room(None), 8),
        (Room(1000), 4),  # of 100 bytes each: 1000 / 2 = 500, less than one more
        (Room(1000, taken=1000), 6),  # 1000 - 350 are left beside the sums
        (Room(10_000), 8),
        (Room(500), 1),
        (Room(100), 1),  # a fit that is too large is begun nevertheless
    ],
)
def test_as_many_ranges_at_a_time_as_a_pass_leaves_room_for(room: Room, tasks: int) -> None:
    assert room.tasks(8, 110 if tasks == 4 else 100, 350) == tasks


def test_with_memory_given_ranges_are_summed_side_by_side_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def sums(*args: Any, workers: int | None = None, **about: Any) -> Any:
        asked.append(workers)
        return streamed_sums(*args, workers=workers, **about)

    monkeypatch.setattr("ghoststream.stages.choosing.moments.streamed_sums", sums)
    monkeypatch.setattr("ghoststream.stages.choosing.moments.processors", lambda: 3)
    model, windows = save_tiny("llama", tmp_path / "model"), on_windows(save_windows(tmp_path))
    request: dict[str, Any] = {"model": model, "operator": "ghost", **windows}
    large, small = (
        fit("1:3", out=tmp_path / f"{memory}.safetensors", host_memory=memory, **request).operators[0]
        for memory in (10**9, 10**6)
    )
    assert asked == [3, 1]
    assert large.weight is not None
    assert small.weight is not None
    assert np.array_equal(large.weight, small.weight)
