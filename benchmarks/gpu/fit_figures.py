"""A fit of the size of a 70B's on a device: seconds, and memory against what is reserved for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from steps import Run, device_peaks, release, reset_peaks, sync

from ghoststream.operators import OperatorKind, make_operator
from ghoststream.operators.solver import spectrum
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.stages.choosing.room import FitBytes
from ghoststream.statistics import FoldedMoments, Ranges, SumState, TapSource
from ghoststream.statistics.device_boundary import DeviceBoundaryReducer

_HIDDEN, _MLP = 8192, 28672
_SPAN, _LENGTH, _FOLDS = Span(1, 2), 2048, 2
_SHARE = 0.85
"""Of free memory that is used at most."""


class Sums:
    """Made-up sums of folds, and the fit of them.

    Grams are near the identity: what is solved takes as long as any, and no eigenvectors are asked for.
    """

    def __init__(self, run: Run, parts: int) -> None:
        self.device = run.o.device
        self.hidden, self.width = _HIDDEN // parts, (_HIDDEN + _MLP) // parts
        self.kind: OperatorKind = make_operator(Method(operator="least-squares", features="hidden+mlp"))
        taps, ranges = TapSource("", self.width), Ranges.make(2 * _FOLDS, folds=_FOLDS)
        self.bytes = FitBytes.of(self.kind, ranges, hidden=self.hidden, length=_LENGTH, tap_width=self.width)
        self._reducer = self.kind.reducer((_SPAN,), hidden=self.hidden, taps=taps, device=self.device)

    def has_room(self) -> bool:
        """Whether device and host hold it."""
        free = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        host = 1024 * int(free["MemAvailable"].split()[0])
        device = host if self.device == "cpu" else torch.cuda.mem_get_info()[0]
        return self.bytes.device <= _SHARE * device and self.bytes.host <= _SHARE * host

    def gram(self) -> torch.Tensor:
        """Return a Gram on the device, both triangles alike."""
        gram = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        gram.diagonal().copy_(torch.linspace(1.0, 2.0, self.width, dtype=torch.float64))
        return gram.add_(1.0 / self.width)

    def moments(self) -> FoldedMoments:
        """Return the moments of all folds, which wait on the host."""
        return FoldedMoments(_SPAN, [self._fold() for _ in range(_FOLDS)], feature=self.kind.features)

    def _fold(self) -> SumState:
        assert isinstance(self._reducer, DeviceBoundaryReducer)
        sums = self._reducer.begin(self.hidden, _LENGTH)
        for name, tensor in sums.arrays.items():
            if name.endswith("gram"):
                # What is below the diagonal is not read.
                tensor.normal_(std=0.1 * self.width**-0.5)
                tensor.diagonal().add_(1.0)
            elif name.endswith("cross"):
                tensor.normal_(std=0.1)
            else:
                tensor.fill_(float(self.width))
        return self._reducer.finish(sums)


def fits(run: Run) -> None:
    """Measure a spectrum and a fit, of 36,864 features, or a half, a quarter ... where there is less room."""
    parts = 256 if run.o.tiny else 1
    while parts < 64 and not Sums(run, parts).has_room():
        parts *= 2
    made = Sums(run, parts)
    # Apart, as a library may refuse a spectrum of this size: a fit goes on without.
    run.step("spectrum_on_device", lambda: _measured(run, lambda: _spectrum(made)), least=60)
    run.step("fit_on_device", lambda: _fit(run, made), least=60)


def _spectrum(made: Sums) -> dict[str, Any]:
    found = spectrum(made.gram())
    return {"features": made.width, "condition_number": found.condition_number}


def _fit(run: Run, made: Sums) -> dict[str, Any]:
    begun, moments = time.perf_counter(), made.moments()
    summed = time.perf_counter() - begun
    release(run.o.device)
    on_device = moments.on_device(run.o.device)
    found = _measured(run, lambda: {"finite": _is_finite(made.kind, on_device)})
    peak = found.get("peak_allocated")
    return {
        "features": made.width,
        "hidden": made.hidden,
        "folds": _FOLDS,
        "made_seconds": round(summed, 2),
        "reserved_for_it": made.bytes.device,
        "peak_over_reserved": None if peak is None else round(peak / made.bytes.device, 3),
        **found,
    }


def _is_finite(kind: OperatorKind, moments: FoldedMoments) -> bool:
    weight = kind.solve(moments).weight
    return weight is not None and bool(torch.from_numpy(weight).isfinite().all())


def _measured(run: Run, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    reset_peaks(run.o.device)
    begun = time.perf_counter()
    found = work()
    sync(run.o.device)
    seconds = round(time.perf_counter() - begun, 2)
    return {"seconds": seconds, **(device_peaks() if run.on_gpu else {}), **found}
