"""Spans ranked before any is repaired, by what a dense pass over few windows says of all of them at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from ghoststream.progress import Progress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.moments import DENSE
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import candidate_spans
from ghoststream.streaming import (
    Batch,
    HiddenStates,
    Lane,
    Observer,
    PassOptions,
    StatesFactory,
    StreamedPass,
    make_batches,
)
from ghoststream.text import TokenSet


@dataclass
class Similarity:
    """How alike the hidden states before and behind a span are; larger is more.

    Attributes:
        channels: Mean cosine of a channel over the tokens of a window (``streamline-published``).
        tokens: Mean cosine of a token over the channels (``streamline``).
    """

    channels: float
    tokens: float


class SpanSimilarity:
    """Compares ``h[l]`` and ``h[l + n]`` for some ``n`` as a lane comes by (an ``Observer`` of a pass).

    Args:
        n_layers: Decoder layers of the model; the first and the last are in no span.
        sizes: The ``n``.
        mask: True at tokens that count, bool ``(S, T)``.
        factory: Gives places for the states that are kept.

    Memory: the states of ``max(n) + 1`` positions at most, ``S x T x C`` each, in places of the factory, and
    one batch from each of two positions in float32 on the device.
    """

    def __init__(
        self, n_layers: int, sizes: Sequence[int], mask: torch.Tensor, factory: StatesFactory
    ) -> None:
        self._spans = {span for size in sizes for span in candidate_spans(n_layers, size)}
        self._mask = mask
        self._factory = factory
        self._places: dict[int, HiddenStates] = {}
        self._channels: defaultdict[Span, list[float]] = defaultdict(list)
        self._tokens: defaultdict[Span, list[torch.Tensor]] = defaultdict(list)
        self._found: dict[Span, Similarity] = {}

    @property
    def most_places(self) -> int:
        """How many places it takes of the factory at once, at most."""
        last = {span.start: span.stop for span in sorted(self._spans)}
        at_once = (sum(start <= position <= stop for start, stop in last.items()) for position in last)
        return max(at_once, default=0)

    def wants(self, position: int) -> bool:
        """Whether a span starts or stops here."""
        return any(position in (span.start, span.stop) for span in self._spans)

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        """Compare the states of one batch, ``(n, T, C)``, with those before each span that stops here."""
        mask = self._mask[batch.start : batch.stop].to(states.device)
        after = states.float()
        for span in self._spans:
            if span.stop == position:
                before = self._places[span.start].get(batch).to(states.device)
                self._compare(span, before.float(), after, mask)
        if any(span.start == position for span in self._spans):
            if position not in self._places:
                self._places[position] = self._factory.make()
            self._places[position].put(batch, states)

    def finished(self, position: int) -> None:
        """Take the means of spans that stop here, and let go of states that no span to come starts at."""
        for span in (span for span in self._spans if span.stop == position):
            tokens = torch.cat(self._tokens.pop(span))
            self._found[span] = Similarity(_mean(self._channels.pop(span)), float(tokens.mean()))
        waiting = {span.start for span in self._spans if span.stop > position}
        self._release(start for start in tuple(self._places) if start not in waiting)

    def failed(self) -> None:
        """Let go of everything."""
        self._release(tuple(self._places))

    def found(self) -> dict[Span, Similarity]:
        """Return the means over windows and tokens, when all states have come by."""
        return {span: self._found[span] for span in sorted(self._spans)}

    def _release(self, starts: Iterable[int]) -> None:
        for start in starts:
            self._factory.release(self._places.pop(start))

    def _compare(self, span: Span, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> None:
        weights = mask[..., None]
        channels = cosine_similarity(before * weights, after * weights, dim=1).mean(dim=-1)
        self._channels[span] += channels[mask.any(dim=1)].tolist()
        self._tokens[span].append(cosine_similarity(before, after, dim=-1)[mask])


def rank_spans(
    session: ModelSession,
    tokens: TokenSet,
    sizes: Sequence[int],
    *,
    micro_batch: int,
    progress: Progress,
    beside: Sequence[Observer] = (),
) -> dict[Span, Similarity]:
    """Compare the states around every span of some lengths, in one pass of the dense model.

    Args:
        session: The model.
        tokens: Few windows are enough: eight of 512 tokens rank as 128 do.
        sizes: Lengths of spans.
        micro_batch: Sequences in one forward.
        progress: Who is told how far it is.
        beside: Who else looks at the states of the pass.

    Raises:
        NumericsError: If a state is not finite.
        BudgetError: If two layers and a micro-batch do not fit the memory given.

    Memory: that of a pass, and of :class:`SpanSimilarity`.
    """
    skeleton = session.skeleton
    batches = make_batches(tokens.ids, tokens.mask, micro_batch)
    factory = session.memory(tokens.length).states_factory(batches)
    observer = SpanSimilarity(skeleton.n_layers, sizes, torch.from_numpy(tokens.mask), factory)
    lane = Lane(DENSE, PruningPlan(skeleton.n_layers), observers=(observer, *beside))
    last = max(1, skeleton.n_layers - 1)
    options = PassOptions(last_layer=last, kept=observer.most_places, progress=progress)
    StreamedPass(skeleton, batches, [lane], factory, options).run()
    return observer.found()


def similarity_maps(ranked: Mapping[Span, Similarity]) -> dict[str, Any]:
    """Return similarities as JSON data: ``channel_cosine`` and ``token_cosine`` by length and start.

    Entry ``[i][j]`` is of the span of ``lengths[i]`` layers at ``starts[j]``, and null where it is not known.
    """
    starts, lengths = sorted({span.start for span in ranked}), sorted({len(span) for span in ranked})
    found = {(len(span), span.start): similarity for span, similarity in ranked.items()}

    def grid(name: str) -> list[list[float | None]]:
        return [[getattr(found.get((length, start)), name, None) for start in starts] for length in lengths]

    return {
        "starts": starts,
        "lengths": lengths,
        "channel_cosine": grid("channels"),
        "token_cosine": grid("tokens"),
    }


def shortlist(
    ranked: Mapping[Span, Similarity], size: int, count: int, *, apart: int = 1
) -> tuple[Span, ...]:
    """Return the spans of one length that either similarity prefers, taken in turn, best first.

    Args:
        ranked: What :func:`rank_spans` found.
        size: The length.
        count: How many spans at most.
        apart: Layers between the starts of any two at least. The best spans are neighbours mostly, of which
            no plan of several can be made.
    """
    own = [span for span in ranked if len(span) == size]
    orders = [
        sorted(own, key=lambda span: -ranked[span].channels),
        sorted(own, key=lambda span: -ranked[span].tokens),
    ]
    found: list[Span] = []
    for span in (span for pair in zip(*orders, strict=True) for span in pair):
        if all(abs(span.start - other.start) >= apart for other in found):
            found.append(span)
    return tuple(found)[:count]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
