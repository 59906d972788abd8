"""One run of a capture: where it starts, the pass, and what it writes into the store."""

from __future__ import annotations

from contextlib import ExitStack

from ghoststream.activations import ShardImage, WritableStore, writing_threads
from ghoststream.progress import Progress
from ghoststream.recipe import CaptureRecipe
from ghoststream.spans import PruningPlan
from ghoststream.stages.capturing.store_observer import StoreObserver
from ghoststream.stages.session import ModelSession
from ghoststream.stages.stored import stored_states
from ghoststream.statistics import BASE_TENSORS
from ghoststream.streaming import (
    BackgroundObserver,
    Batch,
    Lane,
    Observer,
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
        with ExitStack() as stack:
            writing: Observer = stack.enter_context(observer)
            if skeleton.device.type != "cpu":  # the way to the host would stop the accelerator
                writing = stack.enter_context(BackgroundObserver(observer, skeleton.device))
            lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=(writing,))
            StreamedPass(skeleton, batches, [lane], factory, options).run()

    def _batches(self) -> tuple[Batch, ...]:
        # Cut from all sequences, so that each worker computes just the micro-batches that one alone would.
        tokens = self._store.tokens()
        start, stop = self._store.rows
        everything = make_batches(tokens.ids, tokens.mask, self._recipe.micro_batch)
        return tuple(batch for batch in everything if start <= batch.start < stop)

    def _buffers(self) -> int:
        """Bytes that writing takes: shards that are written and those that are filled."""
        layout, skeleton = self._store.layout, self._session.skeleton
        dtypes = [layout.store_dtype, *([self._recipe.dtype] if self._needs_scratch else [])]
        room = max(ShardImage.room(layout, dtype) for dtype in dtypes)
        if skeleton.device.type == "cpu":
            return (writing_threads() + len(dtypes)) * room
        # Page-locked memory comes in powers of two.
        return (writing_threads() + len(dtypes)) * (1 << (room - 1).bit_length())

    def _resume_point(self) -> int:
        points = list(self._store.scratch_layers())
        if self._recipe.store_dtype == self._recipe.dtype:
            points += self._store.completed_layers()
        return max(points, default=0)
