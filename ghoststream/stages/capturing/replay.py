"""Replay: inner activations of one layer for the whole calibration set, from a store and that layer alone."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from ghoststream.activations import ActivationStore
from ghoststream.checkpoint.fingerprint import require_undamaged
from ghoststream.errors import MismatchError, RequestError
from ghoststream.files import differences
from ghoststream.options import Compute
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import CaptureRecipe
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import base_of
from ghoststream.streaming import Batch, Replay, Skeleton, make_batches, tap_point


def replay(
    model: str | Path,
    store: str | Path,
    layer: int,
    taps: Sequence[str],
    *,
    sequences: tuple[int, int] | None = None,
    allow_rounded: bool = False,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> Generator[tuple[int, dict[str, torch.Tensor]], None, None]:
    """Run one decoder layer on the hidden states ``h[layer]`` of a store and give its inner activations.

    Compute dtype, attention implementation and micro-batches are those of the capture, so that in fp32 on the
    CPU the taps are bit for bit those of the pass that made the store. Everything is checked before this
    returns; the layer is read when the first batch is asked for.

    Args:
        model: The model that the store was captured from: local folder or hub id.
        store: Path or URL of the store.
        layer: Number of the decoder layer, ``0 <= layer < L``. Features of the layer before a boundary
            ``[start, stop)`` are taps of layer ``start - 1``.
        taps: Which of ``ghoststream.streaming.TAPS``; see ``docs/taps.md``.
        sequences: Only sequences ``[start, stop)``. Micro-batches that reach beyond them are run whole and
            cut, so that the bits do not depend on it.
        allow_rounded: Accept a store whose states were rounded to less than compute dtype. The layer then
            computes from the rounded states, and nothing is bit for bit what it was in the pass.
        compute: How the model is opened, and on which device the layer is computed.
        progress: Who is told how many sequences are done.

    Returns:
        An iterator of ``(first sequence, {tap: tensor})``, one for each micro-batch in order. Tensors are
        ``(n, T, width)`` at compute dtype, on ``device``, in memory of their own. Padding has values too: the
        store's mask says which tokens count. The weights are freed when the iterator ends or is closed.

    Raises:
        MismatchError: If the store is of another model, or its states are rounded and ``allow_rounded`` is
            not set.
        RequestError: If the layer, a tap or the sequences do not exist, or ``h[layer]`` was not captured.
        UnsupportedModelError: If the layer does not have one of the taps.
        StoreError: If ``h[layer]`` is not complete, or (while iterating) damaged.
        NumericsError: While iterating, if a stored state is not finite.
        GhoststreamError: What opening the model or the store raises.

    Memory: the layer and the frame (final norm, learned positions) at compute dtype, and of one micro-batch
    the states, the layer's work and the taps, more of these only if the caller keeps them; the token ids of
    all sequences.
    """
    source = ActivationStore.open(str(store))
    notes = rounding_notes(source, allow_rounded=allow_rounded)
    session = session_of(source, model, compute or Compute())
    return replay_layer(session, source, layer, taps, sequences, notes, progress or SilentProgress())


def session_of(source: ActivationStore, model: str | Path, compute: Compute) -> ModelSession:
    """Open the model that a store was captured from, to compute as the capture did.

    Raises:
        MismatchError: If the store is of another model.
        CheckpointError: If a tensor that was read already is not what it was for the store; others are
            compared when they are read.
        RequestError: If another compute type or attention is asked for.
        GhoststreamError: What opening the model raises.
    """
    compute.refuse(("dtype", "attention", "micro_batch"), "it is that of the store")
    recipe = CaptureRecipe.from_json(source.recipe, source.uri)
    own = {"dtype": recipe.dtype, "attention": recipe.attention}
    session = ModelSession(model, compute.model_copy(update=own))
    _require_same_model(session, source)
    session.expect(base_of(source), f"{source.uri} was captured")
    return session


def replay_layer(
    session: ModelSession,
    source: ActivationStore,
    layer: int,
    taps: Sequence[str],
    sequences: tuple[int, int] | None,
    notes: Sequence[str],
    progress: Progress,
) -> Generator[tuple[int, dict[str, torch.Tensor]], None, None]:
    """Do what :func:`replay` does, with a model from :func:`session_of`; ``notes`` are told as warnings."""
    work = Replay(session.skeleton, layer)
    for name in taps:
        tap_point(session.skeleton.architecture, session.skeleton.layers[layer], name)
    start, stop = _range(source, sequences)
    source.read(layer, start, start + 1)  # absent or unfinished states are found before any work
    tokens, recipe = source.tokens(), CaptureRecipe.from_json(source.recipe, source.uri)
    batches = [
        batch
        for batch in make_batches(tokens.ids, tokens.mask, recipe.micro_batch)
        if batch.start < stop and batch.stop > start
    ]
    for note in notes:
        progress.log(f"warning: {note}")
    return _run(work, session.skeleton, source, layer, tuple(taps), batches, (start, stop), progress)


def _run(
    work: Replay,
    skeleton: Skeleton,
    source: ActivationStore,
    layer: int,
    taps: tuple[str, ...],
    batches: Sequence[Batch],
    wanted: tuple[int, int],
    progress: Progress,
) -> Generator[tuple[int, dict[str, torch.Tensor]], None, None]:
    start, stop = wanted
    progress.start(f"replaying layer {layer}", stop - start, "sequences")
    with work:
        for batch in batches:
            first, last = max(start, batch.start), min(stop, batch.stop)
            states = source.read(layer, batch.start, batch.stop, require_finite=True).to(skeleton.dtype)
            # Without a name here: taps would live on while the next ones are made.
            yield first, _cut(work.taps(batch, states, taps), slice(first - batch.start, last - batch.start))
            progress.advance(last - first)
    progress.finish()


def _cut(taken: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: tap[rows] for name, tap in taken.items()}


def rounding_notes(source: ActivationStore, *, allow_rounded: bool) -> list[str]:
    """Return what is to be said about states that were rounded when they were stored; nothing if none were.

    Raises:
        MismatchError: If they were, and that is not allowed.
    """
    recipe = CaptureRecipe.from_json(source.recipe, source.uri)
    if recipe.store_dtype == recipe.dtype:
        return []
    found = (
        f"the states in {source.uri} were computed in {recipe.dtype} and rounded to {recipe.store_dtype}:"
        " a layer that runs on them again does not give the bits of the pass"
    )
    if not allow_rounded:
        msg = f"{found}; capture with store_dtype {recipe.dtype}, or set allow_rounded"
        raise MismatchError(msg)
    return [found]


def _require_same_model(session: ModelSession, source: ActivationStore) -> None:
    found = source.fingerprint.get("checkpoint", {})
    if found.get("digest") != session.fingerprint["digest"]:
        require_undamaged(
            base_of(source), session.fingerprint, session.skeleton.index, f"{source.uri} was captured"
        )
        changed = "; ".join(differences(found, session.fingerprint)[:3])
        msg = (
            f"{source.uri} was not captured from {session.name} ({changed}); use the model that it was "
            "captured from"
        )
        raise MismatchError(msg)


def _range(source: ActivationStore, sequences: tuple[int, int] | None) -> tuple[int, int]:
    start, stop = sequences or (0, source.n_sequences)
    if not 0 <= start < stop <= source.n_sequences:
        msg = f"sequences [{start},{stop}) are empty or outside of [0,{source.n_sequences}) of {source.uri}"
        raise RequestError(msg)
    return start, stop
