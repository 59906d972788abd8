"""Sufficient statistics of boundaries and similarities of layers, reduced from a store in bounded memory."""

from __future__ import annotations

from ghoststream.statistics.boundary import DEFAULT_BLOCK_TOKENS
from ghoststream.statistics.engines import Reducer
from ghoststream.statistics.features import Feature, get_feature, register_feature
from ghoststream.statistics.moments import BoundaryMoments, FoldedMoments
from ghoststream.statistics.ranges import DEFAULT_FOLDS, RangePlan
from ghoststream.statistics.reduction import reduce_boundaries
from ghoststream.statistics.similarity import CosineReducer, mean_cosine, reduce_whole
from ghoststream.statistics.source import HiddenStateSource, open_source, store_digest
from ghoststream.statistics.sums import SumState

__all__ = [
    "DEFAULT_BLOCK_TOKENS",
    "DEFAULT_FOLDS",
    "BoundaryMoments",
    "CosineReducer",
    "Feature",
    "FoldedMoments",
    "HiddenStateSource",
    "RangePlan",
    "Reducer",
    "SumState",
    "get_feature",
    "mean_cosine",
    "open_source",
    "reduce_boundaries",
    "reduce_whole",
    "register_feature",
    "store_digest",
]
