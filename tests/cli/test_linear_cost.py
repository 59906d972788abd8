"""What a command does grows with the layers, and not with their square: calls are counted, not seconds."""

from __future__ import annotations

import cProfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.testing.models import save_tiny
from tests.helpers.command_bench import LENGTH, succeed

pytestmark = pytest.mark.integration
FEW, FACTOR = 12, 4
# Some calls are made a fixed number of times; fewer than so many for each layer do not matter.
MOST_PER_LAYER = 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return tiny models by their numbers of layers, and token ids beside them."""
    root = tmp_path_factory.mktemp("deep")
    np.save(root / "ids.npy", np.random.default_rng(0).integers(3, 128, (2, LENGTH)))
    small: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return {
        n: save_tiny("llama", root / f"{n}", num_hidden_layers=n, max_shard_size="1GB", **small)
        for n in (FEW, FACTOR * FEW)
    }


def counted(work: Callable[[], object]) -> dict[str, int]:
    """Return how often each function is called."""
    profile = cProfile.Profile(builtins=True)
    profile.enable()
    try:
        work()
    finally:
        profile.disable()
    counts: dict[str, int] = {}
    for entry in profile.getstats():
        code = entry.code
        name = code if isinstance(code, str) else f"{code.co_filename}:{code.co_name}"
        counts[name] = counts.get(name, 0) + entry.callcount
    return counts


@pytest.mark.parametrize(
    "arguments",
    [
        ("estimate", "{model}", "--remove", "2", "--no-measure", "--length", LENGTH),
        ("evaluate", "{model}", "--text", "ids:{ids}", "--length", LENGTH),
        (
            "capture",
            "{model}",
            "--calibration",
            "ids:{ids}",
            "--sequences",
            2,
            "--length",
            LENGTH,
            "--store",
            "{out}",
        ),
        ("inspect", "{model}"),
        ("verify", "{model}"),
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_calls_grow_with_the_layers(
    arguments: tuple[object, ...], models: dict[int, Path], tmp_path: Path
) -> None:
    def run(n: int, out: str) -> None:
        names = {"model": models[n], "ids": models[n].parent / "ids.npy", "out": tmp_path / out}
        succeed(*(str(argument).format(**names) for argument in arguments))

    run(FEW, "warm")
    few = counted(lambda: run(FEW, "few"))
    many = counted(lambda: run(FACTOR * FEW, "many"))
    steep = {
        name: (few.get(name, 0), count)
        for name, count in many.items()
        if count > 1.25 * FACTOR * few.get(name, 0) + MOST_PER_LAYER * FACTOR * FEW
    }
    assert not steep
