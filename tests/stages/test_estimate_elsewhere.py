"""Estimates of models and machines that are not here: published sizes, machine files, refusals."""

from __future__ import annotations

import json
import shlex
import shutil
from math import prod
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ghoststream.checkpoint.sizes import read_sizes
from ghoststream.cli import main
from ghoststream.errors import InputNotFoundError, RequestError, UnsupportedModelError
from ghoststream.options import Compute, Method, Recovery, Search, Storage, Text
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.estimation.machine import Machine, find_machine, known_machines
from ghoststream.stages.estimation.models import find_model, shapes
from ghoststream.stages.estimation.report import Estimate
from ghoststream.stages.session import ModelSession
from tests.helpers.command_bench import run, succeed
from tests.helpers.random_ids import random_ids

pytestmark = pytest.mark.unit

# As the model cards and the headers of the published checkpoints have them.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "qwen3-32b": 32_762_123_264,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200,
    "kimi-k2": 1_026_408_232_448,
}
# Billions of parameters that act on a token, as published; the embedding of gpt-oss is left out there.
ACTING = {
    "qwen3-235b-a22b": 22.2,
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39.2,
    "gpt-oss-120b": 5.1,
    "deepseek-v3": 37.6,
    "kimi-k2": 32.9,
}


def refuse(*words: object, says: str) -> None:
    """Give a command that is refused in these words."""
    result = run(*words)
    assert result.exit_code == 2
    assert says in result.stderr


def price(
    model: str | Path, machine: str | Machine = "h100", remove: int | str = 4, **compute: Any
) -> Estimate:
    recovery = Recovery(
        remove=remove,
        calibration=Text(spec="ids:none.npy", sequences=32, length=2048),
        search=Search(criterion="streamline") if isinstance(remove, int) else Search(),
        method=Method(operator="ghost"),
        compute=Compute(**compute),
    )
    return estimate(recovery, model=model, machine=machine)


@pytest.fixture
def machine_file(tmp_path: Path) -> Path:
    path = tmp_path / "ours.yaml"
    find_machine("a100").save(path)
    return path


def test_the_shapes_are_those_that_were_published() -> None:
    assert shapes().keys() == PUBLISHED.keys()
    for name, count in PUBLISHED.items():
        found = find_model(name)
        assert sum(prod(one.shape) for one in found.index.tensors.values()) == count, name
        assert found.root is None


@pytest.mark.parametrize("name", ACTING)
def test_the_weights_that_act_are_those_that_were_published(name: str) -> None:
    sizes = price(name).model
    ends = 1 if name == "gpt-oss-120b" else 2
    acting = sum(layer.acting for layer in sizes.layers) + ends * sizes.vocabulary * sizes.hidden
    assert acting / 1e9 == pytest.approx(ACTING[name], abs=0.1)


def test_a_70b_on_a_card_that_is_not_here() -> None:
    found = price("Llama-3-70B", remove=16)
    assert found.problems == ()
    capture = found.stages[0]
    assert capture.name == "capture"
    assert capture.read_bytes == 2 * (70_553_706_496 - 128_256 * 8192)
    states = 32 * 2048 * 8192 * 2
    assert capture.states == {"device": states, "host": 0, "scratch": 0}
    assert found.needs["disk, store"].n_bytes == pytest.approx(81 * states, rel=1e-4)
    rates = known_machines()["h100"].rates
    assert rates is not None
    assert (
        capture.parts["disk"] == capture.read_bytes / rates.disk_read + capture.write_bytes / rates.disk_write
    )
    assert capture.parts["bus"] == (capture.read_bytes + capture.write_bytes) / (rates.bus or 1)
    assert capture.limited_by == "disk"
    assert shlex.join(found.command).startswith("ghoststream recover meta-llama/Llama-3.1-70B --remove 16 ")


def test_states_go_from_device_to_host_to_scratch() -> None:
    states = 32 * 2048 * 8192 * 2
    on_device = price("llama-3-70b")
    need = on_device.needs["device memory"].n_bytes
    on_host = price("llama-3-70b", device_memory=need - 1)
    assert on_host.stages[0].states == {"device": 0, "host": states, "scratch": 0}
    host = on_host.needs["memory, capture"].n_bytes
    in_scratch = price("llama-3-70b", device_memory=need - 1, host_memory=host - 1)
    assert in_scratch.stages[0].states == {"device": 0, "host": 0, "scratch": states}
    assert in_scratch.stages[0].scratch_bytes == 2 * 80 * states
    assert in_scratch.needs["disk, scratch"].n_bytes == states
    times = [one.stages[0].parts["bus"] for one in (on_device, on_host)]
    assert times[1] - times[0] == pytest.approx(2 * 80 * states / 50e9)


def test_what_a_small_machine_cannot_do_is_said() -> None:
    problems = price("kimi-k2", "4090").problems
    assert [problem.partition(" needs")[0] for problem in problems[:2]] == [
        "device memory",
        "memory, capture",
    ]


