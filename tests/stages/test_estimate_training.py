"""What ``estimate`` says of a training, against sizes counted by hand."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from ghoststream.options import Recovery
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.estimation.machine import find_machine
from ghoststream.stages.estimation.report import Estimate, StageCost
from tests.helpers.command_bench import BAD_REQUEST, run

pytestmark = pytest.mark.unit
S, T, C, L, V = 12, 16, 32, 6, 128
#: Parameters of a decoder layer of the tiny model that act on a token.
LAYER = 8_768


def _price(model: Path, distill: Any, **changes: Any) -> Estimate:
    text = {"spec": "ids:none.npy", "sequences": S, "length": T}
    method = {"operator": "ghost", "inputs": "repaired"}
    request = {"remove": "2:4", "calibration": text, "method": method, "compute": {"device": "cpu"}}
    return estimate(Recovery.make({**request, "distill": distill, **changes}), model=model, measure=False)


def _stage(found: Estimate) -> StageCost:
    return next(stage for stage in found.stages if stage.name == "distill")


def test_nothing_is_priced_that_is_not_asked_for(tiny_llama: Path) -> None:
    found = _price(tiny_llama, None)
    assert [stage.name for stage in found.stages] == ["fit", "export"]
    assert not [name for name in found.needs if "distill" in name]


def test_disk_is_that_of_the_dense_model_and_of_what_is_trained(tiny_llama: Path) -> None:
    found = _price(tiny_llama, {"top": 10})
    # One map, two norms of each of the two layers behind the span, and the final norm.
    trained = C * C + 5 * C
    assert found.needs["disk, distill"].n_bytes == S * T * (4 * C + 8 * 10) + 16 * trained
    alone = _price(tiny_llama, {"top": 10, "train": "operators"})
    assert alone.needs["disk, distill"].n_bytes == S * T * (4 * C + 8 * 10) + 16 * C * C
    # No more logits than there are.
    assert _price(tiny_llama, {"top": 1000}).needs["disk, distill"].n_bytes == (
        S * T * (4 * C + 8 * V) + 16 * trained
    )


def test_each_step_takes_its_share_of_the_arithmetic(tiny_llama: Path) -> None:
    few, many = (_stage(_price(tiny_llama, {"steps": steps, "batch": 8})) for steps in (2, 6))
    # There, there again, and back through two layers; a look at three windows after every step.
    step = 3 * 8 * T * 2 * (2 * LAYER + 2 * T * C)
    look = 3 * T * 2 * (2 * LAYER + 2 * T * C)
    assert many.flops - few.flops == pytest.approx(4 * (step + look), rel=0.05)
    # Layers that are in memory are read once.
    assert many.read_bytes == few.read_bytes


@pytest.mark.parametrize(("machine", "saves"), [("h100", 5 + 4), ("laptop", 5 + 4 * 11)])
def test_what_is_saved_is_waited_for(machine: str, saves: int) -> None:
    # 32 windows are held out, eight are a step: a look every 12 steps, five in 48. Between two looks pass
    # one to two minutes on the one machine. On the other each step takes longer than a minute.
    recovery = Recovery.make(
        {
            "remove": 8,
            "calibration": {"spec": "ids:none.npy", "sequences": 128, "length": 2048},
            "method": {"operator": "ghost", "inputs": "repaired"},
            "distill": {"steps": 48},
        }
    )
    found = estimate(recovery, model="llama-3-70b", machine=machine)
    stage, hidden = _stage(found), 8192
    rates = find_machine(machine).rates
    assert rates is not None
    # The measured choice takes two spans at most. The layers behind the first one have two norms each.
    norms = found.needs["disk, distill"].n_bytes - 128 * 2048 * (2 * hidden + 8 * 100) - 2 * 16 * hidden**2
    assert 16 * hidden < norms < 16 * 2 * 80 * hidden
    minutes = (stage.seconds or 0.0) / 4 / 60
    assert 1 < minutes < 2 if machine == "h100" else minutes > 12
    saved = saves * (norms + 2 * 16 * hidden**2)
    assert stage.parts["save"] == pytest.approx(saved / rates.disk_write + saved / 2e9)
    assert stage.seconds == pytest.approx(
        stage.parts["start"]
        + max(stage.parts[one] for one in ("disk", "compute"))
        + stage.parts["solve"]
        + stage.parts["save"]
    )
    assert stage.write_bytes == 128 * 2048 * (2 * hidden + 8 * 100) + saved


def test_memory_is_that_of_a_way_back() -> None:
    recovery = Recovery.make(
        {
            "remove": "20:24",
            "calibration": {"spec": "ids:none.npy"},
            "method": {"operator": "ghost", "inputs": "repaired"},
            "compute": {"micro_batch": 2},
            "distill": {"batch": 64},
        }
    )
    need = estimate(recovery, model="llama-3-8b", machine="laptop").needs["memory, distill"]
    assert "the way back" in need.formula
    hidden, wide, vocabulary, length = 4096, 14_336, 128_256, 512
    unit, forward = 2 * hidden * vocabulary, 2 * length * (4 * wide + 8 * hidden) * 2
    trained = hidden**2 + (2 * 8 + 1) * hidden
    # What enters each of the eight layers behind the gap, the states on their way, and their gradient.
    states = (8 + 2) * 64 * length * hidden * 2
    assert need.n_bytes == 2 * unit + max(unit // 2, forward) + 3 * forward + 20 * trained + states


def test_the_command_is_one_that_can_be_given(tiny_llama: Path) -> None:
    def words(distill: Any) -> list[str]:
        return shlex.split(_price(tiny_llama, distill).to_json()["command"])[-4:]

    assert words(True)[1] == "--distill"
    assert words({"steps": 7})[:2] == ["--distill", "7"]
    # Two epochs of nine windows, eight a step.
    assert words({"epochs": 2})[:2] == ["--distill", "4"]
    assert words({"epochs": 2, "batch": 4}) == []


def test_an_exploration_trains_nothing(tiny_llama: Path) -> None:
    result = run("estimate", tiny_llama, "--explore", "--distill", "--no-measure")
    assert result.exit_code == BAD_REQUEST
    assert "--distill would not be used" in result.stderr


def test_a_round_of_boosting_is_priced(tiny_llama: Path) -> None:
    asked = {"top": 10, "steps": 0, "held_out": 3}
    one, three = (_stage(_price(tiny_llama, {**asked, "boost": rounds})) for rounds in (1, 3))
    # A fit on nine windows, there, there again and back; five lengths and a look on three others.
    layers = 2 * (2 * LAYER + 2 * T * C)
    fits = 9 * T * (C**2 + 2 * C**2) + (1 + 5 * 4) * (C**3 / 3 + 4 * C**3)
    round_ = 3 * 9 * T * layers + (5 + 1) * 3 * T * layers + fits
    assert three.flops - one.flops == pytest.approx(2 * round_, rel=0.1)


def test_memory_of_a_round_is_that_of_a_way_back_and_of_its_fit() -> None:
    recovery = Recovery.make(
        {
            "remove": "20:24",
            "calibration": {"spec": "ids:none.npy", "sequences": 128},
            "method": {"operator": "least-squares", "features": "hidden+mlp", "inputs": "repaired"},
            "compute": {"micro_batch": 2},
            "distill": {"boost": 1, "steps": 0},
        }
    )
    found = estimate(recovery, model="llama-3-8b", machine="laptop")
    need, whole = found.needs["memory, distill"], dict(found.needs)
    hidden, wide, vocabulary, length = 4096, 14_336, 128_256, 512
    unit, forward = 2 * hidden * vocabulary, 2 * length * (4 * wide + 8 * hidden) * 2
    operator = 4 * hidden * (hidden + wide)
    # What enters each of the nine layers that are run, the states on their way and their gradient; what the
    # map reads, and the gradient behind it; of 96 windows.
    states = ((9 + 2) * hidden + (hidden + wide) + hidden) * 96 * length * 2
    rest = 2 * unit + max(unit // 2, forward) + 3 * forward + 2 * operator
    scratch = whole["disk, scratch"].n_bytes if "disk, scratch" in whole else 0
    fit = found.needs["memory, fit"].n_bytes
    assert need.n_bytes + scratch >= rest + states
    assert need.n_bytes + scratch <= rest + states + fit
