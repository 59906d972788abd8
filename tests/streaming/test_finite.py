"""NaN and infinity are found in every dtype, at once on the CPU."""

from __future__ import annotations

import pytest
import torch

from ghoststream.errors import NumericsError
from ghoststream.streaming.finite import FiniteFlags, finite_flag

pytestmark = pytest.mark.unit
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 104])
def test_one_bad_value_is_found_wherever_it_is(dtype: torch.dtype, bad: float, place: int) -> None:
    values = torch.linspace(-3, 3, 105).to(dtype)
    assert bool(finite_flag(values.view(3, 5, 7)))
    values[place] = bad
    assert not bool(finite_flag(values.view(3, 5, 7)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_values_are_finite(dtype: torch.dtype) -> None:
    ends = torch.finfo(dtype)
    assert bool(finite_flag(torch.tensor([ends.min, ends.max], dtype=dtype)))


def test_on_the_cpu_a_note_raises_and_nothing_is_left_to_look_at() -> None:
    flags = FiniteFlags()
    flags.note(torch.ones(3), lambda: NumericsError("no"))
    with pytest.raises(NumericsError, match="here"):
        flags.note(torch.tensor([1.0, float("nan")]), lambda: NumericsError("here"))
    flags.look()
