"""The run of layers that a least-squares repair explains best, by one sweep over all candidates."""

from __future__ import annotations

from ghoststream.costs import Cost, Need, Repairs, SelectionShape
from ghoststream.errors import NumericsError
from ghoststream.options import Method
from ghoststream.selection.evidence import Evidence, Residual
from ghoststream.selection.registry import Choice, Criterion, register_criterion, require_count
from ghoststream.statistics import DEFAULT_BLOCK_TOKENS, DEFAULT_FOLDS, candidate_spans

REPAIR = Method(operator="least-squares", token_weights="drop_sinks", ridge=1e-4)
"""What is fitted at every candidate."""

_RANGES_A_FOLD = 4


class RepairResidual(Criterion):
    """``argmin_l sqrt(sum w |d - phi(x) M|^2 / sum w |y|^2)``, ``x = h[l]``, ``y = h[l + n]``, ``d = y - x``.

    ``M`` is fitted at every candidate ``1 <= l <= L - n - 1`` (first and last layer are kept): ``phi`` is
    ``hidden``, the ridge ``1e-4 trace(G) / C``, the token weights ``drop_sinks``. The score is what is left
    when the repaired state enters the next layer, relative to that state. Every other criterion asks what
    hurts unrepaired; this one what a linear map cannot repair. It is not the share of the gap that is left
    unexplained, which is small where the gap is large, and chose badly where both were measured
    (``docs/selection.md``); that share is in the details. Scores at different depths are not of the same
    harm, so it ranks spans only roughly: measure the best few.

    Cost: one read of the store; per candidate ``3 C^2`` FLOPs a token and (folds + 1) solves of
    ``7 C^3 / 3``, all float64. ``16 C^2`` bytes a candidate while reducing (what does not fit the memory
    takes another sweep over the store), four times as much for each of the 4 folds on disk, and ``56 C^2``
    while one is solved. Ties go to the lowest ``l``.

    Args:
        held_out: Whether each fold of whole sequences is predicted by the fit without it, or by the fit on
            all.
        method: What is fitted.
    """

    def __init__(self, *, held_out: bool, method: Method = REPAIR) -> None:
        self.held_out, self.method, self.folds = held_out, method, DEFAULT_FOLDS if held_out else 1
        where = "on held-out folds" if held_out else "on the fitted tokens"
        self.meaning = (
            f"error of the least-squares repair relative to the target, {where}; the lowest is removed"
        )

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request.

        Raises:
            RequestError: If no candidate keeps the first and the last layer.
        """
        require_count(remove, n_layers - 2, n_layers, "residual keeps the first and the last layer")

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the candidate of the least residual.

        Raises:
            NumericsError: If nothing can be held out, or a hidden state or a solution is not finite.
        """
        spans = candidate_spans(evidence.n_layers, remove)
        found = evidence.residuals(spans, self.method, self.folds)
        details = {
            "features": self.method.features,
            "token_weights": self.method.token_weights,
            "ridge": self.method.ridge,
            "folds": self.folds,
            "explained_gap": [found[span].explained for span in spans],
        }
        return Choice.lowest(((span, self._score(found[span])) for span in spans), 1, details)

    def cost(self, shape: SelectionShape) -> Cost:
        """Return the moments and fits of all candidates, one at a time, and the states that wait on disk."""
        c, spans = shape.hidden, candidate_spans(shape.n_layers, shape.remove)
        n_candidates, n_fits = max(1, len(spans)), self.folds + 1 if self.folds > 1 else 1
        rows = max(DEFAULT_BLOCK_TOKENS, shape.length)
        # One state a fold when it is finished, and while it is at work one of every level of its tree.
        states = self.folds * (_RANGES_A_FOLD.bit_length() + 1)
        return Cost(
            Need(
                max(56 * c**2, 16 * c**2 + 64 * rows * c),
                f"max(56 C^2, 16 C^2 + {64 * rows:,} C) at least, for one worker and one candidate at a time",
            ),
            disk=Need(
                states * n_candidates * 16 * c**2, f"{states} x 16 C^2 for each of {n_candidates} candidates"
            ),
            read_bytes=shape.store_bytes,
            flops=n_candidates * (3.0 * c**2 * shape.n_tokens + n_fits * 7.0 / 3.0 * c**3),
            repairs=Repairs(spans, self.method, self.folds),
        )

    def _score(self, residual: Residual) -> float:
        if not self.held_out:
            return residual.in_sample
        if residual.held_out is None:
            msg = (
                "the store holds one sequence only, none can be held out; capture more, or use "
                "residual-in-sample"
            )
            raise NumericsError(msg)
        return residual.held_out


@register_criterion("residual")
def residual() -> RepairResidual:
    """Return the residual on held-out folds."""
    return RepairResidual(held_out=True)


@register_criterion("residual-in-sample")
def residual_in_sample() -> RepairResidual:
    """Return the residual on the tokens of the fit."""
    return RepairResidual(held_out=False)
