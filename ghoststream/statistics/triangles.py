"""The QR route to a boundary: triangular factors instead of Grams, for data whose Gram loses what matters.

A Gram squares the condition number: directions of the features whose size is below 1e-8 of the largest drown
in its rounding errors. With ``sqrt(w) Phi = Q R`` (Q orthonormal, never kept) the same least-squares problem
is ``R M = Q^T sqrt(w) D``, at the condition number of the data itself. R factors of parts of the data merge
into that of the whole by another QR (TSQR: Demmel, Grigori, Hoemmen, Langou, arXiv 0808.2664), here by
LAPACK's ``tpqrt``, which knows that they are triangular. What of ``D`` no features explain is orthogonal to
``Q`` and kept as energies per channel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg.lapack import dtpmqrt, dtpqrt

from ghoststream.errors import NumericsError
from ghoststream.statistics.sums import SumState

Array = npt.NDArray[np.float64]

_PANEL = 32
_OWN = ("triangle", "rotated", "unexplained")


def merge_triangles(left: SumState, right: SumState) -> SumState:
    """Return the state over the tokens of both: factors by QR, everything else by addition.

    Neither is changed.

    Raises:
        ArtifactError: If the two do not hold the same names and shapes.
    """
    total = left.copy()
    kept = {name: total.arrays[name].copy() for name in total.arrays if name.endswith(_OWN)}
    total.add_in_place(right)
    total.arrays.update(kept)
    for name in sorted(kept):
        if name.endswith("triangle"):
            prefix = name.removesuffix("triangle")
            own = {part: total.arrays[prefix + part] for part in _OWN}
            factor = np.array(right.arrays[name].T, order="F")
            rotated = np.array(right.arrays[prefix + "rotated"].T, order="F")
            own["unexplained"] += right.arrays[prefix + "unexplained"]
            absorb(own, factor, rotated, triangular=len(factor))
    return total


def absorb(own: dict[str, Array], rows: Array, targets: Array, *, triangular: int) -> None:
    """Bring rows below the factor to zero, in place.

    Args:
        own: The factor ``triangle`` ``(p, p)``, the targets in its basis ``rotated`` ``(p, C)``, and the
            energy ``unexplained`` ``(C,)`` of what no map of the features explains.
        rows: More rows of features ``(n, p)``; column-major, overwritten.
        targets: Their targets ``(n, C)``; column-major, overwritten.
        triangular: 0 for any rows, or their number where they are upper triangular themselves.

    Raises:
        NumericsError: If LAPACK refuses an argument, which is a mistake to be reported.

    Memory: a panel of reflectors, and the coupling of each.
    """
    panel = min(_PANEL, rows.shape[1])
    factor, reflectors, coupling, info = dtpqrt(
        triangular, panel, own["triangle"].T, rows, overwrite_a=1, overwrite_b=1
    )
    if info == 0:
        top, bottom, info = dtpmqrt(
            triangular, reflectors, coupling, own["rotated"].T, targets, side="L", trans="T",
            overwrite_a=1, overwrite_b=1,
        )  # fmt: skip
    if info != 0:
        msg = f"LAPACK refuses argument {-info} of a QR update; report this"
        raise NumericsError(msg)
    own["triangle"][:] = factor.T
    own["rotated"][:] = top.T
    own["unexplained"] += np.einsum("tc,tc->c", bottom, bottom)
