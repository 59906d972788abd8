"""The layer-major executor: lanes, weight prefetch, hidden-state buffers.

The loop is written out on top of :mod:`ghoststream.streaming.executor`. The rooms above hand in boundary maps
and observers; the executor knows neither statistics nor operators.
"""

from __future__ import annotations

from ghoststream.streaming.background import BackgroundObserver
from ghoststream.streaming.batches import Batch, make_batches
from ghoststream.streaming.boundary_map import CUT, BoundaryMap, ModuleMap, Pairs
from ghoststream.streaming.budget import MemoryBudget, PassMemory
from ghoststream.streaming.executor import PassOptions, StreamedPass
from ghoststream.streaming.lanes import Lane, LogitsObserver, Observer
from ghoststream.streaming.replaced import ReplacedWeights, weight_places
from ghoststream.streaming.replay import Replay
from ghoststream.streaming.runs import Runs
from ghoststream.streaming.skeleton import Skeleton, load_config, parse_dtype
from ghoststream.streaming.states import FileStates, HiddenStates, MemoryStates, StatesFactory
from ghoststream.streaming.taps import (
    TAPS,
    LayerTaps,
    SublayerProjection,
    TapPoint,
    attention_projection,
    mlp_projection,
    tap_point,
)

__all__ = [
    "CUT",
    "TAPS",
    "BackgroundObserver",
    "Batch",
    "BoundaryMap",
    "FileStates",
    "HiddenStates",
    "Lane",
    "LayerTaps",
    "LogitsObserver",
    "MemoryBudget",
    "MemoryStates",
    "ModuleMap",
    "Observer",
    "Pairs",
    "PassMemory",
    "PassOptions",
    "ReplacedWeights",
    "Replay",
    "Runs",
    "Skeleton",
    "StatesFactory",
    "StreamedPass",
    "SublayerProjection",
    "TapPoint",
    "attention_projection",
    "load_config",
    "make_batches",
    "mlp_projection",
    "parse_dtype",
    "tap_point",
    "weight_places",
]
