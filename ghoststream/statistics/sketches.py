"""What sketches of a boundary problem share: seeded random numbers, and bases that travel with tasks.

All random numbers come from numpy's default generator, seeded by the seed of the recipe, a purpose and, where
they belong to tokens, the number of the sequence: never by range, worker or block, so that sketches of parts
of the data add up to that of the whole, and every engine gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError
from ghoststream.files import json_digest, read_kept, short_digest
from ghoststream.files.tensor_files import TensorFile, array_digest, require_whole
from ghoststream.spans import Span
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.engines import StateRef
from ghoststream.statistics.moments import span_prefix
from ghoststream.statistics.sums import SumState

Array = npt.NDArray[np.float64]

N_PROBES = 10
"""Random vectors that an error estimate takes. The estimate is unbiased; its relative standard deviation is
at most ``sqrt(2 / 10)``, for an error that lies all in one direction."""

GAP, FEATURES, PROBES = 11, 12, 13
"""Purposes of :func:`gaussian`: a sketch of the gap, of the features, and probes of an error."""


@lru_cache(maxsize=4)
def gaussian(seed: int, purpose: int, rows: int, columns: int) -> Array:
    """Return a standard normal matrix ``(rows, columns)``, read-only; always the same for the same arguments.

    Memory: it is kept, as are three others.
    """
    drawn = np.random.default_rng((seed, purpose)).standard_normal((rows, columns))
    drawn.flags.writeable = False
    return drawn


def require_float64(precision: str) -> None:
    """Check the precision that a sketch is asked to be built in.

    Raises:
        RequestError: If it is not float64.
    """
    if precision != "float64":
        msg = f"sketches are built in float64, not {precision}; leave one of the two options out"
        raise RequestError(msg)


@dataclass(frozen=True)
class Bases:
    """Bases of subspaces of the features, some for each span, in memory or in a file that workers read.

    Attributes:
        ref: The arrays, or their file.
        digest: Digest of the arrays.
        widths: Columns of the bases of a span, in order; the same for every span.
    """

    ref: StateRef = field(compare=False, repr=False)
    digest: str
    widths: tuple[int, ...]

    @classmethod
    def make(cls, bases: Mapping[Span, Sequence[Array]], folder: Path | None) -> Bases:
        """Keep bases ``(p, k)``, as a file in ``folder`` if one is given (workers must see it).

        Raises:
            DiskFullError: If no space is left.
        """
        arrays = {
            _name(span, number): np.ascontiguousarray(basis)
            for span, found in bases.items()
            for number, basis in enumerate(found)
        }
        state = SumState(arrays)
        digests = {name: array_digest(array) for name, array in arrays.items()}
        digest = json_digest(digests)
        widths = tuple(basis.shape[1] for basis in next(iter(bases.values())))
        if folder is None:
            return cls(state, digest, widths)
        path = folder / f"bases-{short_digest(digest)}.safetensors"
        if read_kept(_digests_of, path) != digests:
            state.save(path, {"encoding-type": "ghoststream-bases", "encoding-version": "1.1"})
        return cls(path, digest, widths)

    def load(self, span: Span) -> tuple[Array, ...]:
        """Return the bases of a span, ``(p, k)`` each; do not change them."""
        names = [_name(span, number) for number in range(len(self.widths))]
        state = SumState.load(self.ref, prefixes=tuple(names)) if isinstance(self.ref, Path) else self.ref
        return tuple(state.arrays[name] for name in names)


def _digests_of(path: Path) -> dict[str, str]:
    with TensorFile(require_whole(path)) as file:
        return file.digests


@dataclass(frozen=True, kw_only=True)
class BasisReducer(BoundaryReducer):
    """A reduction that projects features on given bases ``W`` ``(p, k)`` of each span.

    Args:
        bases: The bases.

    Raises:
        RequestError: If there is no feature or weight of this name, or the precision is not float64.
    """

    bases: Bases

    def __post_init__(self) -> None:
        super().__post_init__()
        require_float64(self.spec.precision)

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {**super().describe(), "bases": self.bases.digest, "widths": list(self.bases.widths)}

    def task_bytes(self, hidden: int, length: int) -> int:
        """Peak bytes of one task: the state, the bases of one span, and the blocks of :meth:`reduce`."""
        held = 8 * self._phi.width(hidden) * sum(self.bases.widths)
        if not isinstance(self.bases.ref, Path):
            held *= len(self.spans)
        return super().task_bytes(hidden, length) + held

    def _blocks(self, hidden: int) -> float:
        return super()._blocks(hidden) + max(self.bases.widths) / hidden


def _name(span: Span, number: int) -> str:
    return f"{span_prefix(span)}basis/{number}/"
