"""One run of a capture: where it starts, the pass, and what it writes into the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ghoststream.activations import LayerWriter, WritableStore
from ghoststream.options import dtype_name
from ghoststream.progress import Progress
from ghoststream.recipe import CaptureRecipe
from ghoststream.spans import PruningPlan
from ghoststream.stages.session import ModelSession
from ghoststream.stages.stored import stored_states
from ghoststream.statistics import BASE_TENSORS
from ghoststream.streaming import (
    BackgroundObserver,
    Batch,
    Lane,
    PassOptions,
    StreamedPass,
    make_batches,
)


class CaptureRun:
    """Runs the pass that fills a store, or one worker's part of it, from the last finished layer on.

    Args:
        session: The model.
        store: The store, open for writing.
        recipe: What it is made by.
        progress: Who is told how far it is.
    """

    def __init__(
        self,
        session: ModelSession,
        store: WritableStore,
        recipe: CaptureRecipe,
        progress: Progress,
    ) -> None:
        self._session = session
        self._store = store
        self._recipe = recipe
        self._progress = progress
        # Every layer of the store can be continued from only where the store keeps all bits of all layers.
        all_layers = recipe.layers == tuple(range(recipe.layers[-1] + 1))
        self._needs_scratch = recipe.store_dtype != recipe.dtype or not all_layers

    def run(self) -> None:
        """Run the pass from the last finished layer to the last wanted one.

        Raises:
            BudgetError: If two layers and a micro-batch do not fit the memory given.
            NumericsError: If hidden states stop being finite.
            GhoststreamError: What reading weights or writing the store raises.
        """
        skeleton, store = self._session.skeleton, self._store
        batches = self._batches()
        first = self._resume_point()
        session = self._session
        session.expect({"tensors": store.annotations.get(BASE_TENSORS)}, f"{store.uri} was begun")
        if first:
            self._progress.log(f"continuing from h[{first}], which is in the store")
            session.require_unchanged(self._progress)  # before anything of another model is added
        memory = self._session.memory(self._recipe.text.length, buffers=self._buffers(), scratch=store.folder)
        factory = memory.states_factory(batches)
        observer = StoreObserver(
            store,
            skeleton.dtype if self._needs_scratch else None,
            self._recipe.layers[-1],
            session.read_for,
        )
        options = PassOptions(
            first_layer=first,
            initial=stored_states(store, first, skeleton.device) if first else None,
            last_layer=self._recipe.layers[-1],
            progress=self._progress,
        )
        with BackgroundObserver(observer, skeleton.device) as writing:
            lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=(writing,))
            StreamedPass(skeleton, batches, [lane], factory, options).run()

    def _batches(self) -> tuple[Batch, ...]:
        # Cut from all sequences, so that each worker computes just the micro-batches that one alone would.
        tokens = self._store.tokens()
        start, stop = self._store.rows
        everything = make_batches(tokens.ids, tokens.mask, self._recipe.micro_batch)
        return tuple(batch for batch in everything if start <= batch.start < stop)

    def _buffers(self) -> int:
        """Bytes that writing takes: a shard in three copies, also of the scratch copy, and what waits."""
        recipe, skeleton = self._recipe, self._session.skeleton
        sequence = recipe.text.length * skeleton.hidden_size
        shard = sequence * recipe.sequences_per_shard * (4 if recipe.store_dtype == "float32" else 2)
        scratch = sequence * recipe.sequences_per_shard * skeleton.dtype.itemsize
        waiting = 3 * recipe.micro_batch * sequence * skeleton.dtype.itemsize
        return 3 * (shard + (scratch if self._needs_scratch else 0)) + waiting

    def _resume_point(self) -> int:
        points = list(self._store.scratch_layers())
        if self._recipe.store_dtype == self._recipe.dtype:
            points += self._store.completed_layers()
        return max(points, default=0)


class StoreObserver:
    """Writes what a lane shows into the store, and a scratch copy of the newest layer where one is needed.

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
        """Commit what was written, then drop the scratch copies of the positions before."""
        if self._writers:
            for earlier in range(self._noted + 1, position + 1):
                self._store.annotate_entries(BASE_TENSORS, self._tensors(earlier))
            self._noted = position
        for writer in self._writers:
            writer.commit()
        self._writers = []
        for layer in self._store.scratch_layers():
            if layer < position:
                self._store.drop_scratch(layer)

    def failed(self) -> None:
        """Remove what was written and not committed."""
        for writer in self._writers:
            writer.abort()
        self._writers = []

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
