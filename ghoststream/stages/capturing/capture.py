"""Capture: one streamed pass of the dense model writes its hidden states into an activation store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ghoststream.activations import ActivationStore, PartStore, StoreRequest, WritableStore
from ghoststream.checkpoint.fingerprint import require_undamaged
from ghoststream.costs import sequences_per_shard
from ghoststream.errors import GhoststreamError, RequestError
from ghoststream.options import Compute, Storage, Text, TextLike, dtype_name
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import CaptureRecipe
from ghoststream.stages.capturing.run import CaptureRun
from ghoststream.stages.session import ModelSession
from ghoststream.stages.sharing import on_first_device, rows_of
from ghoststream.stages.workers import Shared
from ghoststream.statistics import base_of
from ghoststream.text import TokenSet, recipe_of


def capture(
    model: str | Path,
    *,
    calibration: TextLike,
    store: str | Path,
    storage: Storage | None = None,
    compute: Compute | None = None,
    worker: tuple[int, int] | None = None,
    scheduler: Any = None,
    progress: Progress | None = None,
) -> ActivationStore:
    """Run a model once over calibration text and keep ``h[0..L]`` (or some of them) in a store.

    Killed at any moment, the same call continues from the last layer that was committed. A layer is committed
    while the next one computes, so at most two are computed again. It continues from the store where that
    holds the layer at compute dtype, otherwise from a scratch copy inside it.

    Several workers can share the sequences, each with the same call but for ``worker``, at the same time or
    one after another, in any order. Each reads the weights and writes shards of its own; the one that
    finishes last completes the store, and every file is then byte for byte what one worker alone would have
    left.

    Args:
        model: Local folder or hub id.
        calibration: Text to calibrate on, or its specification, or those of several.
        store: Path or URL of the store.
        storage: Which hidden states are kept, and their dtype.
        compute: How the model is opened and run. Several devices, such as ``cuda:0,cuda:1``, take shares of
            the sequences, in a process each.
        worker: ``(i, n)``: do the share of worker ``i`` of ``n``, counted from 1. Shares are whole shards and
            whole micro-batches; where there are fewer of these than workers, the last workers have nothing to
            do.
        scheduler: Address of a Dask scheduler, or its client, whose workers take shares. They see the model,
            the text and the store by the same names.
        progress: Who is told how far it is.

    Returns:
        The store, open for reading; with ``worker`` it is complete once every worker has finished.

    Raises:
        MismatchError: If the store was made from another model, text or recipe.
        RequestError: If the store is being captured in other shares, or in shares and ``worker`` is not
            given; or the scheduler does not answer or is lost.
        BusyError: If another process is writing the store, or this worker's share of it.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        NumericsError: If hidden states stop being finite.
        GhoststreamError: What opening the model, the text or the store raises.

    Memory: what :class:`~ghoststream.streaming.PassMemory` states, ``S * T * C`` elements of states where
    they fit, a shard of the store (16 MiB, or one sequence) for each of at most four threads that write and
    each array that is filled, and on an accelerator three micro-batches on their way there. With
    ``worker``, S is the number of sequences in its share.
    """
    compute, text = compute or Compute(), Text.of(calibration).to_calibrate()
    storage, progress = storage or Storage(), progress or SilentProgress()
    shared = Shared.asked(compute, scheduler)
    if shared is not None:
        if worker is not None:
            msg = (
                "--worker is one share, and several devices or --scheduler take all; leave one of the two out"
            )
            raise RequestError(msg)
        session = ModelSession(model, on_first_device(compute))
        return capture_shared(session, text, store, storage, shared, progress)
    session = ModelSession(model, compute)
    return capture_session(session, text, store, storage, worker=worker, progress=progress)


def capture_shared(
    session: ModelSession,
    text: Text,
    store: str | Path,
    storage: Storage,
    shared: Shared,
    progress: Progress,
) -> ActivationStore:
    """Have each worker do what :func:`capture` does with ``worker``; the last one completes the store.

    The model is open here, on the first of the devices that are named, and runs no pass.
    """
    tokens = session.tokens(text, progress)
    micro_batch = _micro_batch(session, text, store)
    recipe = _recipe(session, text, tokens, storage, micro_batch)
    same = shared.compute.model_copy(update={"micro_batch": micro_batch})
    with shared.workers(progress) as crew:
        rows = crew.rows(tokens.n_sequences, _share_step(recipe))
        request = (session.name, text, store, storage)
        shares = [(*request, (number, len(rows))) for number in range(1, len(rows) + 1)]
        crew.run(capture_share, same, shares, [stop - start for start, stop in rows], progress)
    return ActivationStore.open(str(store))


def capture_share(
    compute: Compute,
    model: str | Path,
    text: Text,
    store: str | Path,
    storage: Storage,
    worker: tuple[int, int],
) -> None:
    """Do one share of a capture, on a worker; see :func:`capture`."""
    capture(model, calibration=text, store=store, storage=storage, compute=compute, worker=worker)


def capture_session(
    session: ModelSession,
    text: Text,
    store: str | Path,
    storage: Storage,
    *,
    worker: tuple[int, int] | None = None,
    progress: Progress,
) -> ActivationStore:
    """Do what :func:`capture` does, with a model that is open."""
    tokens = session.tokens(text, progress)
    begun = _begun(store)
    if begun is not None:
        require_undamaged(base_of(begun), session.fingerprint, session.skeleton.index, f"{store} was begun")
    micro_batch = _micro_batch(session, text, store)
    recipe = _recipe(session, text, tokens, storage, micro_batch)
    rows = None if worker is None else _share(recipe, tokens.n_sequences, worker, progress)
    with _open_store(store, rows, _request(session, tokens, recipe)) as target:
        if not target.complete:
            CaptureRun(session, target, recipe, progress).run()
        # Outside of the run: a kill may have come between the last layer and this.
        target.finish()
    return ActivationStore.open(str(store))


def _begun(store: str | Path) -> ActivationStore | None:
    try:
        return ActivationStore.open(str(store))
    except GhoststreamError:
        return None  # nothing there, or something that opening it for writing will name


def _micro_batch(session: ModelSession, text: Text, store: str | Path) -> int:
    """Return the sequences of a micro-batch: as given, as the store was begun with, or as memory allows."""
    return session.compute.micro_batch or _begun_with(_begun(store)) or session.micro_batch(text.length)


def _begun_with(store: ActivationStore | None) -> int | None:
    """Return the micro-batch of a store that was begun: another machine's memory may have decided it."""
    try:
        return None if store is None else CaptureRecipe.from_json(store.recipe, store.uri).micro_batch
    except GhoststreamError:
        return None  # opening it for writing will name it


