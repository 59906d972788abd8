"""The range task of boundaries on a device: states go there once, in the type that they are kept in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ghoststream.errors import NumericsError
from ghoststream.spans import Span
from ghoststream.statistics.block import sequences_in, spans_through
from ghoststream.statistics.boundary import Array, BoundaryReducer
from ghoststream.statistics.device_products import add_product, mirror_upper, require_full_float32
from ghoststream.statistics.devices import device_kind, device_tasks, require_device
from ghoststream.statistics.features import ModelFacts
from ghoststream.statistics.matrices import float64_rows, moved
from ghoststream.statistics.moments import span_prefix
from ghoststream.statistics.source import HiddenStateSource, TensorSource
from ghoststream.statistics.sums import SumState
from ghoststream.statistics.token_weights import BoundaryTokens, Weighting


class DeviceBlock:
    """Unmasked tokens of sequences ``[first, last)`` on a device, as they are kept; each layer is moved once.

    Args:
        source: The hidden states.
        first: First sequence.
        last: Sequence after the last one.
        device: Where they go.
        taps: The same tokens of the taps, where features read them.

    Attributes:
        places: Number of each token, counted over sequences and positions.
        sequences: For each sequence that has tokens, where they are.

    Memory: one tensor of ``(n_tokens, C)`` on the device for each layer that was asked for and not given up.
    """

    def __init__(
        self,
        source: HiddenStateSource,
        first: int,
        last: int,
        device: torch.device,
        taps: DeviceBlock | None = None,
    ) -> None:
        self._source, self._first, self._last, self._device = source, first, last, device
        self.taps = taps
        mask = source.mask(first, last)
        self.places = np.flatnonzero(mask)
        self._all = mask.all()
        self.sequences = sequences_in(mask)
        self._cache: dict[int, torch.Tensor] = {}

    @property
    def n_tokens(self) -> int:
        """Unmasked tokens."""
        return len(self.places)

    def rows(self, layer: int) -> torch.Tensor:
        """Return ``h[layer]``, ``(n_tokens, C)``, in its own dtype."""
        if layer not in self._cache:
            states = self._read(layer).to(self._device, non_blocking=True)
            flat = states.reshape(-1, states.shape[-1])
            self._cache[layer] = flat if self._all else flat[torch.from_numpy(self.places).to(self._device)]
        return self._cache[layer]

    def keep_only(self, layers: set[int]) -> None:
        """Give up all layers but these."""
        self._cache = {layer: rows for layer, rows in self._cache.items() if layer in layers}

    def _read(self, layer: int) -> torch.Tensor:
        source = self._source
        if isinstance(source, TensorSource):
            states: torch.Tensor = source.read(layer, self._first, self._last)
            return states
        return torch.from_numpy(source.read_numpy(layer, self._first, self._last))


class DeviceSums:
    """Sums that grow on a device until :meth:`fetch`."""

    def __init__(self, arrays: Mapping[str, Array], device: torch.device) -> None:
        self.arrays = {
            name: torch.zeros(array.shape, dtype=torch.float64, device=device)
            for name, array in arrays.items()
        }

    def add_in_place(self, other: DeviceSums) -> DeviceSums:
        """Add other sums to these and return these."""
        for name, tensor in self.arrays.items():
            tensor += other.arrays[name]
        return self

    def fetch(self) -> SumState:
        """Return them on the host."""
        return SumState({name: tensor.cpu().numpy() for name, tensor in self.arrays.items()})


@dataclass(frozen=True)
class DeviceBoundaryReducer(BoundaryReducer):
    """The moments of :class:`BoundaryReducer`, computed and summed on a device.

    States go there as they are kept, in two bytes an element for bfloat16, and are widened there; weights are
    found from energies, features computed where the feature can (:attr:`Feature.on_device`). Sums per channel
    are float64. Products are as precise as the specification says. Bits are not the host's: the kind of
    device is part of what decides the result. Workers of a cluster use their own device of that name.

    Args:
        device: Torch device, such as ``cuda`` or ``cuda:1``.

    Raises:
        RequestError: If there is no such kind of device.

    Memory: on the device one state's ``8 (p^2 per Gram + p C per span)`` bytes, in ``float32-blocked`` half
    of the larger product of one span, and some blocks in float64; on the host a state, and what is read of
    the source.
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
        return device_tasks(self.device, self.device_bytes(hidden, length))

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Reduce sequences ``[start, stop)``.

        Raises:
            NumericsError: If a hidden state is NaN or infinite, or a weight negative.
            RequestError: If the store does not say what the feature needs to know of the model, or this
                process has no such device.
        """
        sums = self.begin(source.hidden, source.length)
        self.add(sums, source, start, stop)
        return self.finish(sums)

    def begin(self, hidden: int, length: int) -> DeviceSums:
        """Return sums over nothing.

        Raises:
            RequestError: If this process has no such device, or torch rounds float32 products to TF32.
        """
        require_device(self.device)
        if not self._exact:
            require_full_float32()
        return DeviceSums(self._empty(hidden, length).arrays, torch.device(self.device))

    def add(self, sums: DeviceSums, source: HiddenStateSource, start: int, stop: int) -> None:
        """Add the tokens of sequences ``[start, stop)``."""
        step = max(1, self.spec.block_tokens // source.length)
        facts, device = ModelFacts.of(source.fingerprint), torch.device(self.device)
        taps = self._open_taps()
        for first in range(start, stop, step):
            last = min(first + step, stop)
            beside = None if taps is None else DeviceBlock(taps, first, last, device)
            block = DeviceBlock(source, first, last, device, beside)
            if block.n_tokens:
                self._add_on_device(sums.arrays, block, facts)

    def finish(self, sums: DeviceSums) -> SumState:
        """Return the sums on the host.

        Raises:
            NumericsError: If a state that entered is NaN or infinite.
        """
        if self.grams:
            # A product of a matrix with itself is symmetric but for rounding; what follows relies on it.
            for shared in {self._shared(span) for span in self.spans}:
                mirror_upper(sums.arrays[shared + "gram"])
        state = sums.fetch()
        for span in self.spans:
            own = state.select(span_prefix(span)).arrays
            if not (np.isfinite(own["input_sum"]).all() and np.isfinite(own["gap_sum"]).all()):
                msg = (
                    f"h[{span.start}] or h[{span.stop}] holds NaN or infinity; verify the store, or capture "
                    "again at a dtype of larger range (bfloat16 or float32)"
                )
                raise NumericsError(msg)
        return state

    @property
    def _exact(self) -> bool:
        return self.spec.precision == "float64"

    def _add_on_device(self, arrays: dict[str, torch.Tensor], block: DeviceBlock, facts: ModelFacts) -> None:
        added: set[str] = set()
        for span in spans_through(block, self.spans):
            self._add_span_on_device(arrays, block, span, facts, added)

    def _add_span_on_device(
        self,
        arrays: dict[str, torch.Tensor],
        block: DeviceBlock,
        span: Span,
        facts: ModelFacts,
        added: set[str],
    ) -> None:
        inputs, targets = block.rows(span.start), block.rows(span.stop)
        cut = len(span_prefix(span))
        own = {name[cut:]: sums for name, sums in arrays.items() if name.startswith(span_prefix(span))}
        weighting = Weighting(self._weight, BoundaryTokens(inputs, targets, block.sequences))
        _add_ratios(own, block.sequences, inputs, targets)
        inputs, targets = weighting.select(inputs), weighting.select(targets)
        scaled, wide = weighting.scale(inputs).double(), weighting.scale(targets).double()
        gap = wide - scaled
        _add_channels(own, block.places, weighting, (scaled, wide, gap))
        if not self.grams:
            return
        del wide
        read = inputs if block.taps is None else weighting.select(block.taps.rows(span.start - 1))
        features = weighting.scale(self._features(read, facts))
        shared = self._shared(span)
        if shared not in added:
            added.add(shared)
            arrays[shared + "feature_sum"] += weighting.sum(features.double())
            add_product(arrays[shared + "gram"], features, features, exact=self._exact)
        add_product(own["cross"], features, gap, exact=self._exact)

    def _features(self, read: torch.Tensor, facts: ModelFacts) -> torch.Tensor:
        if self._phi.on_device:
            rows: torch.Tensor = self._phi.rows(read, facts)
            return rows
        on_device: torch.Tensor = moved(self._phi.rows(float64_rows(read), facts), self.device)
        return on_device


def _add_channels(
    own: dict[str, torch.Tensor],
    places: np.ndarray[Any, Any],
    weighting: Weighting,
    triple: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    inputs, _, gap = triple
    own["input_energy"] += (inputs * inputs).sum(dim=0)
    own["input_gap"] += (inputs * gap).sum(dim=0)
    own["gap_energy"] += (gap * gap).sum(dim=0)
    own["input_sum"] += weighting.sum(inputs)
    own["gap_sum"] += weighting.sum(gap)
    own["tokens"] += weighting.n_kept
    own["dropped"] += weighting.n_dropped
    own["weight"] += weighting.total
    length = own["position_energy"].shape[1]
    kept = torch.from_numpy(places[weighting.kept]).to(inputs.device)
    n_sequences = int(places[-1]) // length + 1
    for row, values in enumerate(triple):
        # Every token has a place of its own, so that no order of additions is left open.
        energy = torch.zeros(n_sequences * length, dtype=torch.float64, device=inputs.device)
        energy[kept] = (values * values).sum(dim=1)
        own["position_energy"][row] += energy.view(n_sequences, length).sum(dim=0)


def _add_ratios(
    own: dict[str, torch.Tensor],
    sequences: tuple[slice, ...],
    inputs: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    own["sequences"] += len(sequences)
    for part in sequences:
        before = inputs[part].double().abs().mean(dim=0)
        after = targets[part].double().abs().mean(dim=0)
        zero = before == 0
        own["zero_ratios"] += zero.sum()
        own["ratio_sum"] += torch.where(zero, 1.0, after / torch.where(zero, 1.0, before))
