"""What work takes: said by the class that does it, summed by the estimate, which knows no names.

An operator says what fitting one boundary takes, and a criterion what choosing takes::

    def cost(self, shape: FitShape) -> Cost:
        c = shape.hidden
        return Cost(Need(56 * c**2, "56 C^2"), flops=3.0 * c**2 * shape.n_tokens, write_bytes=4 * c**2)

Letters in formulas: ``L`` layers, hidden size ``C``, ``p`` features, widest matrix of a layer ``I``, ``S``
sequences of ``T`` tokens, ``b`` bytes an element; ``U`` is the largest of one decoder layer, the embedding
and the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ghoststream.options import Method, Search
from ghoststream.spans import Span


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that something takes, how they add up, and how many are free; ``None`` if not known."""

    n_bytes: int
    formula: str
    available: int | None = None

    @property
    def fits(self) -> bool:
        """Whether it fits, as far as is known."""
        return self.available is None or self.n_bytes <= self.available


@dataclass(frozen=True, slots=True)
class Repairs:
    """Least squares that a criterion fits at its candidates; the estimate counts the sweeps over the store.

    Attributes:
        spans: The candidates.
        method: What is fitted.
        folds: Folds of whole sequences.
    """

    spans: tuple[Span, ...]
    method: Method
    folds: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What one piece of work takes on one worker.

    Attributes:
        memory: Memory at its largest.
        disk: What it keeps on disk while it works; None for nothing.
        read_bytes: Bytes read. An operator gives 0: its reads are the sweeps of its reducer.
        write_bytes: Bytes of the result: of an operator, the bytes of its tensors.
        flops: Arithmetic in float64.
        repairs: What a criterion fits at its candidates; None where it fits nothing.
    """

    memory: Need
    disk: Need | None = None
    read_bytes: int = 0
    write_bytes: int = 0
    flops: float = 0.0
    repairs: Repairs | None = None


@dataclass(frozen=True, slots=True)
class FitShape:
    """Sizes that fitting one boundary depends on.

    Attributes:
        hidden: Hidden size C, which is the number of channels that are predicted.
        features: Number of features p that the operator reads.
        n_tokens: Tokens of the calibration text, padding included; 0 for what no token adds to.
        folds: Folds that are left out, one after the other; 1 means that none can be.
    """

    hidden: int
    features: int
    n_tokens: int
    folds: int = 1

    @property
    def left_out(self) -> int:
        """How often a fold is left out."""
        return self.folds if self.folds > 1 else 0


@dataclass(frozen=True, slots=True)
class SelectionShape:
    """Sizes that choosing layers from a store, or from weights, depends on.

    Attributes:
        n_layers: Decoder layers L.
        remove: Layers to remove.
        hidden: Hidden size C.
        sequences: Sequences S of the store.
        length: Tokens T of a sequence.
        store_bytes: Bytes of all stored hidden states.
        layer_bytes: Bytes of one layer as the checkpoint stores it.
        layer_elements: Weights of one layer.
    """

    n_layers: int
    remove: int
    hidden: int
    sequences: int
    length: int
    store_bytes: int
    layer_bytes: int
    layer_elements: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the calibration text, padding included."""
        return self.sequences * self.length


@dataclass(frozen=True, slots=True)
class SearchShape:
    """Sizes that choosing layers in passes over the model depends on.

    Attributes:
        n_layers: Decoder layers L.
        remove: Layers to remove.
        hidden: Hidden size C.
        intermediate: Width I of what enters the last map of an MLP; 0 where nothing can be absorbed there.
        sequences: Sequences S.
        length: Tokens T of a sequence.
        search: Candidates, beam, spans and windows held out.
        tried: Ways to repair that are tried at the first boundary of a plan; none if one is named.
        tried_later: The same behind another boundary.
        positions: Share of the positions at which many candidates are compared.
    """

    n_layers: int
    remove: int
    hidden: int
    intermediate: int
    sequences: int
    length: int
    search: Search = field(default_factory=Search)
    tried: tuple[Method, ...] = ()
    tried_later: tuple[Method, ...] = ()
    positions: float = 1.0

    @property
    def held_out(self) -> float:
        """Share of the sequences that candidates are measured on: as given, or a quarter."""
        given = self.search.held_out
        return 0.25 if given is None else min(1.0, given / self.sequences)


