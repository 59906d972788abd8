"""Criteria by name: which layers to remove. A user's own is a class.

::

    @register_criterion("last")
    class Last(Criterion):
        meaning = "the number of the layer; the highest are removed"

        def choose(self, evidence: Evidence, remove: int) -> Choice:
            layers = [Span(layer, layer + 1) for layer in range(evidence.n_layers)]
            return Choice(tuple((span, float(span.start)) for span in layers), tuple(layers[-remove:]))

An installed package names such a class as an entry point of the group ``ghoststream.criteria``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ghoststream.costs import Cost, Need, SelectionShape
from ghoststream.errors import RequestError
from ghoststream.registry import Registry
from ghoststream.selection.evidence import Evidence
from ghoststream.spans import Span


@dataclass(frozen=True)
class Choice:
    """What a criterion found.

    Attributes:
        scores: Every candidate (one layer is a span of length 1) and its score, in order of layers.
        chosen: The candidates to remove, in order of layers.
        details: What else it saw, as JSON data.
    """

    scores: tuple[tuple[Span, float], ...]
    chosen: tuple[Span, ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def lowest(
        cls, scores: Iterable[tuple[Span, float]], count: int, details: Mapping[str, Any] | None = None
    ) -> Choice:
        """Choose the ``count`` candidates of lowest score; ties go to the lowest layer."""
        rows = tuple(sorted(scores))
        best = sorted(rows, key=lambda row: (row[1], row[0]))[:count]
        return cls(rows, tuple(sorted(span for span, _ in best)), details or {})

    @classmethod
    def highest(
        cls, scores: Iterable[tuple[Span, float]], count: int, details: Mapping[str, Any] | None = None
    ) -> Choice:
        """Choose the ``count`` candidates of highest score; ties go to the lowest layer."""
        rows = tuple(sorted(scores))
        best = sorted(rows, key=lambda row: (-row[1], row[0]))[:count]
        return cls(rows, tuple(sorted(span for span, _ in best)), details or {})


class Criterion:
    """A rule that chooses layers.

    Attributes:
        meaning: What the score says, in one line.
        reads_weights: Whether it asks for the weights of layers. A model that is given to any other one is
            refused.
    """

    meaning: str
    reads_weights: ClassVar[bool] = False

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request before anything is read; by default, any layers may go but all.

        Raises:
            RequestError: If so many layers cannot be removed.
        """
        require_count(remove, n_layers - 1, n_layers, "at least one must survive")

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Score the candidates and choose, always the same for the same evidence.

        Raises:
            GhoststreamError: What the evidence raises.
        """
        raise NotImplementedError

    def cost(self, shape: SelectionShape) -> Cost:
        """Return what choosing takes.

        By default one read of the store, for a pair of states of each layer.
        """
        return cosine_cost(shape, n_pairs=shape.n_layers, live=3)


_BLOCK_TOKENS = 1024
"""Tokens that :class:`~ghoststream.statistics.CosineReducer` holds at a time."""

_CRITERIA: Registry[Callable[[], Criterion]] = Registry("criterion", group="ghoststream.criteria")

register_criterion = _CRITERIA.named
criterion_names = _CRITERIA.names


def make_criterion(name: str) -> Criterion:
    """Return a criterion by name.

    Raises:
        RequestError: If there is none of this name.
    """
    return _CRITERIA.get(name)()


def cosine_cost(shape: SelectionShape, *, n_pairs: int, live: int, rows: int | None = None) -> Cost:
    """Return what one read of the store takes that compares pairs of hidden states.

    Args:
        shape: Sizes.
        n_pairs: Pairs; ``6 C`` FLOPs a token and pair.
        live: Hidden states of a block of tokens, float32, that are held at a time.
        rows: Tokens of a block; by default those of :class:`~ghoststream.statistics.CosineReducer`.
    """
    rows = rows or max(_BLOCK_TOKENS, shape.length)
    return Cost(
        Need(4 * live * rows * shape.hidden, f"4 C ({live} x {rows:,}) for one worker"),
        read_bytes=shape.store_bytes,
        flops=6.0 * n_pairs * shape.hidden * shape.n_tokens,
    )


def require_count(remove: int, most: int, n_layers: int, why: str) -> None:
    """Check how many layers are to be removed.

    Raises:
        RequestError: If it is less than 1 or more than ``most``.
    """
    if most < 1:
        msg = f"cannot remove {remove} of {n_layers} layers: {why}; use another criterion"
        raise RequestError(msg)
    if not 1 <= remove <= most:
        msg = f"cannot remove {remove} of {n_layers} layers: {why}; give a number from 1 to {most}"
        raise RequestError(msg)
