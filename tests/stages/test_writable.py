"""A search takes no plan whose model has no configuration: Jamba tells the kinds of its layers by periods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ghoststream.options import Compute
from ghoststream.spans import PruningPlan
from ghoststream.stages.choosing.writable import why_not_writable, writable
from ghoststream.stages.session import ModelSession
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import select
from tests.helpers.searching import HELD, on_windows, save_windows

pytestmark = pytest.mark.integration
N_LAYERS = 10


@pytest.fixture(scope="module")
def jamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten layers with attention in every fourth, and one kind of MLP."""
    periods: dict[str, Any] = {"attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 1}
    folder = tmp_path_factory.mktemp("jamba") / "model"
    return save_tiny("jamba", folder, num_hidden_layers=N_LAYERS, expert_layer_offset=0, **periods)


def _keeps_a_period(plan: PruningPlan) -> bool:
    """Attention was in the layers 1, 5 and 9: what is left of them has to be evenly spaced to the end."""
    places = [position for position, layer in enumerate(plan.kept) if layer % 4 == 1]
    rules = [range(offset, len(plan.kept), period) for period in range(1, 12) for offset in range(period)]
    return places in [list(rule) for rule in rules]


def test_plans_that_no_period_says_are_left_out(jamba: Path) -> None:
    session = ModelSession(jamba, Compute())
    texts = ("6:9", "2:4 6:8", "1:5", "2:3 7:9", "4:8")
    plans = [PruningPlan.parse(N_LAYERS, text) for text in texts]
    expected = [plan for plan in plans if _keeps_a_period(plan)]
    assert writable(session, plans) == expected
    assert 0 < len(expected) < len(plans)
    assert "attn_layer_period=4" in why_not_writable(session, plans[0])


@pytest.mark.parametrize("search", ["race", "exhaustive"])
def test_a_search_measures_whole_plans_that_can_be_written(jamba: Path, search: str, tmp_path: Path) -> None:
    ids = save_windows(tmp_path)
    found = select(4, model=jamba, held_out=HELD, search=search, operator="ghost", **on_windows(ids))
    assert _keeps_a_period(found.plan)
    whole = [
        PruningPlan.parse(N_LAYERS, " ".join(f"{start}:{stop}" for start, stop in row["spans"]))
        for row in found.candidates
        if sum(stop - start for start, stop in row["spans"]) == 4
    ]
    assert len(whole) > 1
    assert all(_keeps_a_period(plan) for plan in whole)
