"""What observers of a dense pass keep lies among its states: it spills, changes no bit, and is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghoststream.costs import SearchShape
from ghoststream.errors import BudgetError
from ghoststream.options import Compute
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import HiddenStates, StatesFactory
from ghoststream.text import TokenSet
from tests.helpers.searching import MICRO_BATCH, L, S, T, open_model, save_windows
from tests.helpers.watching import PLACES, Watched, counted

pytestmark = pytest.mark.integration
PLACE = S * T * 32 * 4
"""Bytes of the states of all windows at one position."""


@pytest.fixture
def tokens(tiny_llama: Path, tmp_path: Path) -> TokenSet:
    return open_model(tiny_llama, save_windows(tmp_path))[1]


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> list[StatesFactory]:
    """The factories that made places, in order."""
    found: list[StatesFactory] = []
    make = StatesFactory.make

    def made(self: StatesFactory, *args: object, **options: object) -> HiddenStates:
        place = make(self, *args, **options)  # type: ignore[arg-type]
        if not self._is_rehearsal and self not in found:
            found.append(self)
        return place

    monkeypatch.setattr(StatesFactory, "make", made)
    return found


def _limited(model: Path, places: int) -> ModelSession:
    """Return the model with memory for layers, work, and so many places of states."""
    needed, _ = ModelSession(model).memory(T, micro_batch=MICRO_BATCH).taken()
    return ModelSession(model, Compute(micro_batch=MICRO_BATCH, host_memory=needed + places * PLACE))


@pytest.mark.parametrize("watched", PLACES)
def test_kept_states_go_to_scratch_and_change_no_bit(
    watched: Watched, tiny_llama: Path, tokens: TokenSet, factories: list[StatesFactory]
) -> None:
    everywhere = watched(ModelSession(tiny_llama), tokens, MICRO_BATCH)
    assert len(everywhere) >= 3
    for places in range(PLACES[watched] + 1):
        assert watched(_limited(tiny_llama, places), tokens, MICRO_BATCH) == everywhere
        assert factories[-1].most_scratch == (PLACES[watched] - places) * PLACE
    assert len(factories) == PLACES[watched] + 2
    assert not any(one.live_bytes for one in factories), "all was given back"


@pytest.mark.parametrize("watched", PLACES)
def test_a_pass_whose_kept_states_find_no_disk_is_refused_before_it_reads(
    watched: Watched, tiny_llama: Path, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = (PLACES[watched] - 1) * PLACE
    session = _limited(tiny_llama, 1)
    monkeypatch.setattr("ghoststream.files.space.free_disk", lambda _: needed - 1)
    with pytest.raises(BudgetError, match="hidden states between layers"):
        watched(session, tokens, MICRO_BATCH)
    assert session.skeleton.reader.bytes_read == 0
    monkeypatch.setattr("ghoststream.files.space.free_disk", lambda _: needed)
    watched(session, tokens, MICRO_BATCH)


@pytest.mark.parametrize("watched", PLACES)
def test_an_estimate_counts_what_is_kept(watched: Watched) -> None:
    shape = SearchShape(L, 3, hidden=32, intermediate=64, sequences=8, length=T)
    assert counted(watched, shape) == PLACES[watched] * 32
