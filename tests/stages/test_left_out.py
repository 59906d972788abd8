"""Ways to repair that ``auto`` leaves out as their fit cannot be held: in a search, and in its estimate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.errors import BudgetError, OutputExistsError
from ghoststream.operators import make_operator
from ghoststream.options import Compute, Method, Recovery, Search, Text
from ghoststream.progress import SilentProgress
from ghoststream.selection import Selection
from ghoststream.spans import Span
from ghoststream.stages import session as sessions
from ghoststream.stages.choosing.moments import Boundary, FitPlace
from ghoststream.stages.choosing.room import FitBytes, LeftOut, Room, left_out, settled
from ghoststream.stages.choosing.trial import Trial
from ghoststream.stages.choosing.ways import LIKELY
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.estimation.machine import Machine
from ghoststream.stages.estimation.report import Estimate
from ghoststream.statistics import ModelFacts, Ranges, get_feature, taps_of
from ghoststream.statistics.streamed import StreamedTaps, folded, most_states, streamed_sums
from ghoststream.streaming.allocator import return_free_memory
from ghoststream.testing.memory import PeakAnonymous
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import fit, select
from tests.helpers.searching import HELD, MICRO_BATCH, S, T, on_windows, save_windows

pytestmark = pytest.mark.integration
BOTH = "hidden+mlp"


class Told(SilentProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    @property
    def about(self) -> list[str]:
        return [line for line in self.lines if "is left out" in line]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("left") / "model")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_windows(tmp_path_factory.mktemp("ids"))


def _select(model: Path, ids: Path, told: Told, **options: Any) -> Selection:
    return select(2, model=model, held_out=HELD, max_spans=1, progress=told, **on_windows(ids), **options)


def _price(
    model: Path, remove: int | str = 2, *, machine: Machine | str = "this", **compute: Any
) -> Estimate:
    recovery = Recovery(
        model=str(model),
        remove=remove,
        calibration=Text(spec="ids:none.npy", sequences=S, length=T),
        search=Search(held_out=HELD, max_spans=1) if remove == 2 else Search(held_out=HELD),
        compute=Compute(device="auto", micro_batch=MICRO_BATCH, **compute),
    )
    return estimate(recovery, machine=machine, measure=False)


def _tried(found: Selection) -> set[str]:
    return {
        features for row in found.candidates for label in row["repair"] for features in [label.split(", ")[1]]
    }


@pytest.fixture(scope="module")
def enough(model: Path) -> dict[str, LeftOut]:
    """What is left out with next to no memory, and how much would let each in."""
    return {one.features: one for one in _price(model, "1:3", host_memory=200_000).left_out}


def test_the_estimate_says_how_much_memory_lets_a_way_in(model: Path, enough: dict[str, LeftOut]) -> None:
    assert list(enough) == [BOTH, "mlp"]
    least = enough[BOTH].enough
    assert _price(model, host_memory=least).left_out == ()
    (found,) = _price(model, host_memory=least - 1).left_out
    assert (found.features, found.room, found.host_bytes) == (
        BOTH,
        found.host_bytes - 1,
        enough[BOTH].host_bytes,
    )
    assert str(found).startswith(f"{BOTH} is left out: its fit takes ")
    assert str(found).endswith(f"it is tried with --host-memory {-(-least // 10**6)}MB")
    assert [one.features for one in _price(model, host_memory=200_000).left_out] == [BOTH], "a race"
    plan = _price(model, host_memory=least - 1)
    assert plan.to_json()["left_out"][0]["enough"] == least
    # What is fitted without it is the largest of what is left, and has room.
    assert f"p = {32 + 64}" not in plan.needs["memory, search"].formula
    assert plan.problems == ()


def test_a_search_leaves_out_what_the_estimate_says(
    model: Path, ids: Path, enough: dict[str, LeftOut], tmp_path: Path
) -> None:
    least, told = enough[BOTH].enough, Told()
    without = _select(model, ids, told, host_memory=least - 1, out=tmp_path / "plan.json")
    assert told.about == [str(_price(model, host_memory=least - 1).left_out[0])]
    assert without.recipe["left_out"] == [BOTH]
    assert BOTH not in {one["features"] for one in without.recipe["methods"]}
    assert BOTH not in _tried(without)
    told = Told()
    whole = _select(model, ids, told, host_memory=least)
    assert told.about == []
    assert "left_out" not in whole.recipe
    assert BOTH in _tried(whole)
    first, same = (
        [(row["spans"], row["repair"], row["loss"]) for row in found.candidates if row["round"] == 1]
        for found in (whole, without)
    )
    assert first == same
    # With the memory given, it decides alone: what is there is of another request.
    with pytest.raises(OutputExistsError, match="is not the result of this request"):
        _select(model, ids, Told(), host_memory=least, out=tmp_path / "plan.json")


def test_a_run_that_is_resumed_decides_as_it_did_at_first(
    model: Path, ids: Path, enough: dict[str, LeftOut], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(n_bytes: int) -> None:
        monkeypatch.setattr(sessions, "free_host_memory", lambda: n_bytes * 10 // 9 + 1)

    def one_pass(self: Trial, repairs: Any, sample: Any) -> None:
        whole(self, repairs, sample)
        raise KeyboardInterrupt

    out, whole = tmp_path / "plan.json", Trial._pass
    free(enough[BOTH].enough - 10)
    with monkeypatch.context() as patched:
        patched.setattr(Trial, "_pass", one_pass)
        with pytest.raises(KeyboardInterrupt):
            _select(model, ids, Told(), out=out)
    free(10**10)
    told = Told()
    resumed = _select(model, ids, told, out=out)
    assert told.about == [f"{BOTH} is left out, as when this was begun"]
    assert resumed.recipe["left_out"] == [BOTH]
    assert _select(model, ids, Told(), out=out) == resumed
    # The other way round too: with less memory than at first.
    full = _select(model, ids, Told(), out=tmp_path / "full.json")
    free(enough[BOTH].enough - 10)
    assert _select(model, ids, Told(), out=tmp_path / "full.json") == full
    assert "left_out" not in full.recipe


def test_a_fit_of_a_plan_leaves_it_out_too(
    model: Path, ids: Path, enough: dict[str, LeftOut], tmp_path: Path
) -> None:
    told, out = Told(), tmp_path / "operators.safetensors"
    request: dict[str, Any] = {"model": model, "out": out, "host_memory": enough[BOTH].enough - 1}
    operators = fit("1:3", progress=told, held_out=HELD, **request, **on_windows(ids))
    assert len(told.about) == 1
    assert operators.metadata["recipe"]["left_out"] == [BOTH]
    tried = {row["repair"][0].split(", ")[1] for row in operators.metadata["chosen"]}
    assert tried == {"hidden", "normed", "mlp"}


def test_a_pass_that_has_no_room_for_layers_is_still_refused(model: Path, ids: Path) -> None:
    with pytest.raises(BudgetError, match="two layers"):
        _select(model, ids, Told(), host_memory=1000)


def test_an_accelerator_that_holds_a_fit_lets_it_in(model: Path) -> None:
    def machine(device: int, host: int) -> Machine:
        return Machine(name="there", device_memory=device, host_memory=host, processors=2)

    large, small = 10**9, 70 * 10**6
    assert _price(model, machine=machine(large, 10**9)).left_out == ()
    assert _price(model, machine=machine(large, 10**6)).left_out == (), "the host holds the sums of the folds"
    assert len(_price(model, machine=machine(small, 10**6)).left_out) == 1
    assert _price(model, machine=machine(small, 10**9)).left_out == (), "it is fitted on the host"
    beside = _price(model, machine=machine(large, 10**9)).needs["memory, fit"]
    assert beside.formula.endswith("the sums of the folds")


@pytest.mark.parametrize(
    ("room", "names"),
    [
        (Room(99), ("large", "small")),
        (Room(100), ("large",)),
        (Room(200), ()),
        (Room(None), ()),
        (Room(50, 10), ("large",)),
        (Room(50, 20), ()),
        (Room(4, 20), ("large", "small")),
        (Room(5, 20), ("large",)),
        (Room(8, None), ()),
    ],
)
def test_what_has_no_room_is_left_out_largest_first(room: Room, names: tuple[str, ...]) -> None:
    fits = {"small": FitBytes(100, 10, 5), "large": FitBytes(200, 20, 8)}
    assert tuple(one.features for one in left_out(fits, room)) == names


def test_an_earlier_decision_counts_unless_the_memory_is_given() -> None:
    fits = {"small": FitBytes(100, 0, 0), "large": FitBytes(200, 0, 0)}

    def decided(room: Room, *there: tuple[str, ...]) -> tuple[str, ...]:
        return settled(fits, room, lambda names: names in there)

    assert decided(Room(150)) == ("large",)
    assert decided(Room(150), ()) == ()
    assert decided(Room(150), ("large", "small")) == ("large", "small")
    assert decided(Room(150), (), ("large",)) == ("large",), "what is decided now comes first"
    assert decided(Room(150, is_given=True), ()) == ("large",)


@pytest.mark.parametrize(("n_sequences", "folds"), [(1, 4), (14, 4), (32, 4), (31, 4), (10, 0), (100, 3)])
def test_states_that_wait_are_those_of_the_tree(n_sequences: int, folds: int) -> None:
    ranges = Ranges.make(n_sequences, folds=folds)
    stacks: list[list[int]] = [[] for _ in range(ranges.n_folds)]
    most = 0
    for one in ranges.ranges():
        level, stack = 0, stacks[one.fold]
        while stack and stack[-1] == level:
            level += stack.pop() - level + 1
        stack.append(level)
        most = max(most, sum(map(len, stacks)))
    assert most_states(ranges) == most


def test_a_fit_takes_what_is_said() -> None:
    hidden, width, n_sequences, length = 64, 960, 32, 64
    kind, taps = make_operator(LIKELY), StreamedTaps(hidden + width, with_states=True)
    reducer, ranges = kind.reducer((Span(1, 2),), hidden=hidden, taps=taps), Ranges.make(n_sequences, folds=4)
    random = np.random.default_rng(0)

    def pairs() -> Iterator[tuple[Any, Any]]:
        for _ in range(n_sequences):
            inputs = random.standard_normal((1, length, hidden + width), dtype=np.float32)
            yield (
                inputs,
                inputs[:, :, :hidden] + random.standard_normal((1, length, hidden), dtype=np.float32),
            )

    def fit_once() -> None:
        mask = np.ones((n_sequences, length), dtype=bool)
        facts = ModelFacts(None)
        about: Any = {"mask": mask, "facts": facts, "n_layers": 3, "taps": taps, "workers": 1}
        sums = streamed_sums(reducer, ranges.ranges(), pairs(), **about)
        kind.solve(folded(reducer, sums, ranges.n_folds, facts))

    fit_once()
    return_free_memory()
    with PeakAnonymous() as peak:
        fit_once()
    said = FitBytes.of(kind, ranges, hidden=hidden, length=length, tap_width=hidden + width)
    state = reducer.state_bytes(hidden, length)
    assert 7 * state < peak.above_baseline_bytes < 1.05 * said.host
    # Blocks of 2,048 tokens are counted; what is summed here is shorter.
    assert said.host - peak.above_baseline_bytes < reducer.task_bytes(hidden, length)


@pytest.mark.parametrize(("n_sequences", "folds"), [(32, 4), (57, 3), (10, 0)])
@pytest.mark.parametrize(
    "method",
    [
        Method(operator="ghost"),
        LIKELY,
        LIKELY.model_copy(update={"rank": 8}),
        LIKELY.model_copy(update={"ridge": "gcv"}),
    ],
)
def test_a_pass_reserves_what_is_believed(method: Method, n_sequences: int, folds: int) -> None:
    hidden, length = 64, 32
    ranges, kind = Ranges.make(n_sequences, folds=folds), make_operator(method)
    taps = StreamedTaps(320) if taps_of(method.features) else None
    session: Any = SimpleNamespace(device=torch.device("cuda"), skeleton=SimpleNamespace(hidden_size=hidden))
    mask = np.ones((n_sequences, length), dtype=bool)
    boundary = Boundary(kind, Span(1, 2), ranges, mask, session, taps, FitPlace("cuda", 10**9))
    said = FitBytes.of(kind, ranges, hidden=hidden, length=length, tap_width=320 if taps else 0)
    assert boundary.device_bytes == said.device > 0
    assert boundary.host_bytes == said.beside
    width = get_feature(method.features).width(320 if taps else hidden)
    state = 8 * (width**2 + width * hidden)
    assert said.device > (4 if kind.solves_on_device else 1) * state
    session.device = torch.device("cpu")
    assert boundary.device_bytes == 0
