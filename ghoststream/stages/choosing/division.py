"""How the sequences of a text are divided: some to fit on, some to measure on. torch is not imported."""

from __future__ import annotations

from collections.abc import Callable

from ghoststream.errors import RequestError


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
        msg = (
            f"{n_sequences} sequences in micro-batches of {size} cannot be parted into some to "
            f"fit and {wanted} to measure on; give more sequences, or a smaller micro-batch"
        )
        raise RequestError(msg)
    return size, n_fit
