"""Moments that are computed on CUDA agree with those of numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ghoststream.spans import Span
from ghoststream.statistics import Precision
from ghoststream.statistics.device_boundary import DeviceBoundaryReducer
from ghoststream.statistics.device_products import PRODUCT_ERROR
from ghoststream.testing.states import ragged_mask, random_states, store_of
from tests.helpers.reducing import moments_of
from tests.helpers.requests import fit, ranges_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICE = "cuda"
SPANS = (Span(0, 2), Span(1, 3))


@pytest.mark.parametrize("precision", ["float64", "float32-blocked"])
def test_grams_and_cross_moments_are_those_of_numpy(tmp_path: Path, precision: Precision) -> None:
    shape = (12, 200, 96)
    uri = store_of(tmp_path / "store", random_states(3, shape), mask=ragged_mask(*shape[:2]))
    found = moments_of(uri, SPANS, DeviceBoundaryReducer, precision=precision, device=DEVICE, workers=3)
    expected = moments_of(uri, SPANS)
    tolerance = 1e-13 if precision == "float64" else PRODUCT_ERROR
    for span in SPANS:
        one, other = found[span].total(), expected[span].total()
        energy, gap = np.diag(other.gram), other.gap_energy
        assert (np.abs(one.gram - other.gram) <= tolerance * np.sqrt(np.outer(energy, energy))).all()
        assert (np.abs(one.cross - other.cross) <= tolerance * np.sqrt(np.outer(energy, gap))).all()


def test_the_number_of_tasks_at_a_time_changes_no_bit(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(3, (12, 100, 64)))
    files = [tmp_path / f"{workers}.safetensors" for workers in (1, 3)]
    for workers, out in zip((1, 3), files, strict=True):
        with ranges_of(1):
            fit("0:2", store=uri, out=out, device=DEVICE, workers=workers)
    assert files[0].read_bytes() == files[1].read_bytes()
