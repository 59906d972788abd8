"""What a pass shows, written into a store: a layer is forced to disk while the next one computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from ghoststream.activations import LayerWriter, WritableStore
from ghoststream.options import dtype_name
from ghoststream.statistics import BASE_TENSORS
from ghoststream.streaming import Batch


class StoreObserver:
    """Writes what a lane shows into the store, and a scratch copy of the newest layer where one is needed.

    A position that is finished is committed by a thread, and the one after it not before that is through: a
    kill costs at most the layer that is committed and the one that is computed. A context manager that waits
    for the last commit.

    Args:
        store: The store, open for writing.
        scratch_dtype: Compute dtype, if scratch copies are needed to continue from; else ``None``.
        last: The last position of the pass; nothing is continued from there.
        tensors: Gives the digests of the tensors that a pass reads between a position and the one before.
    """

    def __init__(
        self,
        store: WritableStore,
        scratch_dtype: torch.dtype | None,
        last: int,
        tensors: Callable[[int], Mapping[str, str]],
    ) -> None:
        self._store, self._tensors, self._noted = store, tensors, -1
        self._pending = set(store.layers) - set(store.completed_layers())
        self._scratch_dtype = scratch_dtype
        self._scratch_done = set(store.scratch_layers())
        self._last = last
        self._writers: list[LayerWriter] = []
        self._position: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ghoststream-commit")
        self._commit: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._settle()
        finally:
            self._thread.shutdown(wait=True)

    def wants(self, position: int) -> bool:
        """Whether a layer that the store lacks, or a scratch copy, is to be written at this position."""
        return position in self._pending or self._wants_scratch(position)

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        """Write the states of one batch."""
        if self._position != position:
            self._open(position)
        for writer in self._writers:
            writer.write(batch.start, states)

    def finished(self, position: int) -> None:
        """Let a thread commit what was written, and drop the scratch copies of the positions before.

        Raises:
            GhoststreamError: What the commit of the position before met.
        """
        self._settle()
        noted: dict[str, str] = {}
        if self._writers:
            for earlier in range(self._noted + 1, position + 1):
                noted |= self._tensors(earlier)
            self._noted = position
        writers, self._writers = self._writers, []
        self._commit = self._thread.submit(self._commit_all, position, writers, noted)

    def failed(self) -> None:
        """Remove what was written of a position that is not finished; one that is counts."""
        self._thread.shutdown(wait=True)
        for writer in self._writers:
            writer.abort()
        self._writers = []

    def _settle(self) -> None:
        commit, self._commit = self._commit, None
        if commit is not None:
            commit.result()

    def _commit_all(self, position: int, writers: Sequence[LayerWriter], noted: Mapping[str, str]) -> None:
        try:
            if noted:
                self._store.annotate_entries(BASE_TENSORS, noted)
            for writer in writers:
                writer.commit()
        finally:
            for writer in writers:
                writer.abort()  # those that are not committed
        for layer in self._store.scratch_layers():
            if layer < position:
                self._store.drop_scratch(layer)

    def _open(self, position: int) -> None:
        self._position = position
        if position in self._pending:
            self._writers.append(self._store.writer(position))
        if self._wants_scratch(position) and self._scratch_dtype is not None:
            self._writers.append(self._store.scratch_writer(position, dtype_name(self._scratch_dtype)))

    def _wants_scratch(self, position: int) -> bool:
        return (
            self._scratch_dtype is not None and position < self._last and position not in self._scratch_done
        )
