"""Micro-batches: the groups of sequences that go through a layer together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.errors import NumericsError, RequestError


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch.

    Attributes:
        index: Number of the batch.
        start: Number of its first sequence.
        ids: Token ids, int64, shape ``(n, T)``.
        mask: True at real tokens, bool, shape ``(n, T)``; ``None`` where every token is real.
    """

    index: int
    start: int
    ids: torch.Tensor
    mask: torch.Tensor | None

    @property
    def stop(self) -> int:
        """Number after its last sequence."""
        return self.start + int(self.ids.shape[0])


def make_batches(
    ids: npt.NDArray[np.integer], mask: npt.NDArray[np.bool_] | None, micro_batch: int
) -> tuple[Batch, ...]:
    """Cut ``(S, T)`` token ids into micro-batches of ``micro_batch`` sequences; the last may be smaller.

    Raises:
        RequestError: If ``micro_batch`` is not positive or there are no sequences.
    """
    if micro_batch < 1 or ids.ndim != 2 or ids.shape[0] == 0:
        msg = f"cannot make micro-batches of {micro_batch} from token ids of shape {ids.shape}"
        raise RequestError(msg)
    batches = []
    for index, start in enumerate(range(0, ids.shape[0], micro_batch)):
        part = torch.from_numpy(ids[start : start + micro_batch].astype(np.int64))
        real = None
        if mask is not None and not bool(mask[start : start + micro_batch].all()):
            real = torch.from_numpy(np.ascontiguousarray(mask[start : start + micro_batch]))
        batches.append(Batch(index, start, part, real))
    return tuple(batches)


def states_not_finite(place: str, batch: Batch) -> NumericsError:
    """Return the error about hidden states of a batch that are not finite.

    Args:
        place: Where they are, for messages: ``at position 3``.
        batch: Their batch.
    """
    return NumericsError(
        f"hidden states {place} of sequences [{batch.start},{batch.stop}) are not finite;"
        " use --dtype bfloat16 or float32 (float16 overflows in many models), or check the weights of the"
        " layer before"
    )
