"""Whether a request is shared by several devices or a cluster. torch is not imported."""

from __future__ import annotations

from typing import Any

from ghoststream.errors import RequestError
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


def on_first_device(compute: Compute) -> Compute:
    """Return how this process opens a model whose passes others run."""
    first, *others = devices_of(compute)
    return compute.model_copy(update={"device": first}) if others else compute
