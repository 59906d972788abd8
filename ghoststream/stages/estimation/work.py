"""The work of each stage: bytes by the way that they go, and arithmetic by where it is done.

Letters are those of :mod:`ghoststream.costs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ghoststream.checkpoint.layer_sizes import LayerSizes
from ghoststream.costs import PassCost
from ghoststream.operators import OperatorKind, make_operator
from ghoststream.stages.estimation.job import Job

_MOVED = 4.0
"""How often activations move for each time that they enter or leave a matrix: norms, rotation, gates, sums.

transformers computes these one by one, from memory to memory.
"""

_LOGIT_BYTES = 16
"""Bytes that move for each logit: as it comes, and three times in float32."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage does.

    Attributes:
        read: Bytes of checkpoints and stores that are read.
        written: Bytes of results.
        saved: Bytes of what a training saves, which waits for them.
        stored: Bytes of these that the writer of a store encodes.
        weights: Bytes of weights that reach an accelerator.
        crossed: Hidden states that cross from host to scratch or device and back, in bytes, both ways.
        flops: Products of layers and head.
        attended: Products of attention over sequences.
        moved: Bytes of activations that layers move.
        summed: Arithmetic of moments, a token at a time.
        solved: Arithmetic of solutions, which no token adds to.
        fetched: Bytes of the sums of folds: they come from an accelerator where it sums.
        unpacked: Seconds in which weights are made of what a quantised release holds.
        crews: How often processes are started for several devices.
        rounds: How often workers open the model.
        sent: Bytes of sums that workers send.
    """

    read: float = 0.0
    written: float = 0.0
    saved: float = 0.0
    stored: float = 0.0
    weights: float = 0.0
    crossed: float = 0.0
    flops: float = 0.0
    attended: float = 0.0
    moved: float = 0.0
    summed: float = 0.0
    solved: float = 0.0
    fetched: float = 0.0
    unpacked: float = 0.0
    crews: float = 0.0
    rounds: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * getattr(self, one.name) for one in fields(self)))


def capture_work(job: Job) -> Work:
    """Return the work of a capture: a pass to the last hidden state that is stored."""
    last = max(job.stored.positions)
    one = pass_work(job, PassCost(job.sizes.hidden, last / job.sizes.n_layers, last=last))
    # Where not all positions are stored as they are, the newest is kept to continue from.
    copies = last * job.stored.computed_bytes if job.stored.is_rounded else 0
    return one + Work(written=job.stored.n_bytes + copies, stored=job.stored.n_bytes + copies)


def evaluate_work(job: Job) -> Work:
    """Return the work of measuring base and recovered model: one pass, together up to the first gap.

    Args:
        job: The recovery, with the text to measure on.
    """
    sizes = job.sizes
    lanes = 2.0 - (job.first_removed + job.n_removed) / sizes.n_layers
    return pass_work(job, PassCost(2.0 * sizes.hidden, lanes, scored=2.0))


def pass_work(job: Job, cost: PassCost) -> Work:
    """Return the work of one pass over the model."""
    done = forward_work(job, cost.lanes, cost.last) + reading(job, cost.last)
    if cost.backward:
        layers = job.sizes.layers
        done += Work(
            read=sum(layer.stored_bytes for layer in layers),
            unpacked=unpacked_of(job, layers),
        )
    if cost.fits:
        kind = job.kind if cost.fit_method is None else make_operator(cost.fit_method)
        done += fits_work(job, kind, cost.fits, cost.fit_share)
    return done + _logits(job, cost.scored * job.n_tokens)


def fits_work(job: Job, kind: OperatorKind, count: int, share: float = 1.0) -> Work:
    """Return the arithmetic of fitting some boundaries on a share of the text."""
    total, solved = job.fit_cost(kind, share).flops, job.fit_cost(kind, 0.0).flops
    there = 0 if kind.sums_on("cuda") is None else job.fit_ranges.n_folds * job.fit_bytes(kind).state
    return Work(summed=count * (total - solved), solved=count * solved, fetched=count * there)


def reading(job: Job, last: int | None) -> Work:
    """Return the reading of the weights in a pass to ``h[last]``; ``None`` is the whole model."""
    read = job.sizes.pass_bytes(last)
    widened = job.sizes.layer_bytes / max(1, job.sizes.stored_layer_bytes)
    return Work(
        read=read,
        weights=read * widened,
        unpacked=unpacked_of(job, job.sizes.layers[:last]),
    )


def unpacked_of(job: Job, layers: Sequence[LayerSizes]) -> float:
    """Return the seconds in which the weights of layers are made of what a quantised release holds."""
    return sum(layer.unpacking_by(job.machine.processors) for layer in layers)


def forward_work(job: Job, lanes: float, last: int | None) -> Work:
    """Return the arithmetic of lanes through the layers, ``lanes`` in dense passes over all of them."""
    sizes, length = job.sizes, job.text.length
    layers = sizes.layers[:last]
    # Lanes of a pass that ends early are counted as parts of all layers.
    runs = job.n_tokens * lanes * sizes.n_layers / max(1, len(layers))
    # A causal kernel skips half of the scores; eager attention computes all and holds them.
    scores = (4.0 if sizes.heads else 2.0) * length * sizes.taps.get("attention_heads", sizes.hidden)
    held = sizes.heads * length * (4.0 * sizes.itemsize + 8.0)
    flops = sum(2.0 * layer.acting for layer in layers)
    moved = sum(layer.passing * _MOVED * sizes.itemsize + held for layer in layers)
    crossed = 2.0 * job.n_tokens * lanes * sizes.n_layers * sizes.hidden * sizes.itemsize
    attended = runs * len(layers) * scores
    return Work(flops=runs * flops, attended=attended, moved=runs * moved, crossed=crossed)


def _logits(job: Job, n_tokens: float) -> Work:
    vocabulary = job.sizes.vocabulary
    return Work(
        flops=2.0 * n_tokens * vocabulary * job.sizes.hidden, moved=n_tokens * vocabulary * _LOGIT_BYTES
    )
