"""Which ways to repair there is memory for: `auto` leaves out those whose fit is too large. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ghoststream.checkpoint.sizes import ModelSizes
from ghoststream.costs import FitShape
from ghoststream.files import format_bytes
from ghoststream.operators import OperatorKind, make_operator
from ghoststream.spans import Span
from ghoststream.stages.choosing.ways import Ways
from ghoststream.statistics import Ranges, TapSource, get_feature, taps_of
from ghoststream.statistics.moments import PANEL
from ghoststream.statistics.streamed import most_of_fold, most_states


@dataclass(frozen=True, slots=True)
class FitBytes:
    """Memory that fitting one boundary in a pass takes.

    Attributes:
        host: Of the host, if it is fitted there.
        device: Of the accelerator, if it is fitted there: of summing a fold, or of solving, if that is there
            too and is more; 0 where it cannot be.
        beside: Of the host, if it is fitted on the accelerator.
        formula: How ``host`` adds up.
        state: Of one sum.
        tasks: Ranges that are summed at a time on the host.
        device_formula: How ``device`` adds up.
    """

    host: int
    device: int
    beside: int
    formula: str = ""
    state: int = 0
    tasks: int = 1
    device_formula: str = ""

    @classmethod
    def of(
        cls,
        kind: OperatorKind,
        ranges: Ranges,
        *,
        hidden: int,
        length: int,
        tap_width: int = 0,
        room: Room | None = None,
        processors: int = 1,
    ) -> FitBytes:
        """Say what an operator takes.

        On the host the sums of all folds stay while the ridge is chosen, which the cost of an operator has
        one of; and while states come by, each fold holds some sums that wait for their neighbours.

        Args:
            kind: The operator.
            ranges: How the sequences that serve to fit are divided.
            hidden: Hidden size C.
            length: Tokens of a sequence.
            tap_width: Width of the taps that its features read, 0 for features of the hidden state.
            room: What a pass leaves to it: as many ranges are summed at a time as that holds; one if None.
            processors: Processors that serve.
        """
        taps = TapSource("", tap_width) if tap_width else None
        width = get_feature(kind.features).width(tap_width or hidden)
        solution = kind.cost(FitShape(hidden, width, 0)).memory
        solving = solution.n_bytes
        reducer = kind.reducer((Span(1, 2),), hidden=hidden, taps=taps)
        state, task = reducer.state_bytes(hidden, length), reducer.task_bytes(hidden, length)
        kept, n_states = ranges.n_folds * state, most_states(ranges)
        at_once = 1 if room is None else room.tasks(processors, task, n_states * state)
        summing = n_states * state + at_once * task
        if summing > kept - state + solving:
            host, formula = summing, f"{at_once} tasks of {task:,} and {n_states} sums of {state:,}"
        else:
            host, formula = kept - state + solving, f"{solution.formula} to fit"
            formula = f"{ranges.n_folds - 1} sums of {state:,} + {formula}" if kept > state else formula
        if kind.sums_on("cuda") is None:
            return cls(host, 0, 0, formula, state, at_once)
        n_states = most_of_fold(ranges)
        device = reducer.device_bytes(hidden, length) + (n_states - 1) * state
        there = f"{n_states} sums of {state:,}, products and blocks to fit"
        if not kind.solves_on_device:
            return cls(host, device, kept - state + solving, formula, state, at_once, there)
        n_bytes = _solving_bytes(kind, width, hidden, state)
        if n_bytes > device:
            device, there = n_bytes, f"3 sums of {state:,}, an operator and a factor to fit"
        return cls(host, device, kept, formula, state, at_once, there)


def _solving_bytes(kind: OperatorKind, width: int, hidden: int, state: int) -> int:
    """Return what solving takes on a device.

    Where a fold is left out there are the total, the fold, the total without it, the operator on all tokens
    (and for a rank the cross-moment once more), and a factor or, after it, panels of the residual.
    """
    matrices = 1 if kind.method.rank is None else 2
    return 3 * state + 8 * width * (matrices * hidden + max(width, 3 * min(PANEL, hidden)))


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that a pass leaves to a fit beside layers, work and what waits on its way.

    Attributes:
        host: Of the host; None for no limit.
        device: Of the accelerator; None for no limit, 0 where there is none.
        is_given: Whether all of it follows from what the request says, and not from what is free now.
        taken: What the pass itself takes of the host.
    """

    host: int | None
    device: int | None = 0
    is_given: bool = False
    taken: int = 0

    def holds(self, fit: FitBytes) -> bool:
        """Whether a fit has room, on the accelerator or on the host."""
        on_device = fit.device > 0 and (self.device is None or fit.device <= self.device)
        needed = fit.beside if on_device else fit.host
        return self.host is None or needed <= self.host

    def tasks(self, processors: int, task: int, beside: int) -> int:
        """Return how many ranges are summed at a time on the host; the number changes no bit.

        That is one a processor, within half of the memory of a pass, as states take the rest of it.

        Args:
            processors: Processors that serve.
            task: Bytes that one range takes.
            beside: Bytes of the sums that wait for them.
        """
        if self.host is None:
            return processors
        room = min((self.host + self.taken) // 2, self.host - beside)
        return max(1, min(processors, room // max(1, task)))


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A way to repair that is not tried, as its fit cannot be held.

    Attributes:
        features: Its features.
        host_bytes: Memory of the host that its fit takes.
        room: What is there for it.
        enough: Memory of the host, the pass included, with which it is tried.
    """

    features: str
    host_bytes: int
    room: int
    enough: int

    def __str__(self) -> str:
        """The same in words."""
        return (
            f"{self.features} is left out: its fit takes {format_bytes(self.host_bytes)} of memory, "
            f"{format_bytes(max(0, self.room))} are there beside the layers; it is tried with "
            f"--host-memory {-(-self.enough // 10**6)}MB"
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)


def left_out(fits: Mapping[str, FitBytes], room: Room) -> tuple[LeftOut, ...]:
    """Return what cannot be held, the largest first.

    Args:
        fits: What the fits take, by their features.
        room: What is there.
    """
    found = [
        LeftOut(features, fit.host, room.host or 0, room.taken + fit.host)
        for features, fit in fits.items()
        if not room.holds(fit)
    ]
    return tuple(sorted(found, key=lambda one: -one.host_bytes))


def fits_of(
    sizes: ModelSizes, ranges: Ranges, ways: Ways, *, length: int, races: bool = False
) -> dict[str, FitBytes]:
    """Return what fits take, by their features, of those that may be left out and that a model allows.

    These read taps of a layer. What spans are compared with is never left out.

    Args:
        sizes: The model.
        ranges: How the sequences that serve to fit are divided; see :func:`largest_ranges`.
        ways: What ``auto`` tries.
        length: Tokens of a sequence.
        races: Whether plans race, which compares fewer ways to repair.
    """
    if all(end.refusal for end in sizes.mlp_ends):
        return {}
    return {
        one.features: FitBytes.of(
            make_operator(one),
            ranges,
            hidden=sizes.hidden,
            length=length,
            tap_width=sizes.tap_width(taps_of(one.features)),
        )
        for one in ways.compared(races=races)
        if taps_of(one.features) and one.features != ways.screen.features
    }


def largest_ranges(n_sequences: int, n_fit: int, *, folds: int, turn: int = 1) -> Ranges:
    """Return the division whose sums take more: of all sequences, as in the last fit, or of some.

    Args:
        n_sequences: Sequences of the text.
        n_fit: How many of them serve to fit while others are measured on.
        folds: Folds that are asked for.
        turn: Number of texts, which take turns.
    """
    divided = (Ranges.make(count, folds=folds, turn=turn) for count in (n_sequences, n_fit))
    return max(divided, key=most_states)


def settled(
    fits: Mapping[str, FitBytes], room: Room, begun: Callable[[tuple[str, ...]], bool]
) -> tuple[str, ...]:
    """Return the features that are left out: as an earlier attempt at the same result has decided, or now.

    What is free changes from run to run. Where the request says how much there is, that decides alone.

    Args:
        fits: What the fits take, by their features.
        room: What is there.
        begun: Says whether a result without some features is there, finished or not.
    """
    now = tuple(one.features for one in left_out(fits, room))
    if room.is_given:
        return now
    largest_first = sorted(fits, key=lambda features: -fits[features].host)
    earlier = (tuple(largest_first[:count]) for count in range(len(largest_first) + 1))
    return next((names for names in (now, *earlier) if begun(names)), now)
