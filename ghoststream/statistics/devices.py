"""The accelerator that products of moments may be computed on: whether there is one, and what fits it.

torch is imported where it is asked: what runs on the host must not wait for it.
"""

from __future__ import annotations

from ghoststream.errors import RequestError
from ghoststream.machine import free_device_memory, may_have_accelerator

_SHARE = 0.9


def device_kind(name: str) -> str:
    """Return the kind of a torch device, ``cuda`` of ``cuda:1``: what decides the bits of its products.

    Raises:
        RequestError: If torch knows no such device.
    """
    import torch

    try:
        return torch.device(name).type
    except RuntimeError as error:
        msg = f"torch knows no device {name!r}; give cuda, cuda:1 or cpu"
        raise RequestError(msg) from error


def sums_device(name: str, *, elsewhere: bool = False) -> str | None:
    """Return the torch device that a store is reduced on; None is the host, by numpy.

    Args:
        name: As given: ``auto`` is CUDA where this process has it.
        elsewhere: Whether workers of a cluster reduce: ``auto`` then is their host, as what they have is not
            known here.
    """
    if name.partition(":")[0] == "cpu":
        return None
    if name != "auto":
        return name
    if elsewhere or not may_have_accelerator():
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def require_device(name: str) -> None:
    """Check that this process has a device.

    Raises:
        RequestError: If it has not.
    """
    if name.partition(":")[0] == "cuda" and not may_have_accelerator():
        raise RequestError(_not_here(name))
    import torch

    kind = device_kind(name)
    if kind == "cpu":
        return
    n_devices = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    if (torch.device(name).index or 0) >= n_devices:
        raise RequestError(_not_here(name))


def device_tasks(name: str, n_bytes: int) -> int | None:
    """Return how many tasks of ``n_bytes`` fit a device at a time, at least 1.

    None where memory is the host's.

    Raises:
        RequestError: If this process does not have the device.
    """
    import torch

    require_device(name)
    device = torch.device(name)
    free = free_device_memory(device)
    if free is None:
        return None
    return max(1, int(_SHARE * free) // max(1, n_bytes))


def _not_here(name: str) -> str:
    return (
        f"the device {name} was asked for, and torch sees none of that name in this process; leave it "
        "out, or start the workers where there is one"
    )
