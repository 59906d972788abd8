"""The moments of a fit whose states come by once, in a pass with the dense lane as the target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.operators import OperatorKind
from ghoststream.spans import Span
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import FoldedMoments, ModelFacts, Ranges
from ghoststream.statistics.streamed import StreamedTaps, streamed_moments
from ghoststream.streaming import Pairs

DENSE = "dense"
"""Name of the lane that every fit takes its targets from."""


def moments_of(
    kind: OperatorKind,
    span: Span,
    pairs: Pairs,
    ranges: Ranges,
    mask: npt.NDArray[np.bool_],
    session: ModelSession,
    taps: StreamedTaps | None,
) -> FoldedMoments:
    """Reduce the pairs of the sequences that serve to fit to what an operator reads.

    Args:
        kind: The operator.
        span: The span; of the layer before it are the taps.
        pairs: The states, with taps behind them where there are any.
        ranges: How sequences are divided; the first ``ranges.n_sequences`` serve to fit.
        mask: True at tokens that count, bool ``(S, T)``.
        session: The model.
        taps: The taps that the operator reads, if it does.

    Raises:
        NumericsError: If a state is not finite.

    Memory: what :func:`~ghoststream.statistics.streamed.streamed_moments` states.
    """
    skeleton = session.skeleton
    return streamed_moments(
        kind.reducer((span,), hidden=skeleton.hidden_size, taps=taps),
        ranges,
        _fitting(pairs, ranges.n_sequences),
        mask=mask,
        facts=ModelFacts(session.norm_epsilon),
        n_layers=skeleton.n_layers,
        taps=taps,
        # Where the memory is given, a pass counts one task.
        workers=None if session.compute.host_memory is None else 1,
    )


def _fitting(pairs: Pairs, n_sequences: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    for batch, inputs, targets in pairs:
        n = min(batch.stop, n_sequences) - batch.start
        if n > 0:
            yield _rows(inputs[:n]), _rows(targets[:n])


def _rows(states: torch.Tensor) -> npt.NDArray[Any]:
    # Exact: float32 holds every bfloat16 and float16.
    rows: npt.NDArray[Any] = states.float().cpu().numpy()
    return rows
