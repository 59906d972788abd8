"""Norms of hidden states by layer and position: where massive activations are born and die."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import NumericsError, RequestError
from ghoststream.options import Reduction
from ghoststream.progress import Progress
from ghoststream.statistics.engines import HERE
from ghoststream.statistics.reducers import Reducer
from ghoststream.statistics.similarity import reduce_whole
from ghoststream.statistics.source import HiddenStateSource, reopen_source, require_finite
from ghoststream.statistics.sums import SumState
from ghoststream.statistics.token_weights import SINK_FACTOR

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NormReducer(Reducer):
    """Norms, massive activations and mean absolute channels of hidden states; masked tokens do not enter.

    A token is massive in ``h[l]`` if its norm is above ``factor`` times the median norm of its sequence
    there, as for the token weight ``drop_sinks``. It is born in ``h[l]`` if it is not massive in the hidden
    state before (of ``layers``), and dies in ``h[l]`` if it is massive in the one before and not here.

    Args:
        layers: Hidden states, ascending.
        factor: What counts as massive.
    """

    layers: tuple[int, ...]
    factor: float = SINK_FACTOR

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {"statistic": "norms", "layers": list(self.layers), "factor": self.factor}

    def state_bytes(self, hidden: int, length: int) -> int:
        """Bytes of one state: ``8 (C + T + 10)`` a layer."""
        return 8 * (len(self.layers) * (hidden + length + 10) + 2)

    def task_bytes(self, hidden: int, length: int) -> int:
        """Peak bytes of one task: one state and the rows of :meth:`reduce`."""
        return self.state_bytes(hidden, length) + 3 * 4 * length * hidden + 8 * 8 * length

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Reduce sequences ``[start, stop)``, one at a time; each layer is read once.

        Memory: ``12 T C`` bytes: float32 rows of one hidden state of one sequence, a copy without masked
        tokens, and their absolute values.

        Raises:
            NumericsError: If a hidden state is NaN or infinite.
        """
        total = self._empty(source.hidden, source.length)
        for sequence in range(start, stop):
            positions = np.flatnonzero(source.mask(sequence, sequence + 1)[0])
            if len(positions):
                self._add_sequence(total, source, sequence, positions)
        return total

    def merge(self, left: SumState, right: SumState) -> SumState:
        """Return the state of both: sums added, of largest ratios the larger one (if equal, the left)."""
        larger = right.arrays["largest_ratio"] > left.arrays["largest_ratio"]
        merged = left.copy().add_in_place(right)
        for name in ("largest_ratio", "largest_norm", "largest_sequence", "largest_position"):
            merged.arrays[name] = np.where(larger, right.arrays[name], left.arrays[name])
        return merged

    def profile(self, state: SumState) -> NormProfile:
        """Return the figures of a state.

        Raises:
            NumericsError: If no token counts.
        """
        sums = state.arrays
        tokens, sequences = (int(sums[name][0]) for name in ("tokens", "sequences"))
        if tokens == 0:
            msg = "no token of the store counts: its mask is empty; capture again with text in every sequence"
            raise NumericsError(msg)
        counts = {name: sums[name].astype(np.int64) for name in ("massive", "born", "died", "massive_at")}
        places = np.stack([sums["largest_sequence"], sums["largest_position"]], axis=1).astype(np.int64)
        return NormProfile(
            layers=self.layers,
            mean_norm=sums["norm_sum"] / tokens,
            rms_norm=np.sqrt(sums["energy"] / tokens),
            median_norm=sums["median_sum"] / sequences,
            largest_ratio=sums["largest_ratio"],
            largest_norm=sums["largest_norm"],
            largest_at=places,
            **counts,
            channel_mean_abs=sums["channel_abs"] / tokens,
            n_tokens=tokens,
            n_sequences=sequences,
        )

    def _empty(self, hidden: int, length: int) -> SumState:
        n = len(self.layers)
        names = ("norm_sum", "energy", "median_sum", "massive", "born", "died")
        places = ("largest_ratio", "largest_norm", "largest_sequence", "largest_position")
        arrays: dict[str, Array] = {name: np.zeros(n) for name in names}
        # Below any ratio, so that the first sequence is taken.
        arrays |= {name: np.full(n, -1.0) for name in places}
        arrays |= {"massive_at": np.zeros((n, length)), "channel_abs": np.zeros((n, hidden))}
        return SumState(arrays | {"tokens": np.zeros(1), "sequences": np.zeros(1)})

    def _add_sequence(
        self, total: SumState, source: HiddenStateSource, sequence: int, positions: npt.NDArray[np.int64]
    ) -> None:
        sums = total.arrays
        sums["tokens"] += len(positions)
        sums["sequences"] += 1
        before = np.zeros(len(positions), dtype=bool)
        for number, layer in enumerate(self.layers):
            rows = source.read_numpy(layer, sequence, sequence + 1, dtype=np.float32)[0][positions]
            energies = np.einsum("tc,tc->t", rows, rows, dtype=np.float64)
            require_finite(rows, layer, sequence, sequence + 1, energies)
            norms = np.sqrt(energies)
            median = float(np.median(norms))
            massive = norms > self.factor * median
            sums["energy"][number] += energies.sum()
            sums["norm_sum"][number] += norms.sum()
            sums["median_sum"][number] += median
            sums["channel_abs"][number] += np.abs(rows).sum(axis=0, dtype=np.float64)
            sums["massive"][number] += np.count_nonzero(massive)
            sums["massive_at"][number, positions[massive]] += 1
            sums["born"][number] += np.count_nonzero(massive & ~before)
            sums["died"][number] += np.count_nonzero(before & ~massive)
            before = massive
            self._note_largest(sums, number, norms, median, (sequence, positions))

    def _note_largest(
        self,
        sums: dict[str, Array],
        number: int,
        norms: Array,
        median: float,
        place: tuple[int, npt.NDArray[np.int64]],
    ) -> None:
        top = int(np.argmax(norms))
        norm = float(norms[top])
        ratio = norm / median if median > 0 else (np.inf if norm > 0 else 0.0)
        if ratio > sums["largest_ratio"][number]:
            sums["largest_ratio"][number], sums["largest_norm"][number] = ratio, norm
            sums["largest_sequence"][number], sums["largest_position"][number] = place[0], place[1][top]


