"""Mean cosine and angular distance of all pairs of hidden states, streamed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import BudgetError, NumericsError, RequestError
from ghoststream.options import Reduction
from ghoststream.progress import Progress
from ghoststream.statistics.engines import HERE, default_workers
from ghoststream.statistics.reducers import Reducer
from ghoststream.statistics.similarity import angular_distance, reduce_whole
from ghoststream.statistics.source import HiddenStateSource, reopen_source, require_finite
from ghoststream.statistics.sums import SumState

Array = npt.NDArray[np.float64]

_BLOCK_BYTES = 2**23
_TABLES = ("cosine", "angle", "last_cosine", "last_angle")


@dataclass(frozen=True)
class AllPairsReducer(Reducer):
    """Sums of cosine and angular distance between ``h[a]`` and ``h[b]`` of one token, for all pairs.

    Apart for all tokens and for the last token of each sequence that is not masked. The angular distance is
    ``arccos(cosine) / pi``, 0 to 1 (arXiv 2403.17887, eq. 7). A token whose hidden state is zero counts as
    cosine 0. Products and sums are float64; near zero an angle is then exact to 1e-8.

    Args:
        layers: Hidden states to compare, ascending.
        tile_layers: How many are held at a time, and as many again; None holds all of them, and reads each
            once. With ``k`` tiles, tile ``j`` is read ``j + 1`` times. It may change the last digits of the
            sums.
    """

    layers: tuple[int, ...]
    tile_layers: int | None = None

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {
            "statistic": "all pairs",
            "layers": list(self.layers),
            "tile_layers": self.tile_layers,
            "block_bytes": _BLOCK_BYTES,
        }

    def state_bytes(self, hidden: int, length: int) -> int:
        """Bytes of one state: four tables of ``(n, n)``."""
        del hidden, length
        return 8 * (len(_TABLES) * len(self.layers) ** 2 + 2)

    def task_bytes(self, hidden: int, length: int) -> int:
        """Peak bytes of one task: one state, and what :meth:`reduce` states."""
        tile = min(self.tile_layers or len(self.layers), len(self.layers))
        held = min(2 * tile, len(self.layers)) + 2
        step = min(length, _block_tokens(tile, hidden))
        products = 8 * step * (2 * tile * hidden + 3 * tile**2)
        return self.state_bytes(hidden, length) + 4 * held * length * hidden + products

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Reduce sequences ``[start, stop)``, one at a time.

        Memory: all hidden states of one sequence in float32, ``4 n T C`` bytes (``8 g T C`` with tiles of
        ``g``), one of them once or twice more while it is read, and products of as many tokens as 16 MiB of
        float64 rows hold.

        Raises:
            NumericsError: If a hidden state is NaN or infinite.
        """
        n = len(self.layers)
        total = SumState({name: np.zeros((n, n)) for name in _TABLES})
        total.arrays |= {"tokens": np.zeros(1), "sequences": np.zeros(1)}
        for sequence in range(start, stop):
            self._add_sequence(total, source, sequence)
        return total

    def tables(self, state: SumState) -> PairTables:
        """Return the means.

        Raises:
            NumericsError: If no token counts.
        """
        tokens, sequences = (int(state.arrays[name][0]) for name in ("tokens", "sequences"))
        if tokens == 0:
            msg = "no token of the store counts: its mask is empty; capture again with text in every sequence"
            raise NumericsError(msg)
        counts = {"cosine": tokens, "angle": tokens, "last_cosine": sequences, "last_angle": sequences}
        means = {name: _mirrored(state.arrays[name]) / count for name, count in counts.items()}
        return PairTables(self.layers, **means, n_tokens=tokens, n_sequences=sequences)

    def _add_sequence(self, total: SumState, source: HiddenStateSource, sequence: int) -> None:
        mask = source.mask(sequence, sequence + 1)[0]
        if not mask.any():
            return
        total.arrays["tokens"] += int(mask.sum())
        total.arrays["sequences"] += 1
        tile = self.tile_layers or len(self.layers)
        tiles = [slice(first, first + tile) for first in range(0, len(self.layers), tile)]
        for number, rows in enumerate(tiles):
            left = self._read(source, sequence, mask, rows)
            _add_products(total, (rows, rows), left, left)
            for columns in tiles[number + 1 :]:
                _add_products(total, (rows, columns), left, self._read(source, sequence, mask, columns))

    def _read(
        self, source: HiddenStateSource, sequence: int, mask: npt.NDArray[np.bool_], tile: slice
    ) -> _Tile:
        layers = self.layers[tile]
        rows = np.empty((int(mask.sum()), len(layers), source.hidden), dtype=np.float32)
        for number, layer in enumerate(layers):
            rows[:, number] = source.read_numpy(layer, sequence, sequence + 1, dtype=np.float32)[0][mask]
        energies = np.einsum("tlc,tlc->tl", rows, rows, dtype=np.float64)
        for number, layer in enumerate(layers):
            require_finite(rows[:, number], layer, sequence, sequence + 1, energies[:, number])
        return _Tile(rows, np.sqrt(energies))