def test_a_folder_or_a_file_of_a_configuration_is_enough(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    here = price(tiny_llama, "laptop")
    for model in (tmp_path, tmp_path / "config.json"):
        found = price(model, "laptop")
        assert found.stages == here.stages
        assert found.needs == here.needs
        assert "holds no weights; sizes are those of the model that its configuration says" in found.note
    text = ("--calibration", "ids:none.npy", "--out", tmp_path / "out")
    refuse("recover", tmp_path, "--remove", 1, *text, says="has neither model.safetensors nor")
    measured = estimate(
        Recovery(remove=1, calibration=Text(spec="ids:none.npy", sequences=4, length=8)), model=tmp_path
    )
    assert measured.seconds is not None


def test_a_configuration_of_what_cannot_be_streamed_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="'mamba' cannot be streamed: its recurrent layers"):
        price(tmp_path)


def test_a_machine_comes_back_from_its_file(machine_file: Path) -> None:
    found, known = find_machine(str(machine_file)), find_machine("a100")
    assert found == known
    assert price("llama-3-8b", str(machine_file)).stages == price("llama-3-8b", "a100").stages


def test_this_machine_is_written_and_read(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    words = ("estimate", tiny_llama, "--remove", 2, "--sequences", 4, "--length", 8, "--device", "cpu")
    shown = succeed(*words, "--save-machine", path)
    assert f"next: ghoststream estimate MODEL --remove N --machine {path}" in shown.stdout
    found = find_machine(str(path))
    assert found.name == "mine"
    assert found.rates is not None
    assert set(found.rates.flops) == {"float32", "bfloat16", "float16"}
    assert not found.has_device
    told = json.loads(succeed(*words, "--machine", path, "--json").stdout)
    assert told["machine"]["name"] == "mine"
    assert told["fits"]
    assert told["command"].startswith("ghoststream recover ")
    told_off = "leave --machine and --no-measure out"
    refuse(*words, "--machine", path, "--save-machine", path, says=told_off)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"host_memory": None}, "host_memory: is missing"),
        ({"host_memory": "much"}, "host_memory: 'much' is not an amount of bytes"),
        ({"memory": "1GB"}, "memory: there is no such option"),
        ({"rates": {"disk_read": "0"}}, "rates.disk_read: Input should be greater than or equal to 1"),
        ({"rates": {"flops": {"bfloat16": -1}}}, "rates.flops.bfloat16: Input should be greater than 0"),
        ({"rates": {"flops": {"int8": 1}}}, "rates.flops.int8"),
        ({"rates": {"bus": None}}, "has device_memory and no rates.bus"),
        ({"name": "this"}, "is called this, which is the machine that runs"),
    ],
)
def test_a_field_that_is_wrong_is_named(machine_file: Path, change: dict[str, Any], says: str) -> None:
    data = yaml.safe_load(machine_file.read_text())
    for name, value in change.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    for part in (data, data["rates"]):
        for name in [name for name, value in part.items() if value is None]:
            del part[name]
    machine_file.write_text(yaml.safe_dump(data))
    with pytest.raises(RequestError) as error:
        find_machine(str(machine_file))
    assert says in str(error.value)
    assert str(machine_file) in str(error.value)


def test_machines_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match="no machine 'h200'; choose this, h100, a100, 4090, laptop or a file"
    ):
        find_machine("h200")
    with pytest.raises(InputNotFoundError, match="there is no machine file"):
        find_machine(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RequestError, match="is not a machine: it holds no fields"):
        find_machine(str(tmp_path / "list.yaml"))


def test_a_device_is_asked_of_the_machine_that_is_named(machine_file: Path) -> None:
    assert price("llama-3-8b", device="cuda").stages == price("llama-3-8b").stages
    with pytest.raises(RequestError, match="laptop has no device_memory, and --device cuda asks"):
        price("llama-3-8b", "laptop", device="cuda")
    with pytest.raises(RequestError, match="nothing can be said of --device cpu there"):
        price("llama-3-8b", device="cpu")
    data = yaml.safe_load(machine_file.read_text())
    data["rates"]["flops"] = {"float32": 1e12}
    machine_file.write_text(yaml.safe_dump(data))
    with pytest.raises(RequestError, match="the rates of a100 have no flops for bfloat16; add them"):
        price("llama-3-8b", str(machine_file))
    assert price("llama-3-8b", str(machine_file), dtype="float32").seconds is not None
    del data["rates"]
    machine_file.write_text(yaml.safe_dump(data))
    assert price("llama-3-8b", str(machine_file)).seconds is None