@dataclass(frozen=True, slots=True)
class PassCost:
    """What one pass over the model takes.

    Attributes:
        states: Elements of a token that wait between layers, at most.
        lanes: Work of its lanes, in dense passes over all sequences.
        fits: Boundaries that are fitted in it.
        backward: Whether it goes back too, which reads every layer once more.
        fit_share: Share of the sequences that they are fitted on.
        fit_method: How; None for the operator that is named, or the widest that is tried.
        scored: Tokens whose logits are taken, in texts of all sequences.
        last: The pass ends with ``h[last]``; None for the whole model.
        groups: Groups of candidates, each of which a worker can take; 0 for a pass that one process runs.
        alone: What each of these workers does, however few candidates it has: the dense lane.
    """

    states: float
    lanes: float
    fits: int = 0
    backward: bool = False
    fit_share: float = 1.0
    fit_method: Method | None = None
    scored: float = 0.0
    last: int | None = None
    groups: int = 0
    alone: PassCost | None = None

    def of_worker(self, count: int) -> PassCost:
        """Return what the worker does that has most, where ``count`` of them share the candidates."""
        alone = self.alone or PassCost(0.0, 0.0)
        part = math.ceil(self.groups / count) / self.groups
        return replace(
            self,
            states=alone.states + part * (self.states - alone.states),
            lanes=alone.lanes + part * (self.lanes - alone.lanes),
            fits=math.ceil(part * self.fits),
            scored=alone.scored + part * (self.scored - alone.scored),
        )


PASS_FORMULA = "2 U + max(U / 2, B T (4 I + 8 C) b)"
"""Memory of a pass where layers are computed, beside hidden states; eager attention takes more."""

SHARD_BYTES = 16 * 2**20
"""Bytes of a shard of a store at most, where a sequence does not take more."""

LOSS_BYTES = 4 * 2**20
"""Float32 logits that a CPU turns into losses at once: what its caches hold."""

ACCELERATOR_FORMULA = f"{PASS_FORMULA} + 7 B T C b + 64 MiB"
"""The same on an accelerator: states on their way are there too, and what its libraries work with."""

PACKED_FORMULA = " + a packed weight"
"""What the host takes besides of a quantised release: the stored bytes of one weight, while it is made."""

STAGING_FORMULA = "U to a power of two + U"
"""Memory of the host of an accelerator in a pass: a layer on its way in page-locked memory, and a head."""

_MOST_TOKENS = 2048
_MOST_TOKENS_ON_ACCELERATOR = 8192
_BATCHES_ON_THEIR_WAY = 7  # three copies for who watches, two that are fetched, two that are put away
_LIBRARY_BYTES = 64 * 1024**2
_LEAST_CHUNK_BYTES = 32 * 2**20


def page_locked_bytes(n_bytes: int) -> int:
    """Return what a page-locked block of ``n_bytes`` takes: torch rounds up to a power of two."""
    return 1 << max(0, n_bytes - 1).bit_length()


def staging_bytes(unit_bytes: int) -> int:
    """Return what a pass takes on the host of an accelerator; see :data:`STAGING_FORMULA`."""
    return page_locked_bytes(unit_bytes) + unit_bytes


def beside_work_bytes(batch_bytes: int) -> int:
    """Return what a pass takes on an accelerator beside weights, the work on a batch, and states.

    Args:
        batch_bytes: Bytes of the states of a micro-batch, ``B T C b``.
    """
    return _BATCHES_ON_THEIR_WAY * batch_bytes + _LIBRARY_BYTES


