"""Requests of stages in tests, where every option is named by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ghoststream
from ghoststream.operators import OperatorSet
from ghoststream.option_types import Options
from ghoststream.options import Compute, Method, Reduction, Search, Source, Text
from ghoststream.progress import Progress
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from ghoststream.stages.recover import RecoveryReport
from ghoststream.statistics import Ranges

_GROUPS: dict[str, type[Options]] = {
    "search": Search,
    "method": Method,
    "compute": Compute,
    "reduction": Reduction,
}


def in_groups(options: dict[str, Any]) -> dict[str, Any]:
    """Return options by group, as stages take them; what belongs to no group stays as it is."""
    left = dict(options)
    groups = {
        name: group.make({field: left.pop(field) for field in group.model_fields if field in left})
        for name, group in _GROUPS.items()
    }
    return {**left, **{name: group for name, group in groups.items() if group.given()}}


def text_of(calibration: str, options: dict[str, Any]) -> Text:
    """Return a text, whose fields are taken out of the options."""
    fields = [field for field in Text.model_fields if field in options]
    return Text(spec=calibration, **{field: options.pop(field) for field in fields})


def source_of(options: dict[str, Any]) -> Source:
    """Return where hidden states come from; store, model and text are taken out of the options."""
    given: dict[str, Any] = {name: options.pop(name) for name in ("store", "model") if name in options}
    if "calibration" in options:
        given["calibration"] = text_of(options.pop("calibration"), options)
    return Source(**given)


def fit(
    plan: PruningPlan | str | Path, *, out: Path, progress: Progress | None = None, **options: Any
) -> OperatorSet:
    """Fit; options are those of all groups, of :class:`Source` and of :class:`Text`."""
    source = source_of(options)
    return ghoststream.fit(plan, source, out=out, progress=progress, **in_groups(options))


def select(remove: int, *, out: Path | None = None, **options: Any) -> Selection:
    """Select; options are those of all groups, of :class:`Source` and of :class:`Text`."""
    source = source_of(options)
    return ghoststream.select(remove, source, out=out, **in_groups(options))


def recover(model: Path, *, remove: int | str, calibration: str, out: Path, **options: Any) -> RecoveryReport:
    """Recover; options are those of its groups and of :class:`Text`."""
    text = text_of(calibration, options)
    return ghoststream.recover(model, remove=remove, calibration=text, out=out, **in_groups(options))


@contextmanager
def ranges_of(size: int) -> Iterator[None]:
    """Divide sequences into ranges of this size meanwhile; by default there are about four in a fold."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Ranges, "make", partial(Ranges.make, range_sequences=size))
        yield
