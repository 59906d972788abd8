"""How a pass divides the memory that it may take, and what it refuses to begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ghoststream.checkpoint.scans import scan_bytes_per_token
from ghoststream.costs import (
    beside_work_bytes,
    page_locked_bytes,
    sequences_at_work,
    work_bytes_per_token,
)
from ghoststream.errors import BudgetError
from ghoststream.files import format_bytes
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.skeleton import Skeleton
from ghoststream.streaming.states import StatesFactory


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What a pass may take, above what the libraries take.

    Attributes:
        device_bytes: Memory of the accelerator; ``None`` is no limit. Means nothing where the CPU computes.
        host_bytes: Memory of the host; ``None`` is no limit.
        scratch: Folder for hidden states that fit neither; the system's temporary folder if ``None``.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    scratch: Path | None = None


class PassMemory:
    """The memory of one pass: two layers, the work on a micro-batch, buffers of those who watch.

    The rest holds states. Where the layers compute, a pass takes ``2 U + max(U / 2, B T (4 I + 8 C) b)``: the
    layer in use and the one being read, and a forward of ``B`` sequences of ``T`` tokens at work (``I`` is
    the widest matrix of a layer; eager attention takes ``B H T^2 (2 b + 4)`` more). The way back of a
    :class:`~ghoststream.streaming.backward.BackwardPass` takes four times such a forward, and the gradients.
    An accelerator takes ``7 B T C b + 64 MiB`` more: batches on their way to the host and from it, and what
    its libraries work with. Its host takes a layer on its way, in page-locked memory that torch rounds up to
    a power of two, and a head. Of a quantised release the host takes the stored bytes of one weight besides.

    Args:
        skeleton: The model.
        budget: What may be taken.
        length: Tokens of a sequence, T.
        buffers: Bytes that observers and operators take on the host besides.
        gradients: Bytes of parameters' gradients where the layers compute; ``None`` if there is no way back.
        micro_batch: Sequences that go through a layer together, if that is given.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        budget: MemoryBudget,
        length: int,
        *,
        buffers: int = 0,
        gradients: int | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self._skeleton = skeleton
        self._budget = budget
        self._length = length
        self._buffers = buffers
        self._fits = self._host_fits = 0
        self._gradients, self._micro_batch = gradients, micro_batch
        self._on_host = skeleton.device.type == "cpu"
        self._unit = skeleton.unit_bytes
        self._packed = skeleton.packed_bytes

    def choose_micro_batch(self) -> int:
        """Return how many sequences go through a layer together: what works within half a U and the budget.

        On an accelerator what works within 2 U. At most 2,048 tokens, there 8,192; at least one sequence.
        """
        limit = self._budget.host_bytes if self._on_host else self._budget.device_bytes
        if limit is not None and self._on_host:
            limit -= self._buffers + self._packed
        work, states = self._work_bytes(1, self._length), self._states_bytes(1, self._length)
        return sequences_at_work(self._unit, work, self._length, limit, None if self._on_host else states)

    def taken(self) -> tuple[int, int]:
        """Return what a pass takes of the host and of the accelerator beside states and fits."""
        micro_batch = self._micro_batch or self.choose_micro_batch()
        work = self._work_bytes(micro_batch, self._length)
        computing = 2 * self._unit + max(self._unit // 2, work) + self._way_back(work)
        if self._on_host:
            return computing + self._packed + self._buffers, 0
        on_device = computing + beside_work_bytes(self._states_bytes(micro_batch, self._length))
        on_host = page_locked_bytes(self._skeleton.slot_bytes) + self._unit + self._packed + self._buffers
        return on_host, on_device

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """What may be taken of the host and of the accelerator; None is no limit."""
        return self._budget.host_bytes, 0 if self._on_host else self._budget.device_bytes

    def reserve_on_device(self, n_bytes: int) -> bool:
        """Keep so many bytes of the accelerator free for fits, if two layers and work leave them.

        Returns:
            Whether they do. States then have what is left.
        """
        _, taken = self.taken()
        limit = self._budget.device_bytes
        if limit is not None and taken + n_bytes > limit:
            return False
        self._fits = n_bytes
        return True

    def reserve_on_host(self, n_bytes: int) -> None:
        """Keep so many bytes of the host free for fits, as far as layers and work leave them.

        States make room for them. A fit that is larger than what is left is begun nevertheless.
        """
        self._host_fits = n_bytes

    def states_factory(self, batches: Sequence[Batch]) -> StatesFactory:
        """Return the maker of places for the states of these batches.

        They may have any lengths; what is left of the budget is kept.

        Raises:
            BudgetError: If weights, work and buffers alone do not fit.
        """
        largest = max(batches, key=lambda batch: self._work_bytes(*batch.ids.shape))
        work = max(self._unit // 2, self._work_bytes(*largest.ids.shape))
        at_work = " x ".join(map(str, largest.ids.shape))
        computing = {"two layers": 2 * self._unit, f"{at_work} tokens at work": work}
        if self._fits:
            computing["fits"] = self._fits
        if self._gradients is not None:
            computing["the way back"] = self._way_back(self._work_bytes(*largest.ids.shape))
        buffers = {"buffers": self._buffers, "a packed weight": self._packed}
        budget = self._budget
        if self._on_host:
            device_left, host = None, {**computing, **buffers}
        else:
            computing["states on their way"] = beside_work_bytes(self._states_bytes(*largest.ids.shape))
            device_left = self._left("device memory", budget.device_bytes, computing)
            staged = page_locked_bytes(self._skeleton.slot_bytes)
            host = {"a layer on its way": staged, "a head on its way": self._unit, **buffers}
        return StatesFactory(
            batches,
            self._skeleton.hidden_size,
            self._skeleton.dtype,
            device=self._skeleton.device,
            device_bytes=device_left,
            host_bytes=self._without_fits(self._left("host memory", budget.host_bytes, host)),
            scratch=budget.scratch,
            beside=sum(host.values()) + self._host_fits,
        )

    def _way_back(self, work: int) -> int:
        """Return what a way back takes beside a forward that holds ``work`` bytes."""
        return 0 if self._gradients is None else 3 * work + self._gradients

    def _without_fits(self, left: int | None) -> int | None:
        return None if left is None else max(0, left - self._host_fits)

    def _work_bytes(self, micro_batch: int, length: int) -> int:
        return micro_batch * length * layer_work_bytes(self._skeleton, length)

    def _states_bytes(self, micro_batch: int, length: int) -> int:
        return micro_batch * length * self._skeleton.hidden_size * self._skeleton.dtype.itemsize

    def _left(self, place: str, limit: int | None, parts: dict[str, int]) -> int | None:
        if limit is None:
            return None
        needed = sum(parts.values())
        if needed > limit:
            listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
            msg = (
                f"a pass over {self._skeleton.root} needs {format_bytes(needed)} of {place} ({listed}), and "
                f"{format_bytes(limit)} are there for it; use a smaller micro-batch or shorter sequences, "
                f"or give --{place.replace(' ', '-')} where the machine has more than it says is free"
            )
            raise BudgetError(msg)
        return limit - needed


def layer_work_bytes(skeleton: Skeleton, length: int) -> int:
    """Return the bytes that a decoder layer of a model at work holds a token of sequences of ``length``."""
    heads = int(getattr(skeleton.config, "num_attention_heads", None) or 0)
    return work_bytes_per_token(
        widest=max(
            max(shape[-2:])
            for layer in range(skeleton.n_layers)
            for shape in skeleton.layer_shapes(layer)
            if len(shape) >= 2
        ),
        hidden=skeleton.hidden_size,
        itemsize=skeleton.dtype.itemsize,
        heads=heads if skeleton.attention == "eager" else 0,
        length=length,
        scan=scan_bytes_per_token(skeleton.config),
    )
