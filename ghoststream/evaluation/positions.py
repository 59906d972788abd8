"""A sample of the positions of a text: where losses are taken, if not of every token."""

from __future__ import annotations

import math

import torch

from ghoststream.evaluation.losses import IGNORED, next_tokens
from ghoststream.streaming import Batch

_GOLDEN = (math.sqrt(5) - 1) / 2


class SampledPositions:
    """The ``scored`` of lanes that are compared by a share of the predictions of each window.

    They are spread evenly over the window, and begin elsewhere in each. All lanes have the same, so that the
    errors of differences between lanes are those of pairs. The standard error over windows is right as it
    is: a window's loss on its sample differs from that on all of it by an error of its own.

    Args:
        share: The share, above 0; of ``n`` predictions ``ceil(share n)``.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the flattened tokens of a batch whose logits are wanted, int64 ``(k,)``, in order."""
        n, length = batch.ids.shape
        predicts = (next_tokens(batch) != IGNORED).view(n, length)
        found = []
        for row, mask in enumerate(predicts):
            places = mask.nonzero()[:, 0]
            count = min(len(places), math.ceil(self._share * len(places)))
            # Multiples of the golden ratio are spread evenly, however many windows there are.
            begin = (batch.start + row + 1) * _GOLDEN % 1.0
            steps = (torch.arange(count, dtype=torch.float64) + begin) * (len(places) / max(1, count))
            found.append(row * length + places[steps.long()])
        return torch.cat(found)
