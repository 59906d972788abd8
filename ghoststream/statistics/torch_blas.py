"""The products of boundaries on an accelerator: Grams and cross-moments grow in its memory, by torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.errors import RequestError
from ghoststream.spans import Span
from ghoststream.statistics.blas import FLOAT32_BLOCK_TOKENS, mirror_upper
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.devices import device_kind, device_tasks, require_device
from ghoststream.statistics.moments import span_prefix
from ghoststream.statistics.sums import SumState

Array = npt.NDArray[np.float64]


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left^T right`` to ``total``, in place.

    Args:
        total: ``(p, C)`` float64.
        left: ``(n, p)`` float64 on the same device, or float32: then products of :data:`FLOAT32_BLOCK_TOKENS`
            rows are summed in float32, and these sums in float64, with the bound that
            :func:`~ghoststream.statistics.blas.add_gram_upper_float32` states.
        right: ``(n, C)`` of the same dtype and device.

    Memory: nothing in float64, ``12 p C`` bytes in float32.
    """
    if left.dtype == torch.float64:
        total.addmm_(left.T, right)
        return
    for part, other in zip(left.split(FLOAT32_BLOCK_TOKENS), right.split(FLOAT32_BLOCK_TOKENS), strict=True):
        total += part.T @ other


class _DeviceState(SumState):
    """Sums of one task, the products of which are on a device until :meth:`fetch`."""

    __slots__ = ("on_device",)

    def __init__(self, arrays: Mapping[str, Array], names: Iterator[str], device: torch.device) -> None:
        super().__init__(arrays)
        self.on_device = {
            name: torch.zeros(self.arrays[name].shape, dtype=torch.float64, device=device) for name in names
        }

    def fetch(self) -> None:
        for name in list(self.on_device):
            np.copyto(self.arrays[name], self.on_device.pop(name).cpu().numpy())


@dataclass(frozen=True)
class DeviceBoundaryReducer(BoundaryReducer):
    """The moments of :class:`BoundaryReducer`, with Gram and cross-moment computed and summed on a device.

    Hidden states are read, weighed and checked on the host; statistics per channel are computed there, so
    they have the same bits as everywhere. Products are those of the device's library: their bits are not the
    host's, and ``device`` is part of what decides the result. Workers of a cluster use their own device of
    that name.

    Args:
        device: Torch device, such as ``cuda`` or ``cuda:1``.

    Raises:
        RequestError: If there is no such kind of device.

    Memory: on the device, one state's ``8 (p^2 per Gram + p C per span)`` bytes and a block of features and
    gap; on the host, what :class:`BoundaryReducer` states.
    """

    device: str = "cuda"

    def __post_init__(self) -> None:
        super().__post_init__()
        device_kind(self.device)

    @property
    def kind(self) -> str:
        """Name of the statistic."""
        return "boundary-on-device"

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {**super().describe(), "device": device_kind(self.device)}

    def most_tasks(self, hidden: int, length: int) -> int | None:
        """Return how many tasks the device has memory for at a time; None where it is the host."""
        rows = max(1, self.spec.block_tokens // length) * length
        moved = 8 * rows * (self._phi.width(hidden) + hidden)
        return device_tasks(self.device, self.state_bytes(hidden, length) + moved)

    def _empty(self, hidden: int, length: int) -> SumState:
        require_device(self.device)
        if self.spec.precision != "float64" and torch.get_float32_matmul_precision() != "highest":
            msg = (
                "torch is set to compute float32 products in less (TF32); set its float32 matmul precision "
                "to highest"
            )
            raise RequestError(msg)
        state = super()._empty(hidden, length)
        names = (name for name in state.arrays if name.endswith(("/gram", "/cross")))
        return _DeviceState(state.arrays, names, torch.device(self.device))

    def _add_features(self, state: SumState, shared: str, features: Array) -> None:
        moved = self._moved(features)
        add_product(_sums(state)[shared + "gram"], moved, moved)

    def _add_pair(self, state: SumState, span: Span, features: Array, gap: Array) -> None:
        add_product(_sums(state)[span_prefix(span) + "cross"], self._moved(features), self._moved(gap))

    def _finish(self, state: SumState) -> None:
        if isinstance(state, _DeviceState):
            state.fetch()
        # A product of a matrix with itself is symmetric but for rounding; all that follows relies on it.
        for prefix in {self._shared(span) for span in self.spans}:
            mirror_upper(state.arrays[prefix + "gram"])

    def _moved(self, rows: Array) -> torch.Tensor:
        dtype = torch.float64 if self.spec.precision == "float64" else torch.float32
        return torch.from_numpy(rows).to(dtype).to(self.device)


def _sums(state: SumState) -> dict[str, torch.Tensor]:
    if not isinstance(state, _DeviceState):
        msg = "sums on a device belong to a state that the reducer made"
        raise TypeError(msg)
    return state.on_device
