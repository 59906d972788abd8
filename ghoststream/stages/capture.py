"""Capture: one streamed pass of the dense model writes its hidden states into an activation store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ghoststream.activations import ActivationStore, LayerWriter
from ghoststream.errors import RequestError
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos, CaptureRecipe
from ghoststream.spans import PruningPlan
from ghoststream.stages.session import (
    ModelOptions,
    ModelSession,
    TextOptions,
    default_micro_batch,
    dtype_name,
)
from ghoststream.streaming import Batch, Lane, PassOptions, StatesFactory, StreamedPass, make_batches
from ghoststream.text import TokenSet

_SHARD_BYTES = 16 * 2**20


def capture(
    model: str | Path,
    *,
    calibration: str,
    sequences: int,
    length: int,
    store: str | Path,
    layers: tuple[int, ...] | None = None,
    dtype: str | None = None,
    store_dtype: str | None = None,
    attention: str | None = None,
    micro_batch: int | None = None,
    pack: bool = True,
    bos: Bos = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    host_memory: int | None = None,
    progress: Progress | None = None,
) -> ActivationStore:
    """Run a model once over calibration text and keep ``h[0..L]`` (or ``layers``) in a store.

    Killed at any moment, the same call continues from the last layer that was finished: from the store where it
    holds that layer at compute dtype, otherwise from a scratch copy inside it.

    Args:
        model: Local folder or hub id.
        calibration: Text specification; of a text with a standard split, the part to fit on.
        sequences: Number of windows S.
        length: Tokens of a window T.
        store: Path or URL of the store.
        layers: Which hidden states to keep, each in ``[0, L]``; all if ``None``.
        dtype: Compute dtype; the checkpoint's if ``None``.
        store_dtype: Dtype in the store; the compute dtype if ``None``.
        attention: Attention implementation; transformers' default if ``None``.
        micro_batch: Sequences in one forward; what works in half a U, at most 2,048 tokens, if ``None``.
        pack: Whether documents are joined before they are cut into windows.
        bos: When the beginning-of-sequence token is put in front.
        revision: Revision of a hub model.
        trust_remote_code: Whether the base's own code may run.
        device: Where layers are computed.
        host_memory: Bytes of hidden states kept in memory between layers, the rest is in a scratch file;
            ``None`` is no limit.
        progress: Who is told how far it is.

    Returns:
        The store, open for reading.

    Raises:
        MismatchError: If the store was made from another model, text or recipe.
        NumericsError: If hidden states stop being finite.
        GhoststreamError: What opening the model, the text or the store raises.

    Memory: two decoder layers at compute dtype, ``S * T * C`` elements of states within ``host_memory``, one
    micro-batch in flight, and three times one shard of the store (a shard is 16 MiB or one sequence).
    """
    options = ModelOptions(dtype, attention, revision, trust_remote_code, device)
    session = ModelSession(model, options)
    text = TextOptions(calibration, sequences, length, pack, bos, part="fit")
    tokens = session.tokens(text)
    recipe = _recipe(session, text, tokens, layers, store_dtype, micro_batch)
    with _open_store(store, session, tokens, recipe) as target:
        if not target.complete:
            _Capture(session, target, recipe, host_memory, progress or SilentProgress()).run()
        # Outside of the run: a kill may have come between the last layer and this.
        for layer in target.scratch_layers():
            target.drop_scratch(layer)
    return ActivationStore.open(str(store))


def _recipe(
    session: ModelSession,
    text: TextOptions,
    tokens: TokenSet,
    layers: tuple[int, ...] | None,
    store_dtype: str | None,
    micro_batch: int | None,
) -> CaptureRecipe:
    skeleton = session.skeleton
    wanted = tuple(range(skeleton.n_layers + 1)) if layers is None else tuple(sorted(set(layers)))
    if not wanted or wanted[0] < 0 or wanted[-1] > skeleton.n_layers:
        msg = f"layers {wanted} asked for; the model has hidden states h[0] to h[{skeleton.n_layers}]"
        raise RequestError(msg)
    compute = dtype_name(skeleton.dtype)
    stored = store_dtype or compute
    sequence_bytes = text.length * skeleton.hidden_size * (4 if stored == "float32" else 2)
    return CaptureRecipe.model_validate(
        {
            "model_digest": session.fingerprint["digest"],
            "config_digest": session.fingerprint["config"],
            "revision": session.resolved.commit,
            "text": text.recipe(),
            "tokens_digest": tokens.digest,
            "dtype": compute,
            "store_dtype": stored,
            "attention": skeleton.attention,
            "micro_batch": micro_batch or default_micro_batch(skeleton, text.length),
            "layers": wanted,
            "sequences_per_shard": max(1, min(tokens.n_sequences, _SHARD_BYTES // sequence_bytes)),
        }
    )


def _open_store(
    store: str | Path, session: ModelSession, tokens: TokenSet, recipe: CaptureRecipe
) -> ActivationStore:
    fingerprint: dict[str, Any] = {
        "checkpoint": session.fingerprint,
        "model": {"norm_epsilon": session.norm_epsilon},
        "text": tokens.recipe(),
    }
    return ActivationStore.create_or_resume(
        str(store),
        recipe=recipe.to_json(),
        tokens=tokens,
        fingerprint=fingerprint,
        n_layers=session.skeleton.n_layers,
        n_sequences=tokens.n_sequences,
        length=tokens.length,
        hidden=session.skeleton.hidden_size,
        store_dtype=recipe.store_dtype,
        layers=recipe.layers,
        sequences_per_shard=recipe.sequences_per_shard,
        sequences_per_chunk=1,
    )


class _Capture:
    """One run of a capture: where it starts, the pass, and what it leaves behind."""

    def __init__(
        self,
        session: ModelSession,
        store: ActivationStore,
        recipe: CaptureRecipe,
        host_memory: int | None,
        progress: Progress,
    ) -> None:
        self._session = session
        self._store = store
        self._recipe = recipe
        self._host_memory = host_memory
        self._progress = progress
        # Every layer of the store can be continued from only where the store keeps all bits of all layers.
        all_layers = recipe.layers == tuple(range(recipe.layers[-1] + 1))
        self._needs_scratch = recipe.store_dtype != recipe.dtype or not all_layers

    def run(self) -> None:
        """Run the pass from the last finished layer to the last wanted one."""
        skeleton, store = self._session.skeleton, self._store
        tokens = store.tokens()
        batches = make_batches(tokens.ids, tokens.mask, self._recipe.micro_batch)
        first = self._resume_point()
        if first:
            self._progress.log(f"continuing from h[{first}], which is in the store")
        factory = StatesFactory(
            batches,
            skeleton.hidden_size,
            skeleton.dtype,
            device=skeleton.device,
            budget_bytes=self._host_memory,
        )
        observer = _StoreObserver(
            store, skeleton.dtype if self._needs_scratch else None, self._recipe.layers[-1]
        )
        lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=(observer,))
        options = PassOptions(
            first_layer=first,
            initial=self._stored_states(first) if first else None,
            last_layer=self._recipe.layers[-1],
            progress=self._progress,
        )
        StreamedPass(skeleton, batches, [lane], factory, options).run()

    def _resume_point(self) -> int:
        points = list(self._store.scratch_layers())
        if self._recipe.store_dtype == self._recipe.dtype:
            points += self._store.completed_layers()
        return max(points, default=0)

    def _stored_states(self, layer: int) -> Any:
        from_scratch = layer in self._store.scratch_layers()

        def read(batch: Batch) -> torch.Tensor:
            source = self._store.read_scratch if from_scratch else self._store.read
            return source(layer, batch.start, batch.stop).to(self._session.skeleton.device)

        return read


class _StoreObserver:
    """Writes what a lane shows into the store, and a scratch copy of the newest layer where one is needed."""

    def __init__(self, store: ActivationStore, scratch_dtype: torch.dtype | None, last: int) -> None:
        self._store = store
        self._pending = set(store.layers) - set(store.completed_layers())
        self._scratch_dtype = scratch_dtype
        self._scratch_done = set(store.scratch_layers())
        self._last = last
        self._writers: list[LayerWriter] = []
        self._position: int | None = None

    def wants(self, position: int) -> bool:
        return position in self._pending or self._wants_scratch(position)

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        if self._position != position:
            self._open(position)
        for writer in self._writers:
            writer.write(batch.start, states)

    def finished(self, position: int) -> None:
        for writer in self._writers:
            writer.commit()
        self._writers = []
        for layer in self._store.scratch_layers():
            if layer < position:
                self._store.drop_scratch(layer)

    def failed(self) -> None:
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