@dataclass(frozen=True)
class PairTables:
    """Means over tokens for all pairs of hidden states, each ``(n, n)`` float64 and symmetric.

    Attributes:
        layers: Numbers of the hidden states, in the order of rows and columns.
        cosine: Mean cosine over all tokens.
        angle: Mean angular distance ``arccos(cosine) / pi`` over all tokens.
        last_cosine: Mean cosine over the last unmasked token of each sequence.
        last_angle: Mean angular distance over those.
        n_tokens: Unmasked tokens.
        n_sequences: Sequences with an unmasked token.
    """

    layers: tuple[int, ...]
    cosine: Array
    angle: Array
    last_cosine: Array
    last_angle: Array
    n_tokens: int
    n_sequences: int


@dataclass(frozen=True)
class _Tile:
    """Hidden states of one sequence.

    ``rows`` is ``(tokens, layers, C)`` float32, ``norms`` is ``(tokens, layers)``.
    """

    rows: npt.NDArray[np.float32]
    norms: Array

    def unit_rows(self, first: int, last: int) -> Array:
        """Rows of length one; a zero row stays zero."""
        unit = self.rows[first:last].astype(np.float64)
        norms = self.norms[first:last, :, None]
        np.divide(unit, norms, out=unit, where=norms > 0)
        return unit


def pairwise_similarity(
    store: str,
    layers: Iterable[int] | None = None,
    reduction: Reduction = HERE,
    *,
    progress: Progress | None = None,
) -> PairTables:
    """Return mean cosine and angular distance of all pairs of hidden states, over all and over last tokens.

    Args:
        store: Path or URL of the store.
        layers: Hidden states to compare; all stored ones by default.
        reduction: Where it runs. Where memory is given and all hidden states of one sequence take more, they
            are compared tile by tile, and read more than once; by default each is read once.
        progress: Told how many sequences are done.

    Raises:
        RequestError: If there are fewer than two hidden states.
        BudgetError: If even two hidden states of one sequence take more than the memory that is given.
        MismatchError: If a layer is beyond the model.
        StoreError: If a layer is not in the store.
        NumericsError: If a hidden state is not finite, or no token counts.

    Memory: see :meth:`AllPairsReducer.reduce`, once for each worker thread.
    """
    source = reopen_source(store)
    chosen = tuple(sorted(set(source.completed_layers() if layers is None else layers)))
    if len(chosen) < 2:
        msg = f"there are no pairs of layers to compare in {store}; it needs two hidden states at least"
        raise RequestError(msg)
    reducer, workers = _tiled(AllPairsReducer(chosen), source, reduction)
    reduction = reduction.model_copy(update={"workers": workers})
    state = reduce_whole(store, reducer, reduction, progress=progress)
    return reducer.tables(state)


def _tiled(
    reducer: AllPairsReducer, source: HiddenStateSource, reduction: Reduction
) -> tuple[AllPairsReducer, int | None]:
    """Return tiles of layers that fit the memory, and the tasks at a time.

    Tasks are fewer only if two hidden states did not fit.
    """
    memory, workers = reduction.memory, reduction.workers
    if memory is None:
        return reducer, workers
    n = len(reducer.layers)
    sizes = list(dict.fromkeys([n, *(math.ceil(n / n_tiles) for n_tiles in range(2, n + 1))]))
    tried = [replace(reducer, tile_layers=None if size == n else size) for size in sizes]
    bytes_of = [one.task_bytes(source.hidden, source.length) for one in tried]
    if reduction.scheduler is not None:
        workers = 1
    elif workers is None:
        workers = max(1, min(default_workers(0), memory // bytes_of[-1]))
    for one, n_bytes in zip(tried, bytes_of, strict=True):
        if n_bytes <= memory // workers:
            return one, reduction.workers if reduction.scheduler is not None else workers
    msg = (
        f"two hidden states of one sequence take {bytes_of[-1]:,} bytes a task, {memory // workers:,} are "
        "allowed; give more memory"
    )
    raise BudgetError(msg)


def _block_tokens(tile: int, hidden: int) -> int:
    return max(1, _BLOCK_BYTES // (8 * tile * hidden))


def _add_products(total: SumState, place: tuple[slice, slice], left: _Tile, right: _Tile) -> None:
    n_tokens, n_layers, hidden = left.rows.shape
    for first, last in _blocks(n_tokens, _block_tokens(n_layers, hidden)):
        rows = left.unit_rows(first, last)
        others = rows if right is left else right.unit_rows(first, last)
        cosines = np.clip(rows @ others.transpose(0, 2, 1), -1.0, 1.0)
        angles = angular_distance(cosines)
        total.arrays["cosine"][place] += cosines.sum(axis=0)
        total.arrays["angle"][place] += angles.sum(axis=0)
    total.arrays["last_cosine"][place] += cosines[-1]
    total.arrays["last_angle"][place] += angles[-1]


def _blocks(n_tokens: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, n_tokens, step):
        yield first, min(first + step, n_tokens)


def _mirrored(table: Array) -> Array:
    upper = np.triu(table)
    return upper + np.triu(upper, 1).T
