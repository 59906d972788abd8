"""Copies between host and device beside the computation: a stream of their own on CUDA, nothing on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, Protocol

import torch

Way = Literal["weights", "to device", "to host"]
"""What a stream of copies carries. Each has a stream of its own: a card copies both ways at once."""

# On CUDA the host runs ahead: a call returns when work is launched, not when it is done. The computation
# launches on one stream, each background thread on another, and what must come after what is said three
# times:
#
#     mark() ... beside(mark)  A copy begins behind what was launched up to the mark: it reads that work's
#                              result, or overwrites what that work still reads.
#     the end of beside()      The thread waits for its copies, so a Future that is done means that they are.
#     hand_over(tensor)        Memory that was allocated on the copying stream is not reused before the
#                              computation, which the allocator knows nothing of, is through with it.


class Copies(Protocol):
    """Orders copies that one background thread makes against the computation of the main thread."""

    def mark(self) -> Any:
        """Return a mark behind everything that was computed so far; called by the computing thread."""

    def beside(self, mark: Any = None) -> Any:
        """Return a context whose copies run beside the computation, but behind ``mark``.

        Complete when it ends.
        """

    def hand_over(self, tensor: torch.Tensor) -> torch.Tensor:
        """Let the computation use a tensor that was made beside it."""


class HostCopies:
    """Where device and host are one: whatever a thread has done is done."""

    def mark(self) -> None:
        """Return nothing: the CPU computes in order."""

    def beside(self, mark: None = None) -> nullcontext[None]:
        """Return a context that does nothing."""
        del mark
        return nullcontext()

    def hand_over(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return tensor


class CudaCopies:
    """Copies on a CUDA stream beside the computing one, which the host never waits for."""

    def __init__(self, device: torch.device, way: Way) -> None:
        self._stream = _stream(device, way)
        self._computing = torch.cuda.current_stream(device)

    def mark(self) -> torch.cuda.Event:
        """Return an event behind everything that was launched so far."""
        event = torch.cuda.Event()
        event.record(self._computing)
        return event

    @contextmanager
    def beside(self, mark: torch.cuda.Event | None = None) -> Iterator[None]:
        """Run what is inside on the copying stream, behind ``mark``; its copies are complete at the end."""
        if mark is not None:
            self._stream.wait_event(mark)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            # After an error too: a copy that is under way reads memory which is about to be given back.
            self._stream.synchronize()

    def hand_over(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep the tensor's memory from being used again before the computation is through with it."""
        tensor.record_stream(self._computing)
        return tensor


def copies_for(device: torch.device, way: Way = "to host") -> Copies:
    """Return the kind of copies that a device needs; call it in the thread that computes.

    Args:
        device: Where the computation is.
        way: What is copied. All copies of one kind share a stream.
    """
    return CudaCopies(device, way) if device.type == "cuda" else HostCopies()


@cache
def _stream(device: torch.device, way: Way) -> torch.cuda.Stream:
    # Made once: torch has 32 streams a device and hands them out in turn. One for each layer would soon be
    # that of the weights, and a batch of states would wait for a whole layer.
    del way
    return torch.cuda.Stream(device)
