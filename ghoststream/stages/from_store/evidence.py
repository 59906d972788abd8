"""What a criterion is handed that reads a store: statistics, residuals of repairs, weights of the model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.errors import RequestError
from ghoststream.files import json_digest, read_kept, read_sealed_json, short_digest, write_sealed_json
from ghoststream.operators import make_operator
from ghoststream.operators.diagnostics import describe
from ghoststream.operators.ridge import mean_diagonal
from ghoststream.operators.solver import solve_ridge
from ghoststream.options import Method, Reduction
from ghoststream.progress import Progress
from ghoststream.selection import Residual
from ghoststream.spans import Span
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import (
    DEFAULT_BLOCK_TOKENS,
    BoundaryMoments,
    FinalNorm,
    FoldedMoments,
    HiddenStateSource,
    Ranges,
    Reducer,
    SumState,
    reduce,
    reduce_whole,
    store_digest,
    texts_in,
)

Opener = Callable[[], ModelSession]
"""Opens the model that a store was captured from, when it is needed, to compute as the capture did."""


class StoreEvidence:
    """A store, the model that it was made of, and a place for partial results.

    See :class:`~ghoststream.selection.Evidence`.

    Args:
        store_uri: Path or URL of the store.
        store: The same, open.
        model: Opens the model that it was made of; None if none was given.
        reduction: Where reductions run, and what they may take.
        work: Folder for partial moments; None for a temporary one.
        progress: Who is told how far it is.
    """

    def __init__(
        self,
        store_uri: str,
        store: HiddenStateSource,
        model: Opener | None,
        reduction: Reduction,
        work: Path | None,
        progress: Progress,
    ) -> None:
        self._uri, self._store, self._model = store_uri, store, model
        self._reduction, self._work, self._progress = reduction, work, progress

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self._store.n_layers

    def reduce(self, reducer: Reducer) -> SumState:
        """Return a statistic over all sequences."""
        return reduce_whole(self._uri, reducer, self._reduction, progress=self._progress)

    def residuals(self, spans: tuple[Span, ...], method: Method, folds: int) -> Mapping[Span, Residual]:
        """Return what a least-squares repair leaves at each span.

        Of ``method`` features, weights and a relative ridge count.

        Memory: what :func:`~ghoststream.statistics.reduce` states, within the budget; then, for one span at a
        time, ``56 C^2`` bytes: its moments, one fold, the total without it, and a solution.
        """
        uri, kind = self._uri, make_operator(method)
        ranges = Ranges.make(self._store.n_sequences, folds=folds, turn=texts_in(self._store))
        with self._work_folder() as work:
            reducer = kind.reducer(spans, hidden=self._store.hidden)
            moments = reduce(uri, reducer, ranges, self._reduction, workdir=work, progress=self._progress)
            self._progress.start("residuals", len(spans), "candidates")
            found = {}
            for span in spans:
                found[span] = self._residual(moments[span], method, folds, work)
                self._progress.advance(1)
            self._progress.finish()
        return found

    def final_norm(self) -> FinalNorm:
        """Return the norm behind the last layer."""
        skeleton = self._session.skeleton
        with skeleton.loaded_frame():
            norm = skeleton.model.get_submodule(skeleton.architecture.final_norm_path)
            return FinalNorm.of(norm, skeleton.n_layers)

    def layer_weights(self, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors of one layer, as they are stored."""
        skeleton = self._session.skeleton
        for name in skeleton.layer_sources(layer):
            yield name, skeleton.reader.read(name)

    @cached_property
    def _session(self) -> ModelSession:
        if self._model is None:
            msg = (
                "this criterion reads the weights of the model; give the checkpoint that the store was made "
                "of (--model)"
            )
            raise RequestError(msg)
        return self._model()

    def _residual(self, moments: FoldedMoments, method: Method, folds: int, work: Path) -> Residual:
        request = {
            "store": store_digest(self._store),
            "method": method.to_json(),
            "folds": folds,
            "block_tokens": DEFAULT_BLOCK_TOKENS,
        }
        name = short_digest(json_digest(request))
        path = work / f"residual-{name}-{moments.span.start}-{moments.span.stop}.json"
        asked = {**request, "span": [moments.span.start, moments.span.stop]}
        kept = read_kept(_read_residual, path)
        if kept is not None and kept[0] == asked:
            return kept[1]
        assert isinstance(method.ridge, float)
        residual = _fit(moments, method.ridge)
        write_sealed_json(path, {"request": asked, "residual": asdict(residual)})
        return residual

    @contextmanager
    def _work_folder(self) -> Iterator[Path]:
        if self._work is None:
            with tempfile.TemporaryDirectory(prefix="ghoststream-") as folder:
                yield Path(folder)
            return
        yield self._work


def _read_residual(path: Path) -> tuple[dict[str, Any], Residual]:
    found = read_sealed_json(path)
    return found["request"], Residual(**found["residual"])


def _fit(moments: FoldedMoments, ridge: float) -> Residual:
    def solve(part: BoundaryMoments) -> npt.NDArray[np.float64]:
        absolute = ridge * mean_diagonal(part)
        matrix: npt.NDArray[np.float64] = solve_ridge(
            part.gram, part.cross, absolute, what=f"boundary {part.span}"
        ).matrix
        return matrix

    def missed(part: BoundaryMoments, matrix: npt.NDArray[np.float64]) -> float:
        return part.linear_residual(matrix)

    _, report = describe(moments, moments.total(), solve, missed)
    inside, outside = report["relative_residual"], report["relative_residual_out_of_sample"]
    # From relative to the gap to relative to the target.
    share = math.sqrt(report["relative_gap_energy"])
    return Residual(
        in_sample=inside * share,
        held_out=None if outside is None else outside * share,
        explained=1.0 - (inside if outside is None else outside) ** 2,
    )
