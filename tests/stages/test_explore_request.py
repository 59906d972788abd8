"""What an exploration refuses before any work, and what it predicts and computes without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM

import ghoststream
from ghoststream.checkpoint.sizes import read_sizes
from ghoststream.errors import OutputExistsError, RequestError
from ghoststream.option_types import Options
from ghoststream.options import Compute, Exploration, Method, Search, Text
from ghoststream.spans import PruningPlan
from ghoststream.stages.exploring.explore import explore, interval
from ghoststream.stages.exploring.numbers import Numbers, counts_of
from ghoststream.stages.exploring.predicted import predict
from tests.helpers.random_ids import random_ids
from tests.helpers.requests import fit

pytestmark = pytest.mark.integration
L, S, T = 6, 8, 16


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(spec=random_ids(tmp_path_factory.mktemp("ids"), S, T), sequences=S, length=T)


@pytest.mark.parametrize(
    ("n_layers", "counts"),
    [
        (3, (1,)),
        (6, (1, 2, 3)),
        (30, tuple(range(1, 16))),
        (32, tuple(range(1, 17))),
        (36, tuple(range(2, 19, 2))),
        (80, tuple(range(3, 41, 3))),
    ],
)
def test_numbers_go_up_to_half_of_the_layers(n_layers: int, counts: tuple[int, ...]) -> None:
    assert counts_of(Exploration(), n_layers) == counts
    assert len(counts) <= 16


def test_lengths_are_the_numbers_and_the_parts_of_plans_of_several_spans() -> None:
    numbers = Numbers(30, (6, 9), 2, 3)
    assert numbers.tried(9) == [[9], [5, 4], [6, 3]]
    assert numbers.parts == [2, 3, 4, 5, 6]
    assert numbers.sizes == [2, 3, 4, 5, 6, 9]
    assert Numbers(30, (6, 9), 1, 3).sizes == [6, 9]


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"exploration": {"counts": "4,5"}}, r"cannot remove 5 of 6 layers.*give --counts from 1 to 4"),
        ({"exploration": {"counts": "0,1"}}, r"cannot remove 0 of 6 layers"),
        ({"exploration": {"broken": 0.1}}, r"--broken 0.1 is not above --cheap 0.2; give a larger one"),
        ({"search": {"criterion": "sleb"}}, r"--criterion would not be used: an exploration ranks"),
        ({"search": {"beam": 2, "candidates": 3}}, r"--beam, --candidates would not be used"),
        ({"method": {"refit": 1}}, r"--refit would not be used"),
        ({"method": {"ridge": 1e-3}}, r"--ridge would not be used"),
        ({"method": {"operator": "ghost", "solver": "svd", "per_layer": True}}, r"needs a store"),
        ({"search": {"held_out": 8}}, r"8 sequences.* cannot be parted"),
    ],
)
def test_refused_before_any_pass(
    groups: dict[str, dict[str, Any]], said: str, tiny_llama: Path, text: Text, tmp_path: Path
) -> None:
    classes: dict[str, type[Options]] = {"exploration": Exploration, "search": Search, "method": Method}
    given: dict[str, Any] = {name: classes[name].make(values) for name, values in groups.items()}
    with pytest.raises(RequestError, match=said):
        explore(tiny_llama, calibration=text, out=tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["explore.json", "curve.csv", "plans/remove-2.json"])
def test_what_is_there_already_is_left_alone(name: str, tiny_llama: Path, text: Text, tmp_path: Path) -> None:
    place = tmp_path / "out" / name
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    with pytest.raises(OutputExistsError, match="exists and is not the result of this request"):
        explore(tiny_llama, calibration=text, out=tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [place]


@pytest.mark.parametrize(
    "method",
    [
        {"operator": "ghost"},
        {"operator": "none"},
        {"operator": "diagonal"},
        {"operator": "least-squares", "features": "mlp"},
        {"operator": "least-squares", "features": "hidden+mlp"},
        {"operator": "least-squares", "features": "hidden+normed"},
    ],
    ids=lambda method: "-".join(method.values()),
)
def test_sizes_and_speed_are_those_of_the_weights_of_the_model_that_is_written(
    method: dict[str, Any], tiny_llama: Path, text: Text, tmp_path: Path
) -> None:
    plan = PruningPlan.parse(L, "1:2 3:5")
    operators, out = tmp_path / "operators.safetensors", tmp_path / "out"
    source: dict[str, Any] = {"model": tiny_llama, "calibration": text.spec, "sequences": S, "length": T}
    fitted = fit("1:2 3:5", out=operators, micro_batch=2, **source, **method)
    exported = ghoststream.export(tiny_llama, operators=operators, out=out)
    methods = (Method.make(method),) * len(fitted.boundaries)
    found = predict(read_sizes(tiny_llama), plan, methods, itemsize=4)
    assert found.weight_bytes == exported.bytes_after
    dense, left = _multiplied(tiny_llama), _multiplied(out)
    assert found.decode_speedup == pytest.approx(sum(dense) / sum(left))
    assert found.prefill_speedup == pytest.approx(dense[0] / left[0])
    assert found.cache_share == 0.5


def _multiplied(model: Path) -> tuple[int, int]:
    """Weights that a token is multiplied with: those of the layers with the operators, and of the head."""
    resident = AutoModelForCausalLM.from_pretrained(model)
    head = resident.get_output_embeddings()
    linear = [one for one in resident.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    diagonal = [
        one for name, one in resident.named_parameters() if name.endswith("ghost.weight") and one.ndim == 1
    ]
    return sum(one.weight.numel() for one in linear) + sum(map(len, diagonal)), head.weight.numel()


@pytest.mark.parametrize("n_windows", [2, 5, 40])
def test_the_interval_is_students(n_windows: int) -> None:
    values = np.random.default_rng(n_windows).normal(0.3, 0.1, n_windows)
    error = values.std(ddof=1) / np.sqrt(n_windows)
    expected = scipy.stats.t.interval(0.95, n_windows - 1, loc=values.mean(), scale=error)
    assert interval(values.mean(), error, n_windows) == pytest.approx(expected)


def test_one_window_has_no_interval() -> None:
    assert interval(0.3, None, 1) == (None, None)


def test_one_window_to_measure_on_is_enough(tiny_llama: Path, text: Text) -> None:
    found = explore(
        tiny_llama,
        calibration=text,
        search=Search(held_out=1, max_spans=1),
        exploration=Exploration(counts=(1,)),
        compute=Compute(micro_batch=1),
    )
    assert found.points[0].gap_low is None
    assert "(unknown)" in found.to_text()
