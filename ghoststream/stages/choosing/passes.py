"""The passes over the model that a search takes: what criteria that run the model say as their cost.

Lanes are counted in dense passes over all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.costs import PassCost, SearchShape
from ghoststream.statistics import taps_of


def partitions(n_remove: int, max_spans: int) -> list[list[int]]:
    """Return the sizes of the spans of the plans that are tried, larger ones first.

    For each number of spans up to ``max_spans``: as equal as they can be, and one twice as long as others.
    """
    found = []
    for n_spans in range(1, max_spans + 1):
        equal = [n_remove // n_spans + (index < n_remove % n_spans) for index in range(n_spans)]
        found.append(equal)
        small = round(n_remove / (n_spans + 1))
        large = n_remove - (n_spans - 1) * small
        if n_spans > 1 and small > 0 and large > equal[0]:
            found.append([large] + [small] * (n_spans - 1))
    return found


def growing(shape: SearchShape, tried: Sequence[Sequence[int]]) -> tuple[PassCost, ...]:
    """Return a pass for each span that is added; plans of all partitions grow in the same passes.

    Args:
        shape: Sizes.
        tried: Sizes of the spans of each partition, in the order in which they are added.
    """
    return tuple(_step(shape, tried, step) for step in range(max(map(len, tried))))


def one_by_one(shape: SearchShape, *, passes: int, repairs: bool) -> tuple[PassCost, ...]:
    """Return passes that each measure the model without any one of its layers.

    Args:
        shape: Sizes.
        passes: How many.
        repairs: Whether candidates are repaired, and measured on held-out sequences; otherwise on all.
    """
    share, candidates = shape.held_out if repairs else 1.0, max(1, shape.n_layers - 2)
    lanes = 1.0 + share * candidates * (candidates + 1) / (2 * shape.n_layers)
    return (PassCost(shape.hidden * (2 + share * candidates), lanes, candidates if repairs else 0),) * passes


def there_and_back(shape: SearchShape) -> tuple[PassCost, ...]:
    """Return a pass forward that keeps the states of all layers, and one back."""
    return (PassCost(float(shape.hidden) * (shape.n_layers + 3), 4.0, backward=True),)


def refining(shape: SearchShape, *, n_spans: int, plans: int) -> tuple[PassCost, ...]:
    """Return a pass for each boundary at which ways to repair are compared; none where an operator is named.

    Args:
        shape: Sizes, with the ways that are tried.
        n_spans: Spans of the plans at most.
        plans: Plans whose boundaries are decided in the same passes.
    """
    if not shape.tried:
        return ()
    return tuple(_decision(shape, decided, n_spans, plans) for decided in range(n_spans))


def last_fit(shape: SearchShape, taps: int) -> PassCost:
    """Return the pass that fits the operators which are written.

    Args:
        shape: Sizes.
        taps: Width of what the features read beside the hidden state.
    """
    return PassCost(3.0 * shape.hidden + taps, (shape.n_layers + 1) / (2 * shape.n_layers), 1)


def _step(shape: SearchShape, tried: Sequence[Sequence[int]], step: int) -> PassCost:
    n_layers, hidden, share = shape.n_layers, shape.hidden, shape.held_out
    lanes, states, fits = 1.0, float(hidden), 0
    for sizes in (sizes for sizes in tried if step < len(sizes)):
        size = sizes[step]
        if step == 0:
            candidates = max(1, n_layers - 1 - size)
            # They stop one layer after the other: their tails make a triangle.
            lanes += share * candidates * (candidates + 1) / (2 * n_layers)
            states += hidden * (min(size, candidates) + share * candidates)
        else:
            standing = sum(sizes[:step])
            places = n_layers - 1 - size - standing - step * (size - 1)
            candidates = max(1, min(shape.search.candidates, places))
            stretch = max(0.0, n_layers - size - standing) / (step + 2) / n_layers
            # All sequences between the first and the last span, the held-out ones behind that.
            lanes += candidates * stretch * (step + share)
            states += hidden * candidates * (1 + share)
        fits += candidates * (step + 1)
    return PassCost(states, lanes, fits)


def _decision(shape: SearchShape, decided: int, n_spans: int, plans: int) -> PassCost:
    hidden, share = shape.hidden, shape.held_out
    stretch = (shape.n_layers - shape.remove) / (n_spans + 1) / shape.n_layers
    later = n_spans - 1 - decided
    tried = shape.tried_later if decided else shape.tried
    repairs = plans * len(tried)
    tapped = sum(bool(taps_of(method.features)) for method in tried)
    lanes = 1.0 + stretch * (plans * decided + repairs * (later + share))
    states = hidden * (1 + plans + repairs * (1.0 if later else share))
    states += plans * tapped * (hidden + shape.intermediate)
    if decided:
        # What fits on dense states waits at the boundary too, once with taps and once without.
        states += plans * (2 * hidden + shape.intermediate)
    return PassCost(states, lanes, repairs * (later + 1))