def test_the_command_that_is_printed_can_be_given(tmp_path: Path) -> None:
    words = ["--remove", "3:5 9:10", "--operator", "least-squares", "--features", "hidden", "--no-pack"]
    shown = succeed(
        "estimate", "llama-3-8b", *words[:-1], "--machine", "a100", "--micro-batch", 2, "--layers", "3,5,9:11"
    )
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("run: ")]
    program, name, *given = shlex.split(line.removeprefix("run: "))
    command = main.get_command(click.Context(main), name)
    assert program == "ghoststream"
    assert command is not None
    context = command.make_context(name, given)
    assert context.params["remove"] == "3:5 9:10"
    assert context.params["layers"] == (3, 5, 9, 10)
    assert context.params["micro_batch"] == 2
    assert context.params["model"] == "meta-llama/Llama-3.1-8B"


def test_fits_are_where_there_is_room_for_them() -> None:
    """A map on the state and the MLP of a 70B has p = 36,864 features: 32 (p^2 + p C) bytes are 49 GiB."""
    method = Method(operator="least-squares", features="hidden+mlp")
    text = Text(spec="ids:none.npy", sequences=8, length=512)
    request = Recovery(
        remove="40:56", method=method.model_copy(update={"inputs": "repaired"}), calibration=text
    )
    on_card, on_host = (estimate(request, model="llama-3-70b", machine=name) for name in ("h100", "4090"))
    p, c = 8192 + 28672, 8192
    assert on_card.needs["device memory"].n_bytes > 32 * (p * p + p * c)
    assert "to fit" in on_card.needs["device memory"].formula
    assert on_card.needs["memory, fit"].formula == "U to a power of two + U + the sums of the folds"
    assert on_host.needs["memory, fit"].n_bytes > 32 * (p * p + p * c)
    assert on_host.problems[0].startswith("memory, fit needs")
    solve = [one.stages[0].parts["solve"] for one in (on_card, on_host)]
    assert solve[0] < solve[1] / 10


def test_sums_on_the_host_are_as_fast_as_the_processors_that_work(tiny_llama: Path) -> None:
    laptop = known_machines()["laptop"]

    def solve(processors: int, **compute: Any) -> float:
        machine = laptop.model_copy(update={"processors": processors, "threads": 8})
        request = Recovery(
            remove="1:3",
            method=Method(operator="ghost", inputs="repaired"),
            calibration=Text(spec="c4", sequences=64, length=64),
            compute=Compute(**compute),
        )
        stages = {one.name: one for one in estimate(request, model=str(tiny_llama), machine=machine).stages}
        return stages["fit"].parts["solve"]

    one, two, all_of_them = (solve(count, host_memory=10**9) for count in (1, 2, 8))
    assert (one - all_of_them) / (two - all_of_them) == pytest.approx(7 / 3), "1, 1/2 and 1/8, less 1/8"
    assert all_of_them == solve(8)
    assert solve(8, host_memory=10**6) == pytest.approx(one), "memory for one range at a time"


def test_a_store_is_swept_within_the_memory_of_the_machine() -> None:
    plan = " ".join(f"{start}:{start + 2}" for start in range(3, 75, 6))
    found = {name: price("llama-3-70b", name, plan).sweeps[0] for name in ("h100", "laptop")}
    for name, cost in found.items():
        assert cost.workers * cost.task_bytes <= known_machines()[name].host_memory // 2
    assert found["laptop"].sweeps > found["h100"].sweeps
    assert {cost.spans for cost in found.values()} == {12}


@pytest.mark.parametrize("layers", [(0, 1, 2, 3, 4, 5, 6), (2, 5)])
def test_the_buffers_of_a_store_are_those_that_a_capture_sets_aside(
    layers: tuple[int, ...], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text(spec=random_ids(tmp_path, 8, 64), sequences=8, length=64)
    compute, storage = Compute(device="cpu", micro_batch=2), Storage(layers=layers)
    asked: list[int] = []
    memory = ModelSession.memory

    def told(self: ModelSession, length: int, **named: Any) -> Any:
        asked.append(named.get("buffers", 0))
        return memory(self, length, **named)

    monkeypatch.setattr(ModelSession, "memory", told)
    capture(tiny_llama, calibration=text, store=tmp_path / "store", storage=storage, compute=compute)
    recovery = Recovery(
        remove=1,
        calibration=text,
        search=Search(criterion="streamline"),
        method=Method(operator="ghost"),
        storage=storage if layers == tuple(range(7)) else Storage(),
        compute=compute,
    )
    if layers == (2, 5):
        recovery = recovery.model_copy(update={"remove": "2:5", "search": Search()})
    needs = estimate(recovery, model=tiny_llama, measure=False).needs["memory, capture"]
    sizes, states = read_sizes(tiny_llama), 8 * 64 * 32 * 4
    work = max(sizes.unit_bytes // 2, 2 * 64 * (4 * sizes.widest + 8 * 32) * 4)
    # A shard that is filled has an index of a few bytes besides.
    assert needs.n_bytes - 2 * sizes.unit_bytes - work - states == pytest.approx(max(asked), rel=0.02)
