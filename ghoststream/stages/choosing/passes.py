"""The passes over the model that a search takes: what criteria that run the model say as their cost.

Lanes are counted in dense passes over all sequences.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import permutations
from math import comb

from ghoststream.costs import PassCost, SearchShape
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.stages.choosing.rounds import (
    LEADERS,
    MOVES,
    OF_PLANS,
    OF_SPANS,
    OF_SURVIVORS,
    PARTS,
    RANKED_WINDOWS,
    SPANS,
    SURVIVORS,
    SampleShare,
)
from ghoststream.stages.choosing.ways import SCREEN
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


def racing(shape: SearchShape, tried: Sequence[Sequence[int]]) -> tuple[PassCost, ...]:
    """Return the passes of a race (:mod:`ghoststream.stages.choosing.race`).

    Args:
        shape: Sizes; ``length`` counts where a sample has the fewest tokens that a map is fitted on.
        tried: Sizes of the spans of each partition.
    """
    sizes = {size for sizes in tried for size in sizes}
    n_alone = sum(
        min(SPANS if size == shape.remove else PARTS, max(1, shape.n_layers - 1 - size)) for size in sizes
    )
    found = [
        ranking(shape, max(sizes)),
        round_of(shape, OF_SPANS, n_alone, n_spans=1),
    ]
    most = max(map(len, tried))
    n_survivors = min(SURVIVORS, max(1, shape.n_layers - 1 - max(sizes)))
    if most > 1:
        found.append(round_of(shape, OF_PLANS, shape.search.candidates + n_survivors, n_spans=most))
        if plans_of_several(shape.n_layers, tried) > shape.search.candidates:
            found.append(round_of(shape, OF_PLANS, LEADERS * most * len(MOVES), n_spans=most))
    # Of the leader other ways are measured beside the likely one, more of them behind another boundary.
    n_ways = (2 + 3 * (most - 1)) * bool(shape.tried)
    found.append(round_of(shape, OF_SURVIVORS, n_survivors * most + n_ways, n_spans=most, sequential=True))
    return tuple(found)


def ranking(shape: SearchShape, longest: int) -> PassCost:
    """Return the pass of the dense model in which spans of up to ``longest`` layers are ranked.

    Beside its own states it keeps those of ``longest + 1`` positions.
    """
    ranked = min(RANKED_WINDOWS, shape.sequences) / shape.sequences
    keeping = shape.hidden * (longest + 2) * ranked
    return PassCost(keeping, ranked * (shape.n_layers - 1) / shape.n_layers, last=shape.n_layers - 1)


def plans_of_several(n_layers: int, tried: Sequence[Sequence[int]]) -> int:
    """Return how many plans of several spans there are that do not touch, nor the first or the last layer."""
    n_plans = 0
    for sizes in (sizes for sizes in tried if len(sizes) > 1):
        free = n_layers - 2 - sum(sizes) - (len(sizes) - 1)
        orders = len(set(permutations(sizes)))
        n_plans += orders * comb(free + len(sizes), len(sizes)) if free >= 0 else 0
    return n_plans


def round_of(
    shape: SearchShape, share: SampleShare, repairs: int, *, n_spans: int, sequential: bool = False
) -> PassCost:
    """Return a pass over a sample: a dense lane, and repairs behind the middle of the model.

    Where they are fitted one boundary after the other, the windows to fit on go from one to the next too.
    """
    n_held = max(1, round(shape.held_out * shape.sequences))
    n_fit = max(1, shape.sequences - n_held)
    windows = share.of(n_fit, n_held, hidden=shape.hidden, length=shape.length)
    fit, held = (n / shape.sequences for n in windows)
    stretch = (shape.n_layers - shape.remove) / (n_spans + 1) / shape.n_layers
    between = (n_spans - 1) * stretch * repairs * (held + fit * sequential)
    width = shape.hidden + (shape.hidden + shape.intermediate) * (sequential and bool(shape.tried))
    states = (fit + held) * (shape.hidden + width * min(repairs, SURVIVORS + n_spans))
    scored = held * (1.0 if share.every_position else shape.positions)
    return PassCost(
        states + held * shape.hidden * repairs,
        fit + held + between + held * stretch * repairs,
        repairs * n_spans,
        fit_share=fit,
        fit_method=None if sequential else _screen(shape),
        scored=scored * (repairs + 1),
        # Plans that begin with one span go to one worker.
        groups=min(repairs, PARTS) if n_spans > 1 else repairs,
        alone=PassCost((fit + held) * shape.hidden, fit + held, scored=scored),
    )


def one_by_one(shape: SearchShape, *, passes: int, repairs: bool) -> tuple[PassCost, ...]:
    """Return passes that each measure the model without any one of its layers.

    Args:
        shape: Sizes.
        passes: How many.
        repairs: Whether candidates are repaired, and measured on held-out sequences; otherwise on all.
    """
    share, candidates = shape.held_out if repairs else 1.0, max(1, shape.n_layers - 2)
    lanes = 1.0 + share * candidates * (candidates + 1) / (2 * shape.n_layers)
    fits = candidates if repairs else 0
    states = shape.hidden * (2 + share * candidates)
    one = PassCost(
        states,
        lanes,
        fits,
        scored=share * (candidates + 1),
        groups=candidates,
        alone=PassCost(2.0 * shape.hidden, 1.0, scored=share),
    )
    return (one,) * passes


def there_and_back(shape: SearchShape) -> tuple[PassCost, ...]:
    """Return a pass forward that keeps the states of all layers, and one back."""
    return (PassCost(float(shape.hidden) * (shape.n_layers + 3), 4.0, backward=True, scored=3.0),)


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


def last_fit(shape: SearchShape, taps: int, refit: int = 0, spans: Sequence[Span] | None = None) -> PassCost:
    """Return the pass that fits the operators which are written.

    Args:
        shape: Sizes.
        taps: Width of what the features read beside the hidden state.
        refit: Layers behind each gap that are fitted anew: two runs of the layer and two fits each.
        spans: The removed spans, where they are known.
    """
    n_layers = shape.n_layers
    # Behind the last boundary of a plan that is known, nothing is run.
    is_single = spans is not None and len(spans) == 1
    states = (2.0 if is_single else 3.0) * shape.hidden + taps
    if refit:
        # The dense lane, the repaired one, the one before it, and what enters a map beside its states.
        states = max(states, 4.0 * shape.hidden + shape.intermediate)
    if spans is None:
        return PassCost(states, (n_layers + 1) / (2 * n_layers) + 3.0 * refit / n_layers, 1)
    last = min(n_layers, spans[-1].stop + refit)
    # The repaired model runs what is left between the first span and the last one.
    between = spans[-1].start - spans[0].start - sum(len(span) for span in spans[:-1])
    lanes = (last + between + 3.0 * refit * len(spans)) / n_layers
    return PassCost(states, lanes, len(spans), last=last)


def shared_fit(
    shape: SearchShape, taps: int, spans: Sequence[Span], dense: Collection[Span]
) -> tuple[PassCost, ...]:
    """Return the passes of a fit whose sequences workers share: one for each round.

    Args:
        shape: Sizes.
        taps: Width of what the features read beside the hidden state.
        spans: The removed spans.
        dense: Those behind the first whose operators read dense states: they are summed with the first.
    """
    first, *later = spans
    together = [first, *(span for span in later if span in dense)]
    last, n_layers = together[-1].stop, shape.n_layers
    found = [PassCost(2.0 * shape.hidden + taps, last / n_layers, len(together), last=last)]
    for span in (span for span in later if span not in dense):
        # Beside the dense lane, the repaired one runs what is left between the first span and this one.
        between = span.start - first.start - sum(len(one) for one in spans if one < span)
        lanes = (span.stop + between) / n_layers
        found.append(PassCost(3.0 * shape.hidden + taps, lanes, 1, last=span.stop))
    return tuple(found)


def _step(shape: SearchShape, tried: Sequence[Sequence[int]], step: int) -> PassCost:
    n_layers, hidden, share = shape.n_layers, shape.hidden, shape.held_out
    lanes, states, fits, measured = 1.0, float(hidden), 0, 1
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
        measured += candidates
    method = _screen(shape)
    return PassCost(
        states,
        lanes,
        fits,
        fit_share=1.0 - share,
        fit_method=method,
        scored=share * measured,
        groups=measured - 1,
        alone=PassCost(hidden, 1.0, scored=share),
    )


def _screen(shape: SearchShape) -> Method | None:
    """Return what spans are compared with where ways to repair are tried."""
    return SCREEN if SCREEN in shape.tried else next(iter(shape.tried), None)


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
    return PassCost(
        states,
        lanes,
        repairs * (later + 1),
        fit_share=1.0 - share,
        scored=share * (repairs + 1),
        # What begins with one span, fitted in one way, goes to one worker.
        groups=plans if decided else repairs,
        alone=PassCost(hidden, 1.0, scored=share),
    )
