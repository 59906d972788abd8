"""The layer-major executor: lanes, weight prefetch, hidden-state buffers.

Layer-major means: for each layer, load it once, run every batch of every lane through it, free it. The rooms
above hand in boundary maps and observers; the executor knows neither statistics nor operators.
"""

from __future__ import annotations

from ghoststream.streaming.background import BackgroundObserver
from ghoststream.streaming.batches import Batch, make_batches
from ghoststream.streaming.budget import MemoryBudget, PassMemory
from ghoststream.streaming.executor import PassOptions, StreamedPass
from ghoststream.streaming.lanes import (
    BoundaryMap,
    FittedMap,
    Lane,
    LogitsObserver,
    Observer,
    TappedFit,
    TappedMap,
)
from ghoststream.streaming.replay import Replay
from ghoststream.streaming.skeleton import Skeleton, load_config, parse_dtype
from ghoststream.streaming.states import FileStates, HiddenStates, MemoryStates, StatesFactory
from ghoststream.streaming.taps import TAPS, LayerTaps, MlpProjection, TapPoint, mlp_projection, tap_point

__all__ = [
    "TAPS",
    "BackgroundObserver",
    "Batch",
    "BoundaryMap",
    "FileStates",
    "FittedMap",
    "HiddenStates",
    "Lane",
    "LayerTaps",
    "LogitsObserver",
    "MemoryBudget",
    "MemoryStates",
    "MlpProjection",
    "Observer",
    "PassMemory",
    "PassOptions",
    "Replay",
    "Skeleton",
    "StatesFactory",
    "StreamedPass",
    "TapPoint",
    "TappedFit",
    "TappedMap",
    "load_config",
    "make_batches",
    "mlp_projection",
    "parse_dtype",
    "tap_point",
]
