"""Giving freed memory back: that of the host to the system, that of accelerators to other processes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch


def return_free_memory() -> None:
    """Return freed heap pages to the system where the C library can (glibc); elsewhere do nothing.

    glibc keeps freed blocks of up to 32 MiB, and the temporaries of a layer scatter them: without this,
    resident memory grows with the number of layers.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def return_device_memory() -> None:
    """Give back what torch keeps of accelerators for what comes next, and is not in use.

    To another process it is taken.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    return trim
