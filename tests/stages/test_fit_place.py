"""Which fits of a pass are on the accelerator: those that it holds beside two layers and the work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ghoststream.stages.choosing.moments import FitPlace, use_device

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("free", "room"), [(1000, 800), (800, 800), (799, 300), (300, 300), (299, 0)])
def test_the_largest_fit_that_has_room_and_all_smaller_ones(free: int, room: int) -> None:
    asked: list[int] = []

    def reserve_on_device(n_bytes: int) -> bool:
        asked.append(n_bytes)
        return n_bytes <= free

    session: Any = SimpleNamespace(device=torch.device("cuda:1"))
    memory: Any = SimpleNamespace(reserve_on_device=reserve_on_device)
    place = FitPlace()
    # 0 is a fit that cannot be there.
    use_device(place, session, memory, [300, 0, 800, 300])
    assert [place.of(size) for size in (0, 300, 800)] == [
        None,
        "cuda:1" if room >= 300 else None,
        "cuda:1" if room >= 800 else None,
    ]
    assert 0 not in asked
