"""Sufficient statistics of boundaries and similarities of layers, reduced from a store in bounded memory."""

from __future__ import annotations

from ghoststream.statistics.boundary import DEFAULT_BLOCK_TOKENS, Precision
from ghoststream.statistics.channel_cosine import ChannelCosineReducer
from ghoststream.statistics.engines import Reducer
from ghoststream.statistics.features import (
    Feature,
    ModelFacts,
    feature_names,
    get_feature,
    register_feature,
    taps_of,
)
from ghoststream.statistics.folds import FoldedMoments
from ghoststream.statistics.moments import BoundaryMoments
from ghoststream.statistics.norms import NormProfile, NormReducer, norm_profile
from ghoststream.statistics.pairs import AllPairsReducer, PairTables, pairwise_similarity
from ghoststream.statistics.ranges import DEFAULT_FOLDS, Ranges
from ghoststream.statistics.reduction import reduce_boundaries
from ghoststream.statistics.rotation import hadamard_factors, hadamard_matrix, rotate
from ghoststream.statistics.similarity import CosineReducer, mean_cosine, reduce_whole
from ghoststream.statistics.source import HiddenStateSource, TapSource, open_source, store_digest
from ghoststream.statistics.sums import SumState
from ghoststream.statistics.sweeps import Sweep, candidate_spans, plan_sweeps
from ghoststream.statistics.weights import (
    UNIFORM,
    BoundaryTokens,
    TokenWeight,
    get_weight,
    register_weight,
    weight_names,
)

__all__ = [
    "DEFAULT_BLOCK_TOKENS",
    "DEFAULT_FOLDS",
    "UNIFORM",
    "AllPairsReducer",
    "BoundaryMoments",
    "BoundaryTokens",
    "ChannelCosineReducer",
    "CosineReducer",
    "Feature",
    "FoldedMoments",
    "HiddenStateSource",
    "ModelFacts",
    "NormProfile",
    "NormReducer",
    "PairTables",
    "Precision",
    "Ranges",
    "Reducer",
    "SumState",
    "Sweep",
    "TapSource",
    "TokenWeight",
    "candidate_spans",
    "feature_names",
    "get_feature",
    "get_weight",
    "hadamard_factors",
    "hadamard_matrix",
    "mean_cosine",
    "norm_profile",
    "open_source",
    "pairwise_similarity",
    "plan_sweeps",
    "reduce_boundaries",
    "reduce_whole",
    "register_feature",
    "register_weight",
    "rotate",
    "store_digest",
    "taps_of",
    "weight_names",
]
