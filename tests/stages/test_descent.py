"""The optimiser of a distillation on functions whose course is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ghoststream.stages.distillation.descent import Course, Descent
from ghoststream.stages.distillation.distill import _diagnostics
from ghoststream.stages.distillation.distilling import HeldOut

pytestmark = pytest.mark.unit


def make(path: Path) -> tuple[dict[str, nn.Parameter], Descent]:
    parameters = {
        "large": nn.Parameter(torch.tensor([30.0, 40.0])),
        "small": nn.Parameter(torch.tensor([[0.003], [-0.004]])),
        "zero": nn.Parameter(torch.zeros(2)),
    }
    return parameters, Descent(parameters, path / "training.safetensors")


def take(parameters: dict[str, nn.Parameter], descent: Descent, rate: float) -> None:
    """One step down the sum of all squared distances from one."""
    descent.zero()
    loss = torch.stack([((one - 1) ** 2).sum() for one in parameters.values()]).sum()
    loss.backward()
    descent.step(rate, loss.item(), tokens=7)


def test_the_first_step_is_a_share_of_the_size_of_each_tensor(tmp_path: Path) -> None:
    parameters, descent = make(tmp_path)
    before = {name: one.detach().clone() for name, one in parameters.items()}
    take(parameters, descent, 0.1)
    # Adam's first step has the sign of the gradient. The sizes are sqrt(1250), sqrt(12.5) / 1000, and one
    # where there is nothing to be relative to.
    moved = {name: (one.detach() - before[name]).abs() for name, one in parameters.items()}
    for name, size in {"large": 35.3553, "small": 0.00353553, "zero": 1.0}.items():
        np.testing.assert_allclose(moved[name], np.full(moved[name].shape, 0.1 * size), rtol=1e-4)


def test_a_check_that_is_no_better_goes_back_and_halves(tmp_path: Path) -> None:
    parameters, descent = make(tmp_path)
    descent.check(1.0)
    take(parameters, descent, 0.1)
    descent.check(0.5)
    best = {name: one.detach().clone() for name, one in parameters.items()}
    for number in range(1, 6):
        assert not descent.course.ended
        take(parameters, descent, 0.1)
        assert not torch.equal(parameters["large"], best["large"])
        descent.check(0.5)  # as good is not better
        assert descent.course.scale == 0.5**number
        for name, one in parameters.items():
            assert torch.equal(one, best[name])
    assert descent.course.ended
    assert [check.scale for check in descent.course.checks] == [1.0, 1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]
    assert (descent.course.best.step, descent.course.best.tokens) == (1, 7)
    # After going back the direction is found anew, so a step is no longer than half of the one before.
    take(parameters, descent, 0.1)
    moved = (parameters["large"].detach() - best["large"]).abs()
    assert float(moved.max()) <= 0.1 * 35.4 * 0.5**5


def test_what_was_saved_is_gone_on_with_to_the_bit(tmp_path: Path) -> None:
    parameters, descent = make(tmp_path)
    other, later = make(tmp_path)
    descent.course.before = (1.0, 2.0)
    descent.check(1.0)
    for divergence in (0.5, 0.7):
        take(parameters, descent, 0.1)
        descent.check(divergence)
    descent.save()
    later.load()
    assert later.course == descent.course
    for trained, course in ((parameters, descent), (other, later)):
        take(trained, course, 0.1)
        course.check(0.6)
    for name, one in parameters.items():
        assert torch.equal(one, other[name])
    assert later.course == descent.course


def test_where_nothing_was_left_it_begins(tmp_path: Path) -> None:
    parameters, descent = make(tmp_path)
    descent.load()
    assert descent.course == Course()
    assert torch.equal(parameters["zero"], torch.zeros(2))


def test_a_training_that_did_not_help_says_so(tmp_path: Path) -> None:
    _, descent = make(tmp_path)
    descent.check(0.5)
    found = _diagnostics(HeldOut(0.5, 2.0), HeldOut(0.5, 2.0), descent.course)
    assert "distillation did not help" in found["warnings"][0]
    assert found["best_step"] == 0
    assert not _diagnostics(HeldOut(0.5, 2.0), HeldOut(0.4, 2.0), descent.course)["warnings"]
