"""Sufficient statistics of boundaries and similarities of layers, reduced from a store in bounded memory."""

from __future__ import annotations

from ghoststream.options import UNIFORM, Precision
from ghoststream.statistics.boundary import DEFAULT_BLOCK_TOKENS, BoundaryReducer, MomentSpec
from ghoststream.statistics.channel_cosine import ChannelCosineReducer
from ghoststream.statistics.engines import HERE
from ghoststream.statistics.features import (
    Feature,
    ModelFacts,
    feature_names,
    get_feature,
    register_feature,
    taps_of,
)
from ghoststream.statistics.final_norm import FinalNorm
from ghoststream.statistics.folds import FoldedMoments
from ghoststream.statistics.moments import BoundaryMoments
from ghoststream.statistics.norms import NormProfile, NormReducer, norm_profile
from ghoststream.statistics.pairs import AllPairsReducer, PairTables, pairwise_similarity
from ghoststream.statistics.ranges import DEFAULT_FOLDS, Ranges
from ghoststream.statistics.reducers import Reducer
from ghoststream.statistics.reduction import reduce, store_ranges
from ghoststream.statistics.rotation import hadamard_factors, hadamard_matrix, rotate
from ghoststream.statistics.similarity import CosineReducer, mean_cosine, reduce_whole
from ghoststream.statistics.source import (
    BASE_TENSORS,
    HiddenStateSource,
    TapSource,
    base_of,
    open_source,
    store_digest,
    texts_in,
)
from ghoststream.statistics.sums import SumState
from ghoststream.statistics.sweeps import Sweep, budgeted, candidate_spans, divide_sweeps
from ghoststream.statistics.token_weights import (
    BoundaryTokens,
    TokenWeight,
    get_token_weight,
    register_token_weight,
    token_weight_names,
)

__all__ = [
    "BASE_TENSORS",
    "DEFAULT_BLOCK_TOKENS",
    "DEFAULT_FOLDS",
    "HERE",
    "UNIFORM",
    "AllPairsReducer",
    "BoundaryMoments",
    "BoundaryReducer",
    "BoundaryTokens",
    "ChannelCosineReducer",
    "CosineReducer",
    "Feature",
    "FinalNorm",
    "FoldedMoments",
    "HiddenStateSource",
    "ModelFacts",
    "MomentSpec",
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
    "base_of",
    "budgeted",
    "candidate_spans",
    "divide_sweeps",
    "feature_names",
    "get_feature",
    "get_token_weight",
    "hadamard_factors",
    "hadamard_matrix",
    "mean_cosine",
    "norm_profile",
    "open_source",
    "pairwise_similarity",
    "reduce",
    "reduce_whole",
    "register_feature",
    "register_token_weight",
    "rotate",
    "store_digest",
    "store_ranges",
    "taps_of",
    "texts_in",
    "token_weight_names",
]
