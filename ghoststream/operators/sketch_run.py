"""The sweeps over a store that find subspaces of the features, and project to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError
from ghoststream.operators.ridge import mean_diagonal
from ghoststream.operators.solver import solve_ridge
from ghoststream.spans import Span
from ghoststream.statistics import (
    DEFAULT_FOLDS,
    BoundaryMoments,
    FoldedMoments,
    ModelFacts,
    Ranges,
    open_source,
)
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.reduction import reduce_spans
from ghoststream.statistics.sketch_projection import ProjectedMoments, ProjectionReducer
from ghoststream.statistics.sketch_range import PowerReducer, RangeReducer
from ghoststream.statistics.sketches import FEATURES, N_PROBES, PROBES, Bases, gaussian

Array = npt.NDArray[np.float64]

_STATISTIC = ("feature", "weights", "block_tokens", "precision", "taps")
_ENGINE = ("range_sequences", "scheduler", "workers", "workdir", "memory", "progress")


@dataclass(frozen=True)
class SketchRun:
    """What all sweeps of a sketch share.

    Attributes:
        store_uri: The store.
        spans: The spans, in order.
        statistic: Arguments of reducers: feature, weights and so on.
        engine: Arguments of :func:`~ghoststream.statistics.reduction.reduce_spans`.
        moments: Arguments of :class:`FoldedMoments`.
        n_features: ``p``.
        n_channels: ``C``.
        n_folds: Folds, at least 1.
    """

    store_uri: str
    spans: tuple[Span, ...]
    statistic: Mapping[str, Any]
    engine: Mapping[str, Any]
    moments: Mapping[str, Any]
    n_features: int
    n_channels: int
    n_folds: int

    @classmethod
    def of(cls, store_uri: str, spans: Iterable[Span], run: Mapping[str, Any]) -> SketchRun:
        """Take apart the arguments of :func:`~ghoststream.statistics.reduce_boundaries`.

        Raises:
            RequestError: If there are no spans, no such feature, or folds and ranges do not fit the store.
        """
        unknown = set(run) - {*_STATISTIC, *_ENGINE, "folds"}
        if unknown:
            msg = f"sketches take no {', '.join(sorted(unknown))}"
            raise TypeError(msg)
        ordered = tuple(sorted(set(spans)))
        if not ordered:
            msg = "there are no spans to reduce; give at least one"
            raise RequestError(msg)
        source = open_source(store_uri)
        statistic = {name: run[name] for name in _STATISTIC if name in run}
        plan = Ranges.make(
            source.n_sequences,
            folds=run.get("folds", DEFAULT_FOLDS),
            range_sequences=run.get("range_sequences"),
        )
        engine = {name: run[name] for name in _ENGINE if name in run}
        feature = statistic.get("feature", "hidden")
        moments = {"feature": feature, "facts": ModelFacts.of(source.fingerprint)}
        return cls(
            store_uri,
            ordered,
            statistic,
            {**engine, "folds": plan.n_folds},
            moments | {name: run[name] for name in ("weights",) if name in run},
            BoundaryReducer(ordered, **statistic).phi.width(source.hidden),
            source.hidden,
            plan.n_folds,
        )

    def keep(self, bases: Mapping[Span, list[Array]]) -> Bases:
        """Put bases where the workers find them."""
        folder = self.engine.get("workdir")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return Bases.make(bases, folder)


def project_by_features(
    run: SketchRun, columns: int, seed: int, power_iterations: int
) -> dict[Span, ProjectedMoments]:
    """Project to a random subspace of ``columns`` dimensions, after some steps of subspace iteration (one sweep each).

    Memory: ``16 p k`` bytes a span, and that of the sweeps.
    """
    start = _orthonormal(gaussian(seed, FEATURES, run.n_features, columns))
    found = dict.fromkeys(run.spans, start)
    for step in range(power_iterations):
        reducer = PowerReducer(run.spans, **run.statistic, bases=run.keep({s: [w] for s, w in found.items()}))
        label = f"power iteration {step + 1} of {power_iterations}"
        states = reduce_spans(run.store_uri, reducer, **run.engine, label=label)
        for span, refs in states.items():
            total = FoldedMoments(span, refs, **run.moments).total()
            found[span] = _orthonormal(total.state.arrays["image"])
    probes = gaussian(seed, PROBES, run.n_features, N_PROBES)
    return _project(run, {span: [np.hstack([basis, probes])] for span, basis in found.items()})


def project_by_range(run: SketchRun, columns: int, seed: int, ratio: float) -> dict[Span, ProjectedMoments]:
    """Project to the range of the best map of a sketched gap: of all tokens and, for each fold, of all others.

    Memory: two Grams and one factor, ``8 p k`` bytes for each span and subspace, and that of the two sweeps.
    """
    reducer = RangeReducer(run.spans, **run.statistic, columns=columns + N_PROBES, seed=seed)
    states = reduce_spans(run.store_uri, reducer, **run.engine, label="range finder")
    bases = {}
    for span, refs in states.items():
        moments = FoldedMoments(span, refs, **run.moments)
        total = moments.total()
        found = []
        for index in range(moments.n_folds if moments.n_folds > 1 else 0):
            part = moments.without(index, total, moments.fold(index))
            found.append(_orthonormal(_range(part, ratio)[:, :columns]))
        image = _range(total, ratio)
        bases[span] = [np.hstack([_orthonormal(image[:, :columns]), image[:, columns:]]), *found]
    return _project(run, bases)


def _project(run: SketchRun, bases: Mapping[Span, list[Array]]) -> dict[Span, ProjectedMoments]:
    kept = run.keep(bases)
    reducer = ProjectionReducer(run.spans, **run.statistic, bases=kept)
    states = reduce_spans(run.store_uri, reducer, **run.engine, label="projected moments")
    return {
        span: ProjectedMoments(span, refs, bases=kept, n_probes=N_PROBES, **run.moments)
        for span, refs in states.items()
    }


def _range(moments: BoundaryMoments, ratio: float) -> Array:
    ridge = ratio * mean_diagonal(moments)
    return solve_ridge(
        np.ascontiguousarray(moments.gram),
        np.ascontiguousarray(moments.cross),
        ridge,
        what=f"boundary {moments.span}",
    ).matrix


def _orthonormal(columns: Array) -> Array:
    basis, _ = np.linalg.qr(columns)
    return basis
