"""The magnitude compensation of Prune&Comp (Chen et al., arXiv 2507.18212): one scale for all channels."""

from __future__ import annotations

import numpy as np

from ghoststream.operators.linear_patch import Array, LinearPatchDiagonal
from ghoststream.operators.registry import register_operator
from ghoststream.statistics import BoundaryMoments


@register_operator("prune-and-comp")
class PruneAndComp(LinearPatchDiagonal):
    """``y = a x``, ``a`` the mean over channels and sequences of ``mean_t |y_tk| / mean_t |x_tk|``.

    As in its official code, which multiplies the embedding and the last linear map of attention and MLP
    before the cut by ``a``. Where all that reads the residual stream there is normed, that is this map but
    for the norms' epsilon.

    Memory: ``O(C + T)``.
    """

    def change(self, moments: BoundaryMoments) -> Array:
        """Return ``a - 1`` for each channel, ``(C,)``."""
        scales = super().change(moments)
        return np.full_like(scales, scales.mean())
