"""What a reduction needs from an activation store, and how a task opens it.

Stores are imported where they are opened: an estimate asks reducers for their sizes, and must not wait for
torch and zarr.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ghoststream.errors import MismatchError, NumericsError, StoreError
from ghoststream.files import json_digest

BASE_TENSORS = "base_tensors"
"""What digests of the tensors that made a store are noted under, by the tensors' names."""


class HiddenStateSource(Protocol):
    """The reading side of an activation store.

    It has ``layers`` of ``n_sequences`` sequences of ``length`` positions.
    """

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L of the model; hidden states are numbered ``0..L``."""

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""

    @property
    def length(self) -> int:
        """Positions of a sequence."""

    @property
    def hidden(self) -> int:
        """Hidden size C."""

    @property
    def recipe(self) -> dict[str, Any]:
        """What was asked for."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What it was made from."""

    @property
    def annotations(self) -> dict[str, Any]:
        """What stages noted in it, such as digests of the model's tensors."""

    def completed_layers(self) -> tuple[int, ...]:
        """Return the hidden-state numbers that are completely in the store."""

    def read_numpy(self, layer: int, start: int, stop: int, dtype: Any = np.float32) -> npt.NDArray[Any]:
        """Return ``h[layer]`` of sequences ``[start, stop)``, shape ``(stop - start, length, hidden)``."""

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return the token mask of sequences ``[start, stop)``, shape ``(stop - start, length)``."""


@runtime_checkable
class TensorSource(Protocol):
    """A source that can also give states as they are kept."""

    def read(self, layer: int, start: int, stop: int) -> Any:
        """Return ``h[layer]`` of sequences ``[start, stop)`` as a torch tensor, in the dtype of its place."""


@dataclass(frozen=True)
class TapSource:
    """Where the taps of layers are, for features that read them: a store like that of the hidden states.

    Attributes:
        uri: The store, in which number ``l`` is the taps of layer ``l``, side by side.
        width: Width of the taps together.
    """

    uri: str
    width: int

    def open(self, layers: tuple[int, ...]) -> HiddenStateSource:
        """Open the store, which must hold these layers.

        Raises:
            StoreError: If one is missing or incomplete.
        """
        source = reopen_source(self.uri)
        require_layers(source, layers, self.uri)
        return source


class Taps(Protocol):
    """What gives the taps of layers, such as :class:`TapSource`."""

    @property
    def width(self) -> int:
        """Width of the taps together."""

    def open(self, layers: tuple[int, ...]) -> HiddenStateSource:
        """Return them, for these layers."""


def open_source(store_uri: str) -> HiddenStateSource:
    """Open a store for reading, with all checks: manifest, metadata, presence and size of every shard.

    Raises:
        StoreError: If the store is incomplete or corrupt.
        InputNotFoundError: If there is none.
    """
    from ghoststream.activations import open_checked

    source: HiddenStateSource = open_checked(store_uri)
    return source


def reopen_source(store_uri: str) -> HiddenStateSource:
    """Return a store that this process has opened before, if it has not changed since.

    Else open it with all checks.

    Raises what :func:`open_source` does.
    """
    from ghoststream.activations import StoreRef

    source: HiddenStateSource = StoreRef.of(store_uri).open()
    return source


def require_layers(source: HiddenStateSource, layers: tuple[int, ...], store_uri: str) -> None:
    """Check that the hidden states ``layers`` are in the store before any is read.

    Raises:
        MismatchError: If the model has no such hidden state.
        StoreError: If one was not captured, or not completely.
    """
    beyond = [layer for layer in layers if layer > source.n_layers]
    if beyond:
        msg = (
            f"h[{beyond[0]}] is needed, but the store {store_uri} is of a model of {source.n_layers} layers; "
            "use the plan and the store of one model"
        )
        raise MismatchError(msg)
    missing = sorted(set(layers) - set(source.completed_layers()))
    if missing:
        msg = (
            f"the store {store_uri} does not hold h[{missing[0]}] completely; "
            f"run capture again with the layers {', '.join(map(str, missing))} among its layers"
        )
        raise StoreError(msg)


def require_finite(
    rows: npt.NDArray[np.floating[Any]], layer: int, start: int, stop: int, sums: npt.NDArray[np.float64]
) -> None:
    """Check hidden states through sums over them, which carry every NaN and infinity.

    Args:
        rows: ``(n, C)`` unmasked hidden states of sequences ``[start, stop)``.
        layer: Their hidden-state number.
        start: First sequence.
        stop: One past the last sequence.
        sums: Sums of ``rows``, or of their squares, over tokens or channels.

    Raises:
        NumericsError: If a value is not finite.
    """
    if np.isfinite(sums).all():
        return
    n_bad = int((~np.isfinite(rows)).any(axis=1).sum())
    msg = (
        f"h[{layer}] of sequences [{start},{stop}) holds NaN or infinity at {n_bad} of {len(rows)} tokens; "
        "verify the store, or capture again at a dtype of larger range (bfloat16 or float32)"
    )
    raise NumericsError(msg)


def store_digest(source: HiddenStateSource) -> str:
    """Return the digest of what a store holds by its own account: the request and what it was made from."""
    made_from = {**source.fingerprint, BASE_TENSORS: source.annotations.get(BASE_TENSORS, {})}
    return json_digest({"recipe": source.recipe, "fingerprint": made_from})


def texts_in(source: HiddenStateSource) -> int:
    """Return how many texts take turns in the sequences of a store."""
    spec = source.recipe.get("text", {}).get("spec")
    return len(spec) if isinstance(spec, list) else 1


def base_of(source: HiddenStateSource) -> dict[str, Any]:
    """Return what a store knows of its model: the fingerprint, and ``tensors``, digests of tensors."""
    tensors = source.annotations.get(BASE_TENSORS, {})
    return {**source.fingerprint.get("checkpoint", {}), "tensors": dict(tensors)}
