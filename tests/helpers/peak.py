"""How much memory a piece of code takes at most, as Python and numpy allocate it."""

from __future__ import annotations

import tracemalloc
from typing import Self


class Peak:
    """Peak of traced memory inside a ``with`` block, in bytes above what was there before."""

    bytes: int

    def __enter__(self) -> Self:
        tracemalloc.start()
        self._before = tracemalloc.get_traced_memory()[0]
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = tracemalloc.get_traced_memory()[1] - self._before
        tracemalloc.stop()
