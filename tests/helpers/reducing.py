"""Reducing a store in tests, where every setting is named by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from ghoststream.operators import OperatorKind
from ghoststream.options import Reduction
from ghoststream.spans import Span
from ghoststream.statistics import (
    BoundaryReducer,
    FoldedMoments,
    MomentSpec,
    reduce,
    store_ranges,
)

_SPEC = tuple(field.name for field in fields(MomentSpec))


def reducer_of(
    spans: Iterable[Span], kind: type[BoundaryReducer] = BoundaryReducer, **options: Any
) -> BoundaryReducer:
    """Return a reducer; fields of its spec are named beside its own."""
    spec = {name: options.pop(name) for name in _SPEC if name in options}
    return kind(tuple(spans), MomentSpec(**spec), **options)


def moments_of(
    store: str, spans: Iterable[Span], kind: type[BoundaryReducer] = BoundaryReducer, **options: Any
) -> dict[Span, FoldedMoments]:
    """Reduce a store; options are those of ranges, of :class:`Reduction`, of ``reduce`` and of the
    reducer."""
    given = {name: options.pop(name) for name in ("folds", "range_sequences") if name in options}
    place = {name: options.pop(name) for name in Reduction.model_fields if name in options}
    run = {name: options.pop(name) for name in ("workdir", "progress", "label") if name in options}
    reducer = reducer_of(spans, kind, **options)
    return reduce(store, reducer, store_ranges(store, **given), Reduction.make(place), **run)


def reduced_by(
    kind: OperatorKind, store: str, spans: Iterable[Span], taps: Any = None, **options: Any
) -> dict[Span, FoldedMoments]:
    """Reduce a store by what an operator kind reads; options are those of ranges, :class:`Reduction` and
    ``reduce``."""
    given = {name: options.pop(name) for name in ("folds", "range_sequences") if name in options}
    place = {name: options.pop(name) for name in Reduction.model_fields if name in options}
    return kind.reduce(
        store, spans, store_ranges(store, **given), Reduction.make(place), taps=taps, **options
    )