def _recipe(
    session: ModelSession, text: Text, tokens: TokenSet, storage: Storage, micro_batch: int
) -> CaptureRecipe:
    skeleton, layers = session.skeleton, storage.layers
    wanted = tuple(range(skeleton.n_layers + 1)) if layers is None else tuple(sorted(set(layers)))
    if not wanted or wanted[0] < 0 or wanted[-1] > skeleton.n_layers:
        msg = f"layers {wanted} asked for; the model has hidden states h[0] to h[{skeleton.n_layers}]"
        raise RequestError(msg)
    compute = dtype_name(skeleton.dtype)
    stored = storage.store_dtype or compute
    # Integers count as two bytes: the copy to continue from, which they need, is as wide as for bfloat16.
    sequence_bytes = text.length * skeleton.hidden_size * (4 if stored == "float32" else 2)
    return CaptureRecipe.model_validate(
        {
            "model_digest": session.fingerprint["digest"],
            "config_digest": session.fingerprint["config"],
            "revision": session.resolved.commit,
            "text": recipe_of(text, tokens),
            "tokens_digest": tokens.digest,
            "dtype": compute,
            "store_dtype": stored,
            "attention": skeleton.attention,
            "micro_batch": micro_batch,
            "layers": wanted,
            "sequences_per_shard": sequences_per_shard(tokens.n_sequences, sequence_bytes, micro_batch),
        }
    )


def _share(
    recipe: CaptureRecipe, n_sequences: int, worker: tuple[int, int], progress: Progress
) -> tuple[int, int]:
    """Return the sequences ``[start, stop)`` of a worker, and say which they are."""
    number, count = worker
    step = _share_step(recipe)
    start, stop = rows_of(number, count, n_sequences, step)
    if start == stop:
        progress.log(
            f"worker {number} of {count} has nothing to do: {n_sequences} sequences make "
            f"{math.ceil(n_sequences / step)} shares at most (whole shards of {recipe.sequences_per_shard} "
            f"and whole micro-batches of {recipe.micro_batch})"
        )
    else:
        progress.log(f"worker {number} of {count}: sequences [{start},{stop}) of {n_sequences}")
    return start, stop


def _share_step(recipe: CaptureRecipe) -> int:
    """Return of how many sequences shares are: whole shards and whole micro-batches."""
    return math.lcm(recipe.sequences_per_shard, recipe.micro_batch)


def _request(session: ModelSession, tokens: TokenSet, recipe: CaptureRecipe) -> StoreRequest:
    fingerprint: dict[str, Any] = {
        "checkpoint": session.fingerprint,
        "model": {"norm_epsilon": session.norm_epsilon},
        "text": tokens.recipe(),
    }
    return StoreRequest(
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


def _open_store(store: str | Path, rows: tuple[int, int] | None, request: StoreRequest) -> WritableStore:
    if rows is None:
        return ActivationStore.create_or_resume(str(store), **request)
    return PartStore.create_or_resume(str(store), rows, **request)
