"""What each kind of artifact says of the model that it was made of: digests of its tensors.

What reads one kind is imported there: no kind waits for the libraries of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghoststream.files import read_json
from ghoststream.recovery.names import PROVENANCE_NAME

Base = Mapping[str, Any]
"""``tensors``, their digests by name, and ``config``, the digest of the configuration; empty if unknown."""


def base_of_store(path: str) -> Base:
    """Return what a store was captured from."""
    from ghoststream.activations import ActivationStore
    from ghoststream.statistics import base_of

    return base_of(ActivationStore.open(path))


def base_of_operators(path: str) -> Base:
    """Return what operators were fitted on."""
    from ghoststream.operators import OperatorSet

    return dict(OperatorSet.load(path).metadata.get("base") or {})


def base_of_plan(path: str) -> Base:
    """Return what layers were chosen of."""
    from ghoststream.selection import Selection

    return Selection.load(Path(path)).base


def base_of_exploration(path: str) -> Base:
    """Return what was explored."""
    from ghoststream.stages.exploring.report import ExplorationReport

    return ExplorationReport.load(Path(path)).base


def base_of_export(path: str) -> Base:
    """Return what a folder in any form of a recovered model was written from."""
    found = read_json(Path(path) / PROVENANCE_NAME)
    base = found.get("base") if isinstance(found, Mapping) else None
    return base if isinstance(base, Mapping) else {}