@dataclass(frozen=True)
class NormProfile:
    """Norms of the residual stream; ``n`` hidden states, ``T`` positions, ``C`` channels.

    Attributes:
        layers: Numbers of the hidden states, in the order of all arrays.
        mean_norm: Mean of ``|h|`` over tokens, ``(n,)``.
        rms_norm: Root of the mean of ``|h|^2``, ``(n,)``.
        median_norm: Median norm of a sequence, mean over sequences, ``(n,)``.
        largest_ratio: Largest norm over the median norm of its sequence, ``(n,)``; infinite where that is
            zero.
        largest_norm: Norm of that token, ``(n,)``.
        largest_at: Its sequence and position, ``(n, 2)``.
        massive: Tokens that are massive there, ``(n,)``.
        born: Of these, those not massive in the hidden state before, ``(n,)``; all of them in the first one.
        died: Tokens massive in the hidden state before and not here, ``(n,)``.
        massive_at: Massive tokens by position, ``(n, T)``.
        channel_mean_abs: Mean of ``|h_c|`` over tokens, ``(n, C)``.
        n_tokens: Unmasked tokens.
        n_sequences: Sequences with an unmasked token.
    """

    layers: tuple[int, ...]
    mean_norm: Array
    rms_norm: Array
    median_norm: Array
    largest_ratio: Array
    largest_norm: Array
    largest_at: Counts
    massive: Counts
    born: Counts
    died: Counts
    massive_at: Counts
    channel_mean_abs: Array
    n_tokens: int
    n_sequences: int


def norm_profile(
    store: str,
    layers: Iterable[int] | None = None,
    reduction: Reduction = HERE,
    *,
    progress: Progress | None = None,
) -> NormProfile:
    """Return norms, massive activations and mean absolute channels of hidden states, by default all stored.

    One read of the store.

    Raises:
        RequestError: If there is no hidden state.
        MismatchError: If a layer is beyond the model.
        StoreError: If a layer is not in the store.
        NumericsError: If a hidden state is not finite, or no token counts.

    Memory: ``8 n (C + T)`` bytes a state and :meth:`NormReducer.reduce`, once for each worker thread.
    """
    chosen = reopen_source(store).completed_layers() if layers is None else layers
    reducer = NormReducer(tuple(sorted(set(chosen))))
    if not reducer.layers:
        msg = f"{store} holds no hidden state completely; finish the capture first"
        raise RequestError(msg)
    state = reduce_whole(store, reducer, reduction, progress=progress, label="norms")
    return reducer.profile(state)