def work_bytes_per_token(
    *, widest: int, hidden: int, itemsize: int, heads: int, length: int, scan: int = 0
) -> int:
    """Return the bytes that a layer at work holds a token: ``(4 I + 8 C) b``, and scores where eager.

    Args:
        widest: Widest side I of a matrix of a layer.
        hidden: Hidden size C.
        itemsize: Bytes of an element, b.
        heads: Attention heads whose scores are held; 0 where none are.
        length: Tokens of a sequence.
        scan: What the scan of a recurrent layer holds besides.
    """
    return (4 * widest + 8 * hidden) * itemsize + heads * length * (2 * itemsize + 4) + scan


def sequences_at_work(
    unit_bytes: int, sequence_bytes: int, length: int, limit: int | None, states_bytes: int | None = None
) -> int:
    """Return how many sequences go through a layer together: what works within half a U and the memory given.

    An accelerator is not kept busy by so few where layers are small: there it is what works within 2 U.

    Args:
        unit_bytes: U.
        sequence_bytes: What a layer at work holds for one sequence.
        length: Tokens of a sequence.
        limit: Memory of the pass where layers are computed, less what others take; None for no limit.
        states_bytes: Bytes of the states of a sequence, on an accelerator; None where the CPU computes.

    Returns:
        At most 2,048 tokens, on an accelerator 8,192; at least one sequence.
    """
    most, share = _MOST_TOKENS, unit_bytes // 2
    if states_bytes is not None:
        most, share = _MOST_TOKENS_ON_ACCELERATOR, 2 * unit_bytes
        sequence_bytes += _BATCHES_ON_THEIR_WAY * states_bytes
        limit = None if limit is None else limit - _LIBRARY_BYTES
    room = share if limit is None else min(share, limit - 2 * unit_bytes)
    return max(1, min(most // length, room // sequence_bytes))


def sequences_per_shard(n_sequences: int, sequence_bytes: int, micro_batch: int) -> int:
    """Return how many sequences make a shard: whole micro-batches, or an even part of one that is too large.

    So every boundary of the coarser of the two is one of the finer, and a capture can be split there. Even
    parts of a micro-batch of a prime number of sequences are single sequences.

    Args:
        n_sequences: Sequences of the text.
        sequence_bytes: Bytes of the stored hidden states of a sequence.
        micro_batch: Sequences that are computed at once.
    """
    most = max(1, SHARD_BYTES // sequence_bytes)
    if n_sequences <= most:
        return n_sequences
    if micro_batch <= most:
        return most - most % micro_batch
    return max(size for size in range(1, most + 1) if micro_batch % size == 0)


def store_buffer_bytes(
    *,
    sequence: int,
    sequences: int,
    micro_batch: int,
    itemsizes: tuple[int, ...],
    threads: int,
    is_page_locked: bool,
) -> int:
    """Return what a capture takes on the host beside its pass: shards that are written and that are filled.

    Args:
        sequence: Elements of the hidden states of a sequence.
        sequences: Sequences of the text.
        micro_batch: Sequences that are computed at once.
        itemsizes: Bytes of an element in the store and, where one is written, in the copy to continue from.
        threads: How many shards are written at a time.
        is_page_locked: Whether they are in page-locked memory, which torch rounds up to a power of two.
    """
    room = sequences_per_shard(sequences, sequence * itemsizes[0], micro_batch) * sequence * max(itemsizes)
    if is_page_locked:
        room = page_locked_bytes(room)
    return (threads + len(itemsizes)) * room


def default_logit_tokens(vocab_size: int, unit_bytes: int) -> int:
    """How many tokens' float32 logits fit in a quarter of U, or in 32 MiB if that is more.

    Fewer would be slower: CPU kernels bring the head's weights into their own layout once a chunk.
    """
    return max(1, max(_LEAST_CHUNK_BYTES, unit_bytes // 4) // (4 * vocab_size))
