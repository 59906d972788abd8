"""The estimate of an exploration: its passes and its arithmetic against those of one that was run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ghoststream.cli import main
from ghoststream.costs import PassCost, SearchShape
from ghoststream.options import Compute, Exploration, Search, Text
from ghoststream.stages.choosing.ways import EVERY, METHODS
from ghoststream.stages.exploring.cost import exploring
from ghoststream.stages.exploring.explore import explore
from ghoststream.stages.exploring.numbers import Numbers, counts_of
from ghoststream.stages.exploring.report import ExplorationReport

pytestmark = pytest.mark.integration
L, S, T, V, C = 6, 8, 24, 128, 32


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, V, size=(S, T)))
    return path


def _passes(max_spans: int) -> tuple[PassCost, ...]:
    exploration, search = Exploration(), Search(max_spans=max_spans)
    shape = SearchShape(L, 3, C, 64, S, T, search, METHODS, EVERY.later)
    return exploring(shape, Numbers(L, counts_of(exploration, L), max_spans, exploration.per_count))


def _explored(model: Path, ids: Path, max_spans: int) -> ExplorationReport:
    return explore(
        model,
        calibration=Text(spec=f"ids:{ids}", sequences=S, length=T),
        search=Search(max_spans=max_spans),
        compute=Compute(device="cpu", micro_batch=1),
    )


@pytest.mark.parametrize("max_spans", [1, 2])
def test_passes_and_arithmetic_are_those_of_an_exploration(
    tiny_llama: Path, ids: Path, max_spans: int
) -> None:
    passes, spent = _passes(max_spans), _explored(tiny_llama, ids, max_spans).spent
    assert len(passes) == spent.passes
    # Lanes are dense passes over all windows; runs are single layers, and heads, of single windows. What is
    # left out while it runs is counted by the estimate.
    lanes, scored = sum(one.lanes for one in passes) * L * S, sum(one.scored for one in passes) * S
    assert 0.7 * spent.layer_runs < lanes < 2 * spent.layer_runs
    assert 0.7 * spent.head_runs < scored < 2 * spent.head_runs


def _run(*words: str) -> Any:
    return CliRunner().invoke(main, ["estimate", *words, "--no-measure", "--device", "cpu"])


def test_the_command_prices_an_exploration(tiny_llama: Path) -> None:
    given = ("--explore", "--counts", "1,2", "--sequences", str(S), "--length", str(T))
    shown = _run(str(tiny_llama), *given)
    assert shown.exit_code == 0, shown.output
    assert "6, up to 2 of them removed" in shown.stdout
    assert "memory, explore" in shown.stdout
    assert "run: ghoststream explore" in shown.stdout
    assert "--counts 1,2" in " ".join(shown.stdout.split())
    assert "--max-spans" not in shown.stdout
    data = json.loads(_run(str(tiny_llama), *given, "--json").stdout)
    assert (data["explores"], data["n_removed"], data["stores"]) == (True, 2, [])
    (stage,) = data["stages"]
    size = data["model"]["checkpoint_bytes"]
    assert stage["name"] == "explore"
    assert 3 * size < stage["read_bytes"] < 4 * size, "four passes, the first of which reads no head"
    more = json.loads(_run(str(tiny_llama), *given[:2], "1:4", *given[3:], "--json").stdout)
    assert more["stages"][0]["flops"] > stage["flops"]
    assert more["stages"][0]["read_bytes"] == stage["read_bytes"], "as many passes for more numbers"


def test_a_limit_of_spans_that_one_layer_cannot_reach_is_none(tiny_llama: Path) -> None:
    one = ("--explore", "--counts", "1", "--sequences", str(S), "--length", str(T), "--json")
    found = [json.loads(_run(str(tiny_llama), *one, *more).stdout) for more in ((), ("--max-spans", "2"))]
    assert "--max-spans" not in found[0]["command"]
    assert found[0]["stages"][0]["flops"] > 0
    assert found[1]["fits"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "say what is to be done: either --remove N, as for recover, or --explore"),
        (("--remove", "2", "--explore"), "say what is to be done"),
        (("--remove", "2", "--counts", "1,2"), "--counts would not be used: no --explore is given"),
        (("--explore", "--counts", "5"), "cannot remove 5 of 6 layers"),
        (
            ("--explore", "--beam", "2"),
            "--beam would not be used: an exploration ranks and measures by itself",
        ),
        (("--explore", "--store-dtype", "bfloat16"), "an exploration writes neither store nor checkpoint"),
    ],
)
def test_what_is_refused(tiny_llama: Path, words: tuple[str, ...], says: str) -> None:
    found = _run(str(tiny_llama), *words, "--sequences", str(S), "--length", str(T))
    assert found.exit_code == 2
    assert says in " ".join(found.stderr.split())
