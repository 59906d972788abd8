"""What every reducer is: a statistic of some hidden states, summed over sequences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.statistics.source import HiddenStateSource
from ghoststream.statistics.sums import SumState


class Reducer:
    """A statistic that is a sum over sequences; instances are small and can be sent to another process.

    A subclass has ``layers`` (a field or a property), :meth:`describe`, :meth:`task_bytes` and
    :meth:`reduce`. States are added, unless :meth:`merge` is overridden.

    Attributes:
        layers: Hidden states that are read.
        device: The accelerator that it computes on; None for the host.
    """

    if TYPE_CHECKING:
        # A property here would be the default of a dataclass field of this name.
        @property
        def layers(self) -> tuple[int, ...]:
            """Hidden states that are read."""

    device: str | None = None

    @property
    def adds(self) -> bool:
        """Whether states are merged by addition, which needs no whole state more in memory."""
        return type(self).merge is Reducer.merge

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        raise NotImplementedError

    def task_bytes(self, hidden: int, length: int) -> int:
        """Return the peak bytes of one task for this hidden size and ``length`` positions a sequence."""
        raise NotImplementedError

    def most_tasks(self, hidden: int, length: int) -> int | None:
        """Return how many tasks the device has memory for at a time; None for any number."""
        del hidden, length
        return None

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Return the state of sequences ``[start, stop)``; always the same bits for the same range.

        Raises:
            NumericsError: If a hidden state is not finite.
            StoreError: If one cannot be read.

        Memory: :meth:`task_bytes`.
        """
        raise NotImplementedError

    def merge(self, left: SumState, right: SumState) -> SumState:
        """Return the state over the sequences of both; neither is changed.

        Raises:
            ArtifactError: If the two do not hold the same names and shapes.
        """
        return left.copy().add_in_place(right)

    def merge_file(self, state: SumState, path: Path, *, is_left: bool) -> SumState:
        """Return the state merged with one that was saved; ``state`` may be changed.

        Args:
            state: One of the two.
            path: File of the other one.
            is_left: Whether the other one is the left one.

        Raises:
            ArtifactError: If the two do not hold the same names and shapes, or the file is broken.
        """
        if self.adds:
            return state.add_file(path)
        other = SumState.load(path)
        return self.merge(other, state) if is_left else self.merge(state, other)
