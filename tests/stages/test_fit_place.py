"""Which fits of a pass are on the accelerator: those that it holds beside two layers and the work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.options import Compute
from ghoststream.stages.choosing import moments
from ghoststream.stages.choosing.moments import FitPlace, use_device
from ghoststream.stages.choosing.room import Room
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import fit
from tests.helpers.searching import on_windows, save_windows

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("free", "room"), [(1000, 800), (800, 800), (799, 300), (300, 300), (299, 0)])
def test_the_largest_fit_that_has_room_and_all_smaller_ones(free: int, room: int) -> None:
    asked: list[int] = []

    def reserve_on_device(n_bytes: int) -> bool:
        asked.append(n_bytes)
        return n_bytes <= free

    session: Any = SimpleNamespace(device=torch.device("cuda:1"), compute=Compute())
    memory: Any = SimpleNamespace(
        reserve_on_device=reserve_on_device, limits=(None, 2000), taken=lambda: (0, 2000 - free)
    )
    place = FitPlace()
    # 0 is a fit that cannot be there.
    use_device(place, session, memory, [300, 0, 800, 300])
    assert [place.of(size) for size in (0, 300, 800)] == [
        None,
        "cuda:1" if room >= 300 else None,
        "cuda:1" if room >= 800 else None,
    ]
    assert 0 not in asked


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
    whole = moments.streamed_sums

    def sums(*args: Any, workers: int | None = None, **about: Any) -> Any:
        asked.append(workers)
        return whole(*args, workers=workers, **about)

    monkeypatch.setattr(moments, "streamed_sums", sums)
    monkeypatch.setattr(moments, "processors", lambda: 3)
    model, windows = save_tiny("llama", tmp_path / "model"), on_windows(save_windows(tmp_path))
    request: dict[str, Any] = {"model": model, "operator": "ghost", **windows}
    found = [
        fit("1:3", out=tmp_path / f"{memory}.safetensors", host_memory=memory, **request).operators[0]
        for memory in (10**9, 10**6)
    ]
    assert asked == [3, 1]
    assert np.array_equal(found[0].weight, found[1].weight)
