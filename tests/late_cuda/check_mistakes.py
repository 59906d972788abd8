"""The device finds mistakes: the package with one of its waits or copies taken out fails on it, each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ghoststream.errors import NumericsError
from ghoststream.streaming import copies, executor, finite, flow, slots
from tests.late_cuda.device import LateCuda
from tests.late_cuda.passes import batches_of, run, run_kept
from tests.stages.test_stages_cuda import overflowing

Mistake = Callable[[pytest.MonkeyPatch], None]
CudaCopies = copies.CudaCopies


def no_record_stream(patch: pytest.MonkeyPatch) -> None:
    """Memory that a thread took on its stream is used again while the computation still reads it."""
    patch.setattr(CudaCopies, "hand_over", lambda _, tensor: tensor)


def no_hand_over_of_fetched_states(patch: pytest.MonkeyPatch) -> None:
    """The same, at one of the places that fetch."""

    def fetch(self: Any, batch: Any) -> Any:
        return self._reader.run(lambda: self._source.get(batch).to(self._device))

    patch.setattr(flow.StatesFlow, "_fetch", fetch)


def no_wait_for_the_mark(patch: pytest.MonkeyPatch) -> None:
    """A copy does not wait for the computation whose result it brings away."""
    real = CudaCopies.beside
    patch.setattr(CudaCopies, "beside", lambda self, _=None: real(self))


def no_wait_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """A thread says that its copies are there when they were only launched."""

    @contextmanager
    def beside(self: Any, mark: Any = None) -> Iterator[None]:
        if mark is not None:
            self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            yield

    patch.setattr(CudaCopies, "beside", beside)


def used_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A layer's weights are overwritten while the layer computes."""
    patch.setattr(slots.DeviceSlots, "used", lambda *_: None)


def states_put_away_too_early(patch: pytest.MonkeyPatch) -> None:
    """States are put away without a mark behind the layer that gives them."""

    def put(self: Any, batch: Any, given: torch.Tensor) -> None:
        self._pending.append(self._writer.run(self._target.put, batch, given))

    patch.setattr(flow.StatesFlow, "put", put)


ON_HOST: dict[str, Any] = {"device_bytes": 0}
BEHIND: dict[str, Any] = {"behind": True}
MISTAKES: tuple[tuple[Mistake, dict[str, Any]], ...] = (
    (no_record_stream, ON_HOST),
    (no_hand_over_of_fetched_states, ON_HOST),
    (no_wait_for_the_mark, ON_HOST),
    (no_wait_for_the_mark, BEHIND),
    (no_wait_at_the_end, ON_HOST),
    (no_wait_at_the_end, BEHIND),
    (used_is_forgotten, {}),
    (states_put_away_too_early, ON_HOST),
)


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at what is finite waits for the computation once a position, which would hide other waits."""
    monkeypatch.setattr(finite.FiniteFlags, "look", lambda _: None)


@pytest.mark.usefixtures("no_looks")
@pytest.mark.parametrize(("mistake", "places"), MISTAKES)
def test_a_mistake_is_found(
    mistake: Mistake,
    places: dict[str, Any],
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    late_cuda: LateCuda,
) -> None:
    mistake(monkeypatch)
    try:
        run_kept(tiny_llama, batches_of(2), **places)
        found = bool(late_cuda.memory.violations)
    except (AssertionError, NumericsError):
        found = True
    late_cuda.reset("eager")  # what was found does not fail this test
    assert found, mistake.__doc__


@pytest.mark.usefixtures("no_looks")
@pytest.mark.parametrize("places", [{}, ON_HOST, BEHIND])
def test_without_a_mistake_nothing_is_found(places: dict[str, Any], tiny_llama: Path) -> None:
    run_kept(tiny_llama, batches_of(2), **places)


def test_flags_that_are_read_before_the_kernel_ran_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_cuda: LateCuda
) -> None:
    model = overflowing(tmp_path / "model")
    with pytest.raises(NumericsError, match="at position 4"):
        run(model, batches_of(2))
    with monkeypatch.context() as without:
        # States between layers are never looked at: found behind the final norm, where the head looks.
        without.setattr(executor, "FiniteFlags", _NeverLooking)
        with pytest.raises(NumericsError, match="behind the final norm"):
            run(model, batches_of(2))
    monkeypatch.setattr(finite, "finite_flag", _flag_of_now)
    late_cuda.reset("late")
    with pytest.raises(NumericsError, match=r"at position [0-3]"):  # NaN is what no kernel has written yet
        run(model, batches_of(2))


class _NeverLooking(finite.FiniteFlags):
    def look(self) -> None:
        return None


def _flag_of_now(values: torch.Tensor) -> torch.Tensor:
    held = getattr(values, "elem", values)
    return torch.tensor(bool(held.isfinite().all())).to(values.device)


def test_copies_under_way_end_before_an_error_leaves(late_cuda: LateCuda) -> None:
    device = torch.device("cuda", 0)
    source = torch.arange(4.0).pin_memory()
    target = torch.empty(4, device=device)
    work = copies.copies_for(device, "weights")

    def broken() -> None:
        with work.beside():
            target.copy_(source, non_blocking=True)
            raise RuntimeError("broken shard")

    with pytest.raises(RuntimeError, match="broken shard"):
        broken()
    source.fill_(-1.0)  # the memory is somebody else's now
    late_cuda.queues.drain_all()
    assert target.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_streams_are_made_once(late_cuda: LateCuda, tiny_llama: Path) -> None:
    run(tiny_llama, batches_of(2), device_bytes=0)
    before = len(late_cuda.queues.streams)
    run(tiny_llama, batches_of(2), device_bytes=0)
    assert len(late_cuda.queues.streams) == before <= 4
