"""The estimate of a recovery that several devices share, against what runs deal out, send and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.checkpoint.sizes import read_sizes
from ghoststream.errors import RequestError
from ghoststream.options import Compute, Exploration, Method, Recovery, Reduction, Search, Text
from ghoststream.stages.choosing import fit_shares
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.machine import find_machine
from ghoststream.stages.estimation.report import Estimate, StageCost
from ghoststream.stages.estimation.shares import SharedFit
from ghoststream.stages.recover import run
from ghoststream.stages.workers import Workers
from tests.helpers.command_bench import succeed
from tests.helpers.crews import cluster_of

pytestmark = pytest.mark.integration
CARDS = "cuda:0,cuda:1"
S, T = 22, 12


def request(remove: int | str, device: str, spec: str = "ids:none.npy", **groups: Any) -> Recovery:
    text = Text(spec=spec, sequences=S, length=T)
    compute = Compute(device=device, micro_batch=2)
    return Recovery(remove=remove, calibration=text, compute=compute, **groups)


def price(model: str, device: str, remove: int | str = 16, **given: Any) -> Estimate:
    text = Text(spec="ids:none.npy", sequences=32, length=2048)
    asked = {name: given.pop(name) for name in ("cluster", "exploration") if name in given}
    machine = given.pop("machine", "h100")
    recovery = Recovery(remove=remove, calibration=text, compute=Compute(device=device), **given)
    return estimate(recovery, model=model, machine=machine, **asked)


def stage(found: Estimate, name: str) -> StageCost:
    (one,) = [one for one in found.stages if one.name == name]
    return one


@pytest.mark.parametrize("model", ["llama-3-70b", "llama-3-405b"])
def test_two_cards_share_disk_and_bus_and_halve_the_layers(model: str) -> None:
    store: dict[str, Any] = {"search": Search(criterion="streamline"), "method": Method(operator="ghost")}
    alone, both = (stage(price(model, device, **store), "capture") for device in ("cuda:0", CARDS))
    weights = alone.read_bytes
    assert both.read_bytes == 2 * weights
    assert both.write_bytes == alone.write_bytes
    rates = find_machine("h100").rates
    assert rates is not None
    assert rates.bus is not None
    # 131 GiB fit the memory of the host, where the second reader finds them; 756 GiB do not.
    again = 0 if model == "llama-3-70b" else weights
    assert both.parts["disk"] == pytest.approx(alone.parts["disk"] + again / rates.disk_read)
    assert both.parts["bus"] == pytest.approx(alone.parts["bus"] + weights / rates.bus)
    assert both.parts["compute"] == pytest.approx(alone.parts["compute"] / 2)
    assert both.parts["writer"] == alone.parts["writer"]
    assert both.parts["workers"] > 0
    assert "workers" not in alone.parts
    assert both.flops == alone.flops
    assert {place: 2 * size for place, size in both.states.items() if size} == {
        "device": 2 * sum(both.states.values())
    }


def test_memory_is_that_of_each_device_and_of_the_host() -> None:
    method: dict[str, Any] = {
        "method": Method(operator="least-squares", features="hidden", inputs="repaired")
    }
    alone, both = (price("llama-3-70b", device, "40:56", **method) for device in ("cuda:0", CARDS))
    states = 32 * 2048 * 8192 * 2
    on_device = alone.needs["device memory"].n_bytes - both.needs["device memory"].n_bytes
    assert on_device == states, "each has half of the dense states and of the repaired ones"
    assert "on each device" in both.needs["device memory"].formula
    assert both.needs["memory, fit"].n_bytes == 2 * alone.needs["memory, fit"].n_bytes
    assert both.needs["memory, fit"].formula.startswith("2 x (U to a power of two + U + ")
    merging = both.needs["memory, merge"].n_bytes - both.needs["memory, fit"].n_bytes
    # 16 ranges in 4 folds: each of the two workers has half of every tree, one sum of p = C a fold.
    assert merging == pytest.approx(2 * 4 * 8 * (8192**2 + 8192 * 8192), rel=0.01)
    assert stage(both, "fit").parts["workers"] > merging / 1e9
    assert stage(both, "export") == stage(alone, "export")


def test_workers_on_processors_take_turns_unless_each_has_its_own(tiny_llama: Path) -> None:
    laptop = find_machine("laptop")
    threads = laptop.model_copy(update={"threads": 4})
    text = Text(spec="ids:none.npy", sequences=32, length=64)

    def fit(device: str, machine: Any) -> StageCost:
        recovery = Recovery(
            remove="2:4",
            calibration=text,
            method=Method(operator="ghost", inputs="repaired"),
            compute=Compute(device=device, micro_batch=2),
        )
        return estimate(recovery, model=tiny_llama, machine=machine).stages[0]

    one = fit("cpu", laptop).parts["compute"]
    assert fit("cpu,cpu", laptop).parts["compute"] == pytest.approx(one)
    assert fit("cpu,cpu", threads).parts["compute"] == pytest.approx(one / 2)
    assert fit("cpu,cpu,cpu,cpu", threads).parts["compute"] == pytest.approx(one / 2)


def test_machines_of_a_cluster_have_disks_of_their_own() -> None:
    store: dict[str, Any] = {"search": Search(max_spans=1)}
    cards, cluster = price("llama-3-405b", CARDS, **store), price("llama-3-405b", "auto", cluster=2, **store)
    assert stage(cluster, "search").read_bytes == stage(cards, "search").read_bytes
    assert stage(cluster, "search").parts["disk"] < stage(cards, "search").parts["disk"]
    assert cluster.needs["memory, search"].n_bytes < cards.needs["memory, search"].n_bytes
    words = " ".join(cluster.command)
    assert "--scheduler tcp://host:8786" in words
    assert f"--device {CARDS}" in " ".join(cards.command)


@pytest.mark.parametrize(
    ("remove", "method", "search"),
    [
        ("1:2 3:4", Method(operator="least-squares", inputs="repaired"), Search(folds=3)),
        ("1:2 3:4", Method(operator="least-squares", inputs="dense"), Search()),
        (2, Method(operator="least-squares"), Search(max_spans=1, held_out=6)),
    ],
)
def test_rounds_shares_and_sums_are_those_of_a_run(
    remove: int | str,
    method: Method,
    search: Search,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(S, T)))
    spec = f"ids:{tmp_path / 'ids.npy'}"
    recovery = request(remove, "cpu,cpu,cpu", spec, method=method, search=search)
    calls: list[tuple[str, int, int]] = []
    sent: list[int] = []
    shares, fitted = Workers.run, fit_shares._fitted

    def counted(
        self: Workers, function: Any, compute: Any, given: Any, sizes: Any, *more: Any, **named: Any
    ) -> Any:
        calls.append((function.__name__, len(given), max(sizes)))
        return shares(self, function, compute, given, sizes, *more, **named)

    def weighed(fit: Any, span: Any, nodes: Any, *more: Any) -> Any:
        sent.append(sum(state.n_bytes for share in nodes for state in share.values()))
        return fitted(fit, span, nodes, *more)

    monkeypatch.setattr(Workers, "run", counted)
    monkeypatch.setattr(fit_shares, "_fitted", weighed)
    monkeypatch.setattr("ghoststream.stages.workers._processes", cluster_of)
    found = estimate(recovery, model=tiny_llama, machine="laptop")
    job = Job.make(recovery, read_sizes(tiny_llama), find_machine("laptop"))
    run(recovery.model_copy(update={"model": str(tiny_llama)}), tmp_path / "out")
    assert sent == pytest.approx([SharedFit(job).sent_bytes] * len(sent), rel=0.01)
    # Ten seconds of start for each step that has workers, one for each time that they open the model.
    steps = {name for name, _, _ in calls}
    waited = sum(one.parts.get("workers", 0.0) for one in found.stages)
    assert waited == pytest.approx(10 * len(steps) + len(calls) + sum(sent) / 0.5e9, rel=0.01)


def test_a_cluster_is_asked_for_its_workers(tiny_llama: Path) -> None:
    with cluster_of(2) as client:
        recovery = request(
            "2:4",
            "cpu",
            reduction=Reduction(scheduler=client),
            method=Method(inputs="repaired", operator="ghost"),
        )
        asked = estimate(recovery, model=tiny_llama, machine="laptop")
        assert f"--scheduler {client.scheduler.address}" in " ".join(asked.command)
    # Both workers are on the host of this process.
    on_cards = estimate(
        request("2:4", "cpu,cpu", method=Method(inputs="repaired", operator="ghost")),
        model=tiny_llama,
        machine="laptop",
    )
    assert asked.needs["memory, fit"].n_bytes == on_cards.needs["memory, fit"].n_bytes
    assert asked.needs["memory, merge"].n_bytes < on_cards.needs["memory, merge"].n_bytes


def test_an_exploration_shares_its_candidates_and_ranks_alone() -> None:
    alone, both, four = (
        price("llama-3-70b", device, 1, cluster=cluster, exploration=Exploration())
        for device, cluster in (("cuda:0", None), (CARDS, None), ("auto", 4))
    )
    assert [one.name for one in both.stages] == ["explore"]
    # The dense model, which each of them runs, and the ranking are less than half of the work.
    halved = stage(both, "explore").parts["compute"] / stage(alone, "explore").parts["compute"]
    assert 0.5 < halved < 0.75
    assert stage(four, "explore").parts["compute"] < stage(both, "explore").parts["compute"]
    assert stage(both, "explore").parts["workers"] > 0
    assert both.command[-4:-2] == ("--device", CARDS)
    assert "--scheduler" in four.command


def test_what_a_run_refuses_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="--refit fits the layers behind a gap"):
        estimate(request("2:4", "cpu,cpu", method=Method(refit=1)), model=tiny_llama, machine="laptop")
    with pytest.raises(RequestError, match="and --scheduler a cluster"):
        price("llama-3-70b", CARDS, cluster=2)
    with pytest.raises(RequestError, match="laptop has no device_memory, and --device cuda:1"):
        estimate(request(2, "cpu,cuda:1"), model=tiny_llama, machine="laptop")
    with pytest.raises(RequestError, match="--cluster would not be used: where a store is captured"):
        price("llama-3-70b", "auto", "40:44", cluster=2, method=Method(operator="ghost"))
    monkeypatch.setattr("ghoststream.statistics.cluster._CONNECT_SECONDS", 0.1)
    with pytest.raises(RequestError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        estimate(request(2, "cpu", reduction=Reduction(scheduler="tcp://127.0.0.1:9")), model=tiny_llama)


def test_from_the_command_line() -> None:
    words = ("estimate", "llama-3-70b", "--remove", 16, "--machine", "h100")
    shown = succeed(*words, "--device", CARDS).stdout
    for said in ("on each device", "memory, merge", f"--device {CARDS}"):
        assert said in shown
    assert "--scheduler tcp://host:8786" in succeed(*words, "--cluster", 4).stdout
