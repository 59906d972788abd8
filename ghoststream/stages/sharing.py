"""Whether a request is shared by several devices or a cluster, and who takes what. torch is not imported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ghoststream.errors import RequestError
from ghoststream.machine import existing_place
from ghoststream.options import Compute


def devices_of(compute: Compute) -> tuple[str, ...]:
    """Return the devices that are named, mostly one."""
    return tuple(name.strip() for name in compute.device.split(","))


def is_shared(compute: Compute, scheduler: Any) -> bool:
    """Whether several devices are named, or a cluster is.

    Raises:
        RequestError: If both are.
    """
    several = len(devices_of(compute)) > 1
    if several and scheduler is not None:
        msg = (
            f"--device {compute.device} names several devices of this machine, and --scheduler a cluster, "
            "whose workers have devices of their own; leave one of the two out"
        )
        raise RequestError(msg)
    return several or scheduler is not None


def require_one_device(compute: Compute) -> None:
    """Check that one device is named, where a store is reduced.

    Raises:
        RequestError: If several are.
    """
    if len(devices_of(compute)) > 1:
        msg = (
            f"--device {compute.device} names several devices, and the statistics of a store are reduced on "
            "one, or by the workers of a --scheduler; name one"
        )
        raise RequestError(msg)


def scratch_beside(compute: Compute, result: str | Path | None, scheduler: Any = None) -> Compute:
    """Return how a model is run, with states that fit no memory in the folder of a result.

    A folder that is named stays. Workers of a cluster may not see that of the result.

    Args:
        compute: How it is run otherwise.
        result: The file or folder that is to be made, if one is.
        scheduler: That of a cluster which shares passes, if there is one.
    """
    if compute.scratch is not None or result is None or scheduler is not None:
        return compute
    return compute.model_copy(update={"scratch": existing_place(Path(result).absolute().parent)})


def on_first_device(compute: Compute) -> Compute:
    """Return how this process opens a model whose passes others run."""
    first, *others = devices_of(compute)
    return compute.model_copy(update={"device": first}) if others else compute


def rows_of(number: int, count: int, n_sequences: int, step: int) -> tuple[int, int]:
    """Return the sequences of worker ``number`` of ``1..count``, divided at multiples of ``step``.

    As evenly as these allow; the last workers have none where there are fewer multiples.

    Raises:
        RequestError: If there is no such worker.
    """
    if not 1 <= number <= count:
        msg = f"there is no worker {number} of {count}; workers are counted from 1 to their number"
        raise RequestError(msg)
    each, more = divmod(math.ceil(n_sequences / step), count)
    first = (number - 1) * each + min(number - 1, more)
    last = first + each + (number <= more)
    return min(first * step, n_sequences), min(last * step, n_sequences)


def dealt_rows(count: int, n_sequences: int, step: int) -> list[tuple[int, int]]:
    """Return the shares of all workers, as :func:`rows_of` has them, without those that are empty."""
    found = (rows_of(number, count, n_sequences, step) for number in range(1, count + 1))
    return [rows for rows in found if rows[0] < rows[1]]
