"""Mean cosine or angular distance between hidden states of chosen pairs of layers, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ghoststream.errors import NumericsError, RequestError
from ghoststream.options import Reduction
from ghoststream.progress import Progress
from ghoststream.statistics.engines import HERE, ReductionJob, run_job
from ghoststream.statistics.final_norm import FinalNorm
from ghoststream.statistics.ranges import Ranges
from ghoststream.statistics.reducers import Reducer
from ghoststream.statistics.source import HiddenStateSource, reopen_source, require_finite, require_layers
from ghoststream.statistics.sums import SumState

Pair = tuple[int, int]
Rows = npt.NDArray[np.float32]


Block = tuple[Rows, npt.NDArray[np.float64]]
"""Rows of one hidden state, and the norms by which their products are divided."""


@dataclass(frozen=True)
class PairReducer(Reducer):
    """Sums a comparison of ``h[a]`` and ``h[b]`` for pairs ``(a, b)``; each hidden state is read once.

    Args:
        pairs: The pairs.

    Attributes:
        counted: Name of the state's array that counts what is summed over.
    """

    pairs: tuple[Pair, ...]

    counted: ClassVar[str]

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states that are read."""
        return tuple(sorted({layer for pair in self.pairs for layer in pair}))

    def means(self, state: SumState) -> dict[Pair, float]:
        """Return the mean for every pair.

        Raises:
            NumericsError: If no token counts.
        """
        counted = float(state.arrays[self.counted][0])
        if counted == 0:
            msg = "no token of the store counts: its mask is empty; capture again with text in every sequence"
            raise NumericsError(msg)
        sums = state.arrays["sum"]
        return {pair: float(value / counted) for pair, value in zip(self.pairs, sums, strict=True)}

    def empty(self) -> SumState:
        """Return the state of no sequences."""
        return SumState({"sum": np.zeros(len(self.pairs)), self.counted: np.zeros(1)})

    def live_layers(self) -> int:
        """Return how many hidden states wait for their partner at most."""
        partner = {a: max(max(pair) for pair in self.pairs if a in pair) for a in self.layers}
        return max((sum(a <= b <= partner[a] for a in self.layers) for b in self.layers), default=0)

    def compare(
        self, total: SumState, read: Callable[[int], Block], compared: Callable[[Block, Block], float]
    ) -> None:
        """Add the comparison of every pair; a hidden state is let go behind its last partner."""
        live: dict[int, Block] = {}
        for layer in self.layers:
            live[layer] = read(layer)
            for number, (a, b) in enumerate(self.pairs):
                if max(a, b) == layer:
                    total.arrays["sum"][number] += compared(live[a], live[b])
            waiting = {end for pair in self.pairs if max(pair) > layer for end in pair}
            live = {other: value for other, value in live.items() if other in waiting}


