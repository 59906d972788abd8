"""Peak anonymous memory of a piece of work: what the kernel cannot drop, mapped file pages left out."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes() -> int:
    """Return this process's resident anonymous memory (Linux only)."""
    _, resident, shared, *_ = _STATM.read_text().split()
    return (int(resident) - int(shared)) * _PAGE_BYTES


class PeakAnonymous:
    """Samples anonymous memory from a thread while the context is open.

    ``baseline_bytes`` is what was there on entry, ``peak_bytes`` the highest sample. Allocations that live
    shorter than the interval can be missed; buffers that are read or computed on do not.

    Args:
        interval_seconds: Time between two samples.
    """

    def __init__(self, interval_seconds: float = 0.002) -> None:
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.baseline_bytes = 0
        self.peak_bytes = 0

    @property
    def above_baseline_bytes(self) -> int:
        """The peak less what was there before."""
        return self.peak_bytes - self.baseline_bytes

    def __enter__(self) -> Self:
        self.baseline_bytes = self.peak_bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
