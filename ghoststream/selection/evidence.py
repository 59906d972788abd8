"""What a criterion may look at: the select stage hands it in, and reads only what is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import FinalNorm, Reducer, SumState

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Residual:
    """What a repair leaves at one boundary; sums are over tokens and weighted.

    Attributes:
        in_sample: ``sqrt(sum w |d - phi M|^2 / sum w |y|^2)`` on the tokens of the fit.
        held_out: The same over all folds, each predicted by the fit without it; None with one fold.
        explained: Share of ``sum w |d|^2`` that is explained, held out if there are folds.
    """

    in_sample: float
    held_out: float | None
    explained: float


class Evidence(Protocol):
    """A store, and what belongs to it. Every call may read; nothing is kept between calls."""

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""

    def reduce(self, reducer: Reducer) -> SumState:
        """Return a statistic over all sequences of the store, in one read of the layers that it names.

        Raises:
            StoreError: If a hidden state is not in the store.
            NumericsError: If one is not finite.
        """

    def residuals(self, spans: tuple[Span, ...], method: Method, folds: int) -> Mapping[Span, Residual]:
        """Return what a repair would leave at each of the spans, in as few sweeps as memory allows.

        Args:
            spans: The candidates.
            method: ``least-squares`` at a ridge that is a number, of any features and token weights.
            folds: Folds of whole sequences; 1 for nothing held out.

        Raises:
            RequestError: If the method is another one.
            StoreError: If a hidden state is not in the store.
            NumericsError: If a hidden state or a solution is not finite, or no token counts.
            BudgetError: If the moments of one span do not fit the memory, or all of them the disk.
        """

    def final_norm(self) -> FinalNorm:
        """Return the norm behind the last layer.

        Raises:
            RequestError: If no model was given.
            MismatchError: If the store was made of another checkpoint.
            CheckpointError: If its weights cannot be read.
        """

    def layer_weights(self, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors of one decoder layer in the checkpoint, as they are stored.

        Raises:
            RequestError: If no model was given.
            MismatchError: If the store was made of another checkpoint.
            CheckpointError: If a tensor cannot be read.
        """