@dataclass(frozen=True)
class CosineReducer(PairReducer):
    """Sums, over tokens, of the cosine between ``h[a]`` and ``h[b]`` for pairs ``(a, b)``.

    A token whose hidden state is zero at either end counts as cosine 0, as in torch's ``cosine_similarity``.
    Blocks are kept as float32, which holds every store dtype exactly; products and sums are float64.

    Args:
        pairs: The pairs.
        block_tokens: Tokens that are read at a time (at least one sequence).
        angles: Whether the angular distance ``arccos(cosine) / pi`` is summed in the cosine's place.
        last_only: Whether only the last unmasked token of each sequence counts.
        final_norm: What ``h[L]`` goes through before it is compared; nothing if ``None``.
    """

    block_tokens: int = 1024
    angles: bool = False
    last_only: bool = False
    final_norm: FinalNorm | None = None

    counted = "tokens"

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {
            "statistic": "angle" if self.angles else "cosine",
            "pairs": [list(pair) for pair in self.pairs],
            "block_tokens": self.block_tokens,
            "last_only": self.last_only,
            **({} if self.final_norm is None else {"final_norm": self.final_norm.digest}),
        }

    def task_bytes(self, hidden: int, length: int) -> int:
        """Peak bytes of one task: the live blocks, and one more while it is read."""
        rows = max(1, self.block_tokens // length) * length
        return (self.live_layers() + 2) * rows * hidden * 4

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Reduce sequences ``[start, stop)``: each layer is read once.

        Memory: as many float32 blocks of ``block_tokens x C`` (at least one sequence) as layers wait for
        their partner: ``n + 2`` for pairs ``(l, l + n)``, all layers for all pairs.

        Raises:
            NumericsError: If a hidden state is NaN or infinite.
        """
        total = self.empty()
        step = max(1, self.block_tokens // source.length)
        for first in range(start, stop, step):
            self._add_block(total, source, first, min(first + step, stop))
        return total

    def _add_block(self, total: SumState, source: HiddenStateSource, first: int, last: int) -> None:
        mask = source.mask(first, last)
        mask = (last_tokens(mask) if self.last_only else mask).reshape(-1)
        total.arrays["tokens"] += int(mask.sum())

        def read(layer: int) -> Block:
            states = source.read_numpy(layer, first, last, dtype=np.float32)
            rows = states.reshape(mask.size, -1)
            rows = rows if mask.all() else rows[mask]
            if self.final_norm is not None and layer == self.final_norm.layer:
                rows = self.final_norm.apply(rows)
            energy = np.einsum("tc,tc->t", rows, rows, dtype=np.float64)
            require_finite(rows, layer, first, last, energy)
            return rows, np.sqrt(energy)

        def compared(left: Block, right: Block) -> float:
            cosines = _cosines(left, right)
            return float((angular_distance(cosines) if self.angles else cosines).sum())

        self.compare(total, read, compared)


def mean_cosine(
    store: str,
    pairs: Iterable[Pair] | None = None,
    reduction: Reduction = HERE,
    *,
    progress: Progress | None = None,
) -> dict[Pair, float]:
    """Return the mean over tokens of ``cos(h[a], h[b])`` for pairs of layers (all stored ones by default).

    Raises:
        RequestError: If there are no pairs.
        MismatchError: If a layer is beyond the model.
        StoreError: If a layer is not in the store.
        NumericsError: If a hidden state is not finite, or no token counts.

    Memory: see :meth:`CosineReducer.reduce`, once for each worker thread.
    """
    if pairs is None:
        pairs = combinations(reopen_source(store).completed_layers(), 2)
    reducer = CosineReducer(tuple(dict.fromkeys(pairs)))
    if not reducer.pairs:
        msg = f"there are no pairs of layers to compare in {store}; it needs two hidden states at least"
        raise RequestError(msg)
    return reducer.means(reduce_whole(store, reducer, reduction, progress=progress))


def reduce_whole(
    store: str,
    reducer: Reducer,
    reduction: Reduction = HERE,
    *,
    progress: Progress | None = None,
    label: str = "similarity",
) -> SumState:
    """Reduce all sequences of a store by a statistic whose state is small, sequence by sequence, in memory.

    ``label`` names the work for ``progress``.

    Raises:
        MismatchError: If a layer is beyond the model.
        StoreError: If a layer is not in the store.
        NumericsError: If a hidden state is not finite.
    """
    source = reopen_source(store)
    require_layers(source, reducer.layers, store)
    ranges = Ranges.make(source.n_sequences, folds=1, range_sequences=1)
    (state,) = run_job(ReductionJob(store, reducer, ranges), reduction, progress=progress, label=label)
    if not isinstance(state, SumState):
        msg = "a job without a folder must keep its states in memory"
        raise TypeError(msg)
    return state


def angular_distance(cosines: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ``arccos(c) / pi``, 0 to 1; cosines that rounding has put beyond one count as one."""
    distances: npt.NDArray[np.float64] = np.arccos(np.clip(cosines, -1.0, 1.0)) / np.pi
    return distances


def last_tokens(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the mask ``(S, T)`` of the last token of each sequence that ``mask`` ``(S, T)`` lets through."""
    later = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    last: npt.NDArray[np.bool_] = mask & (later == 1)
    return last


def _cosines(left: Block, right: Block) -> npt.NDArray[np.float64]:
    dots = np.einsum("tc,tc->t", left[0], right[0], dtype=np.float64)
    norms = left[1] * right[1]
    cosines: npt.NDArray[np.float64] = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return cosines
