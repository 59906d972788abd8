"""ReplaceMe's cosine distance (arXiv 2505.02819): the same map, found by Adam."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ghoststream.costs import Cost, FitShape
from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import held_fold, report, require_tokens
from ghoststream.operators.kind import linear_cost
from ghoststream.operators.registry import register_operator
from ghoststream.operators.replace_me import ReplaceMeKind
from ghoststream.options import Reduction
from ghoststream.progress import Progress
from ghoststream.spans import Span
from ghoststream.statistics import HERE, BoundaryReducer, FoldedMoments, Ranges
from ghoststream.statistics.source import Taps
from ghoststream.statistics.token_rows import BoundaryRows, Rows

if TYPE_CHECKING:
    import torch

EPOCHS = 10
LEARNING_RATE = 1e-4
BATCH_TOKENS = 1024
"""Of the published code, as the start ``T = I``."""


class RowMoments(FoldedMoments):
    """Moments of one boundary, and where its tokens are.

    Attributes:
        rows: Reads the tokens.
    """

    def __init__(self, moments: FoldedMoments, rows: BoundaryRows) -> None:
        super().__init__(
            moments.span,
            moments.states,
            feature=moments.feature,
            token_weights=moments.token_weights,
            facts=moments.facts,
        )
        self.rows = rows


class Compared(NamedTuple):
    """Tokens whose ``base + features A`` is compared with ``targets``; ``(n, C)``, weights ``(n,)``."""

    base: torch.Tensor
    features: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, *arrays: npt.NDArray[np.float64]) -> Compared:
        """Return arrays as tensors that share their memory."""
        import torch

        return cls(*map(torch.from_numpy, arrays))


@register_operator("replace-me-cosine")
class ReplaceMeCosine(ReplaceMeKind):
    """``min mean(1 - cos(M T, h[stop] - Y))`` over ``T``.

    ``M`` and ``Y`` are those of :class:`~ghoststream.operators.replace_me.ReplaceMe`. Adam from ``T = I`` at
    rate 1e-4, 10 epochs over batches of about 1,024 tokens: sequences in an order that is drawn anew each
    epoch, read from the stores, in float32. Tokens count by their weights (uniform in the paper). The
    published code compares single tokens drawn from all sequences
    (:mod:`ghoststream.operators.replace_me_published`); whole sequences are what a store can be read by.

    Diagnostics beside those of least squares: ``cosine_distance``, the weighted mean of ``1 - cos`` over all
    tokens, and out of sample ``cosine_distance_out_of_sample`` and ``relative_residual_out_of_sample``, those
    of a second fit without fold 0 on fold 0.

    Memory: moments of the features, ``16 C^2`` bytes of the map, its gradient and Adam's two means, and
    ``40 C`` bytes for each token of a batch.
    """

    takes = ("features", "seed")
    needs_store = True
    whole = False
    """Whether ``h[stop]`` itself is compared."""

    def reducer(
        self, spans: tuple[Span, ...], *, hidden: int, taps: Taps | None = None, device: str | None = None
    ) -> BoundaryReducer:
        """Return what builds Grams, by which residuals are reported.

        On the host, where the tokens are read too.
        """
        del device
        return super().reducer(spans, hidden=hidden, taps=taps)

    def reduce(
        self,
        store: str,
        spans: Iterable[Span],
        ranges: Ranges,
        reduction: Reduction = HERE,
        *,
        taps: Taps | None = None,
        device: str | None = None,
        workdir: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[Span, FoldedMoments]:
        """Reduce the boundaries, and note where the tokens are."""
        moments = super().reduce(
            store, spans, ranges, reduction, taps=taps, workdir=workdir, progress=progress
        )
        return {
            span: RowMoments(
                found, BoundaryRows(store, BoundaryReducer((span,), self.spec, taps=taps), ranges)
            )
            for span, found in moments.items()
        }

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Search one boundary.

        Raises:
            RequestError: If the moments do not say where the tokens are.
            NumericsError: If the search diverges, or fold 0 is empty.
        """
        if not isinstance(moments, RowMoments):
            msg = (
                f"the operator {self.method.operator} reads the tokens of {moments.span} themselves; reduce "
                "with it"
            )
            raise RequestError(msg)
        total, rows = moments.total(), moments.rows
        require_tokens(total)
        matrix = self._search(rows, rows.sequences())
        diagnostics = report(moments, total, total.linear_residual(matrix), None)
        diagnostics |= {
            "cosine_distance": self.distance(rows, rows.sequences(), matrix),
            "epochs": EPOCHS,
            "learning_rate": LEARNING_RATE,
            "batch_tokens": BATCH_TOKENS,
            "seed": self.method.seed,
        }
        if moments.n_folds > 1:
            diagnostics |= self._held_out(moments)
        weight: npt.NDArray[np.float32] = np.ascontiguousarray(matrix.T, dtype=np.float32)
        return BoundaryOperator(moments.span, "linear", moments.feature, weight, None, diagnostics)

    def distance(
        self, rows: BoundaryRows, sequences: npt.NDArray[np.int64], matrix: npt.NDArray[np.float64]
    ) -> float:
        """Return the weighted mean of ``1 - cos`` over some sequences for ``A = T - I``."""
        import torch

        change = torch.from_numpy(matrix)
        lost, weight = 0.0, 0.0
        for number in sequences:
            part = rows.read(int(number))
            lost += float(_lost(self._compared(part), change))
            weight += float(part.weights.sum())
        return lost / weight

    def cost(self, shape: FitShape) -> Cost:
        """Return that of least squares, and of ten epochs over all tokens, twice."""
        return linear_cost(shape, square=24, solutions=1, n_cubes=0, tokens=80.0)

    def _held_out(self, moments: RowMoments) -> dict[str, float]:
        rows, held = moments.rows, held_fold(moments, 0)
        matrix = self._search(rows, rows.sequences(without=0))
        gap = float(held.gap_energy.sum())
        residual = held.linear_residual(matrix)
        return {
            "cosine_distance_out_of_sample": self.distance(rows, rows.in_fold(0), matrix),
            "relative_residual_out_of_sample": float(np.sqrt(residual / gap)) if gap > 0 else 0.0,
            "r2_out_of_sample": 1.0 - residual / held.gap_variation if held.gap_variation > 0 else 0.0,
        }

    def _search(self, rows: BoundaryRows, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return ``A = T - I``, ``(C, C)`` float64."""
        import torch

        size = rows.read(int(sequences[0])).inputs.shape[1]
        change = torch.zeros(size, size, requires_grad=True)
        adam = torch.optim.Adam([change], lr=LEARNING_RATE)
        for epoch in self._epochs(rows, sequences):
            for part in epoch:
                adam.zero_grad()
                (_lost(part, change) / float(part.weights.sum())).backward()
                adam.step()
        found: npt.NDArray[np.float64] = change.detach().double().numpy()
        if not np.isfinite(found).all():
            msg = f"the search of {self.method.operator} at {rows.span} diverged; use replace-me-ls"
            raise NumericsError(msg)
        return found

    def _epochs(self, rows: BoundaryRows, sequences: npt.NDArray[np.int64]) -> Iterator[Iterable[Compared]]:
        """Yield the batches of each epoch: sequences in an order that is drawn anew."""
        order = np.random.default_rng(self.method.seed)
        for _ in range(EPOCHS):
            yield map(self._compared, _batches(rows, order.permutation(sequences)))

    def _compared(self, part: Rows) -> Compared:
        """Return what is compared of some tokens."""
        if self.whole:
            return Compared.of(part.inputs, part.features, part.targets, part.weights)
        targets = part.targets - part.inputs + part.features
        return Compared.of(part.features, part.features, targets, part.weights)


@register_operator("replace-me-cosine-whole")
class ReplaceMeCosineWhole(ReplaceMeCosine):
    """``min mean(1 - cos(Y + M T, h[stop]))``.

    This is the objective of the paper's equation 4 (``accurate`` in the published code).
    """

    whole = True


def _lost(part: Compared, change: torch.Tensor) -> torch.Tensor:
    """Return ``sum w (1 - cos)`` over some tokens."""
    import torch

    base, features, targets, weights = (tensor.to(change.dtype) for tensor in part)
    cosine = torch.nn.functional.cosine_similarity(base + features @ change, targets, dim=1)
    return (weights * (1.0 - cosine)).sum()


def _batches(rows: BoundaryRows, sequences: npt.NDArray[np.int64]) -> Iterator[Rows]:
    """Yield batches of :data:`BATCH_TOKENS` tokens, the last one smaller, in the order of the sequences."""
    waiting: Rows | None = None
    for number in sequences:
        part = rows.read(int(number))
        waiting = part if waiting is None else waiting.join(part)
        while len(waiting.weights) >= BATCH_TOKENS:
            yield waiting.cut(0, BATCH_TOKENS)
            waiting = waiting.cut(BATCH_TOKENS, len(waiting.weights))
    if waiting is not None and len(waiting.weights):
        yield waiting
