"""How the sequences of a text are divided: some to fit on, some to measure on. torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ghoststream.errors import RequestError
from ghoststream.statistics.ranges import Ranges, SequenceRange

_PARTS = 4
"""By default one sequence of so many is measured on."""


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
    wanted = n_sequences // _PARTS if held_out is None else held_out
    size = micro_batch or min(at_once(), max(1, wanted))
    n_fit = (n_sequences - wanted) // size * size
    if wanted < 1 or n_fit < 1:
        raise _cannot_be_parted(n_sequences, held_out, wanted, size)
    return size, n_fit


def _cannot_be_parted(n_sequences: int, held_out: int | None, wanted: int, size: int) -> RequestError:
    counted = f"{n_sequences} sequence{'' if n_sequences == 1 else 's'}"
    if wanted < 1:
        msg = (
            f"{counted} cannot be parted into some to fit and a quarter to measure on; give at least "
            f"{_PARTS} --sequences"
        )
        return RequestError(msg)
    # Where nothing is left to fit, no micro-batch is small enough.
    in_batches = size > 1 and n_sequences > wanted
    ways = [
        *(["a smaller --held-out"] if held_out is not None and min(n_sequences, wanted) > 1 else []),
        *(["a smaller --micro-batch"] if in_batches else []),
        "more --sequences",
    ]
    msg = (
        f"{counted}{f' in micro-batches of {size}' if in_batches else ''} cannot be parted into some to fit "
        f"and {wanted} to measure on; give {', or '.join(ways)}"
    )
    return RequestError(msg)


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
