"""Layers chosen by the size of their weights alone, against sums of single entries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ghoststream.errors import RequestError
from ghoststream.options import Method
from ghoststream.selection import Residual, make_criterion
from ghoststream.spans import Span
from ghoststream.statistics import FinalNorm, Reducer, SumState
from ghoststream.testing.states import random_states, store_of
from tests.helpers.requests import select

pytestmark = pytest.mark.unit


class Weights:
    """Evidence that has weights only."""

    def __init__(self, layers: list[dict[str, torch.Tensor]]) -> None:
        self.layers, self.n_layers = layers, len(layers)
        self.read: list[int] = []

    def final_norm(self) -> FinalNorm:
        raise AssertionError

    def layer_weights(self, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        self.read.append(layer)
        yield from self.layers[layer].items()

    def reduce(self, reducer: Reducer) -> SumState:
        raise AssertionError

    def residuals(self, spans: tuple[Span, ...], method: Method, folds: int) -> dict[Span, Residual]:
        raise AssertionError


def random_weights(n_layers: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"q.weight": (7, 5), "experts": (3, 4, 6), "norm.weight": (1000,), "q.bias": (7,)}
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(n_layers)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("criterion", "power", "first", "stop"),
    [("magnitude", 1, 0, 12), ("magnitude-l2", 2, 0, 12), ("magnitude-plus", 1, 4, 10)],
)
@pytest.mark.parametrize(
    ("suffix", "counted"),
    [("", ("q.weight", "experts")), ("-published", ("q.weight", "experts", "norm.weight"))],
)
def test_magnitude_takes_the_layers_of_smallest_weights(
    criterion: str,
    power: int,
    first: int,
    stop: int,
    dtype: torch.dtype,
    suffix: str,
    counted: tuple[str, ...],
) -> None:
    layers = random_weights(12, dtype)
    evidence = Weights(layers)
    choice = make_criterion(criterion + suffix).choose(evidence, 3)
    sums = {
        layer: sum((abs(x) ** power for name in counted for x in weights[name].flatten().tolist()), 0.0)
        for layer, weights in enumerate(layers)
        if first <= layer < stop
    }
    assert [span.start for span, _ in choice.scores] == list(range(first, stop))
    np.testing.assert_allclose([score for _, score in choice.scores], list(sums.values()), rtol=1e-12)
    assert {span.start for span in choice.chosen} == set(sorted(sums, key=lambda layer: sums[layer])[:3])
    assert evidence.read == list(range(first, stop))


def test_large_tensors_are_summed_in_blocks() -> None:
    weight = torch.arange(3 * 2**20 + 5, dtype=torch.float32).remainder(7).reshape(-1, 1)
    choice = make_criterion("magnitude").choose(Weights([{"w": weight}] * 2), 1)
    assert choice.scores[0][1] == float(weight.double().sum())
    assert choice.chosen == (Span(0, 1),)


def test_magnitudes_need_a_model(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(8, (6, 10, 12), seed=3))
    with pytest.raises(RequestError, match=r"reads the weights of the model; give the checkpoint .*--model"):
        select(2, store=uri, criterion="magnitude")
