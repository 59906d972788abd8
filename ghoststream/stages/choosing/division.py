"""How the sequences of a text are divided: some to fit on, some to measure on. torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ghoststream.errors import RequestError
from ghoststream.statistics.ranges import Ranges, SequenceRange


def divided(
    n_sequences: int, held_out: int | None, micro_batch: int | None, at_once: Callable[[], int]
) -> tuple[int, int]:
    """Divide sequences into those to fit on, in whole micro-batches, and the rest, to measure on.

    Args:
        n_sequences: Sequences of the text.
        held_out: How many are to be measured on at least; a quarter if None.
        micro_batch: Sequences of a micro-batch, if that is given.
        at_once: Says how many memory allows, if it is not.

    Returns:
        Sequences of a micro-batch, and how many are fitted on.

    Raises:
        RequestError: If one of the two parts would be empty.
    """
    wanted = n_sequences // 4 if held_out is None else held_out
    size = micro_batch or min(at_once(), max(1, wanted))
    n_fit = (n_sequences - wanted) // size * size
    if wanted < 1 or n_fit < 1:
        of_batches = f" in micro-batches of {size}" if size > 1 else ""
        smaller = ", or a smaller micro-batch" if size > 1 else ""
        msg = (
            f"{n_sequences} sequences{of_batches} cannot be parted into some to fit and {wanted} to measure "
            f"on (--held-out, by default a quarter); give more --sequences{smaller}"
        )
        raise RequestError(msg)
    return size, n_fit


def require_each_text(across_texts: str, n_texts: int, n_held: int) -> None:
    """Check that every text can be measured on, where candidates are ranked by the worst one.

    Args:
        across_texts: How candidates are ranked: by the mean, or by the worst text.
        n_texts: Number of texts, whose sequences take turns.
        n_held: Sequences to measure on.

    Raises:
        RequestError: If there is one text, or not a sequence of each.
    """
    if across_texts == "mean":
        return
    if n_texts == 1:
        msg = (
            f"--across-texts {across_texts} would not be used: there is one text to calibrate on; name "
            "several, or leave it out"
        )
        raise RequestError(msg)
    if n_held < n_texts:
        msg = (
            f"--across-texts {across_texts} measures on each of {n_texts} texts, and {n_held} windows are "
            f"held out; hold out at least {n_texts}"
        )
        raise RequestError(msg)


def dealt_ranges(ranges: Ranges, rows: Iterable[tuple[int, int]]) -> list[tuple[SequenceRange, ...]]:
    """Return the ranges of each worker: those that begin among its sequences; no share is empty.

    Args:
        ranges: How the sequences are divided.
        rows: The sequences ``[start, stop)`` of each worker, whole micro-batches.
    """
    every = ranges.ranges()
    found = (tuple(one for one in every if start <= one.start < stop) for start, stop in rows)
    return [own for own in found if own]


def touched(own: tuple[SequenceRange, ...], n_sequences: int, micro_batch: int) -> int:
    """Return how many sequences the micro-batches have that hold some consecutive ranges."""
    first = own[0].start // micro_batch * micro_batch
    return min(n_sequences, -(-own[-1].stop // micro_batch) * micro_batch) - first
