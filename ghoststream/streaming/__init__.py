"""The layer-major executor: lanes, weight prefetch, hidden-state buffers.

Layer-major means: for each layer, load it once, run every batch of every lane through it, free it. The rooms
above hand in boundary maps and observers; the executor knows neither statistics nor operators.
"""

from __future__ import annotations

from ghoststream.streaming.batches import Batch, make_batches
from ghoststream.streaming.executor import PassOptions, StreamedPass
from ghoststream.streaming.lanes import BoundaryMap, FittedMap, Lane, LogitsObserver, Observer
from ghoststream.streaming.skeleton import Skeleton, load_config, parse_dtype
from ghoststream.streaming.states import FileStates, HiddenStates, MemoryStates, StatesFactory

__all__ = [
    "Batch",
    "BoundaryMap",
    "FileStates",
    "FittedMap",
    "HiddenStates",
    "Lane",
    "LogitsObserver",
    "MemoryStates",
    "Observer",
    "PassOptions",
    "Skeleton",
    "StatesFactory",
    "StreamedPass",
    "load_config",
    "make_batches",
    "parse_dtype",
]
