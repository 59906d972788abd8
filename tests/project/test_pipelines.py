"""Pipelines, job files, examples and the README: what they tell people to run is what there is."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from ghoststream.cli import main
from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.options import Compute, Method, Reduction, Search, Text, Training
from ghoststream.spans import PruningPlan
from ghoststream.stages.pipeline import load_pipeline, with_runtime
from ghoststream.text import TextSpec
from ghoststream.text.hub import resolve_split

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PIPELINES = sorted((ROOT / "pipelines").glob("*.yaml"))
JOB_FILES = sorted(
    path
    for path in ((ROOT / "pipelines").rglob("*"))
    if path.suffix in {".sh", ".sbatch"} and "__pycache__" not in path.parts
)
MINIMAL = "calibration: ptb\nremove: 2\n"


def _commands(text: str, indent: str = "") -> list[list[str]]:
    pattern = rf"^{indent}(ghoststream .*)$"
    lines = re.findall(pattern, text.replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def _parse(words: list[str]) -> None:
    command = main.get_command(click.Context(main), words[1])
    assert command is not None, words
    command.make_context(words[1], words[2:])


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_pipelines_load_and_can_be_planned(path: Path) -> None:
    recovery = load_pipeline(path)
    assert recovery.name == path.stem.replace("_", "-")
    assert recovery.evaluate is not None
    calibration, measured = recovery.calibration.to_calibrate(), recovery.evaluate.to_evaluate()
    splits = [
        resolve_split(TextSpec.parse(spec), text.part or "all")
        for text in (calibration, measured)
        for spec in text.specs
    ]
    # What is measured on was not calibrated on.
    assert (calibration.spec, calibration.part, splits[0]) != (measured.spec, measured.part, splits[1])
    if isinstance(recovery.remove, str):
        assert PruningPlan.parse(32, recovery.remove).spans
    else:
        assert isinstance(recovery.remove, int)
    assert f"`{path.name}`" in (ROOT / "pipelines" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.name)
def test_job_files_are_valid_and_their_commands_exist(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    # What a scheduler fills in, and is checked when commands are parsed.
    commands = _commands(path.read_text(encoding="utf-8").replace("$WORKER", "1/4"))
    assert commands
    for words in commands:
        _parse(words)
    _require_listed(path)


def _require_listed(path: Path) -> None:
    name = path.relative_to(ROOT / "pipelines").as_posix()
    assert f"`{name}`" in (ROOT / "pipelines" / "README.md").read_text(encoding="utf-8")


def test_workers_of_kubernetes_run_what_there_is() -> None:
    path = ROOT / "pipelines" / "cluster" / "kubernetes.yaml"
    cluster, scaler = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    assert (cluster["kind"], scaler["kind"]) == ("DaskCluster", "DaskAutoscaler")
    assert scaler["spec"]["cluster"] == cluster["metadata"]["name"]
    for part in ("worker", "scheduler"):
        (container,) = cluster["spec"][part]["spec"]["containers"]
        words = [sys.executable, "-m", *container["args"][:2], "--help"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    for words in _commands(path.read_text(encoding="utf-8"), indent="#   "):
        _parse(words)
    _require_listed(path)


def test_commands_of_the_readme_exist() -> None:
    commands = _commands((ROOT / "README.md").read_text(encoding="utf-8"), indent=" {4}")
    assert len(commands) >= 5
    for words in commands:
        _parse(words)


def _written(folder: Path, text: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_minimal_pipeline(tmp_path: Path) -> None:
    recovery = load_pipeline(_written(tmp_path, MINIMAL))
    assert recovery.name == "pipeline"
    assert (recovery.remove, recovery.calibration) == (2, Text(spec="ptb"))
    assert (recovery.search, recovery.method) == (Search(), Method())
    assert recovery.method.given() == ()
    assert (recovery.model, recovery.evaluate, recovery.store) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "sleve: {}\n", "sleve: there is no such option"),
        (MINIMAL + "search: {beams: 2}\n", "search.beams: there is no such option"),
        (MINIMAL + "distill: {steeps: 2}\n", "distill.steeps: there is no such option"),
        (MINIMAL + "distill: a lot\n", "distill: 'a lot' is no number of steps"),
        (MINIMAL + "method: {solver: magic}\n", "method.solver: Input should be 'gram'"),
        (MINIMAL.replace("remove: 2", ""), "remove: is missing"),
        (MINIMAL + "storage: {layers: '3:3'}\n", "storage.layers: '3:3' names no layer"),
        (MINIMAL.replace("ptb", "{spec: ptb, length: 1}"), "calibration.length: Input should be greater"),
        ("[1, 2]\n", "is not a pipeline: it holds no fields"),
        ("name: [\n", "is not YAML"),
    ],
)
def test_what_is_no_pipeline_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        load_pipeline(_written(tmp_path, text))


def test_a_field_of_a_file_is_changed_by_name(tmp_path: Path) -> None:
    path = _written(tmp_path, MINIMAL)
    changes = ("calibration.sequences=64", "remove='1:3 5:7'", "search.criterion=sleb", "method={ridge: 0.5}")
    recovery = load_pipeline(path, changes)
    assert recovery.calibration == Text(spec="ptb", sequences=64)
    assert (recovery.remove, recovery.search.criterion) == ("1:3 5:7", "sleb")
    assert recovery.method.ridge == 0.5
    for change, message in (
        ("remove", "not of the form FIELD=VALUE"),
        (".remove=3", "not of the form FIELD=VALUE"),
        ("remove=[", "the value is not YAML"),
        ("remove=13:19", "number to the base of 60"),
        ("calibration.sequence=3", "calibration.sequence: there is no such option"),
    ):
        with pytest.raises(RequestError, match=re.escape(message)):
            load_pipeline(path, (change,))


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("", (), None),
        ("distill:", (), None),
        ("distill: {}", (), None),
        ("distill: false", (), None),
        ("distill: true", (), Training()),
        ("distill: 40", (), Training(steps=40)),
        ("distill: {epochs: 2, train: operators}", (), Training(epochs=2, train="operators")),
        ("", ("distill=true",), Training()),
        ("", ("distill.epochs=2",), Training(epochs=2)),
        ("distill:", ("distill.epochs=2",), Training(epochs=2)),
        ("distill: true", ("distill.epochs=2",), Training(epochs=2)),
        ("distill: 40", ("distill.batch=2",), Training(steps=40, batch=2)),
        ("distill: {epochs: 2}", ("distill=false",), None),
    ],
)
def test_a_training_is_off_unless_something_is_said_of_it(
    section: str, changes: tuple[str, ...], expected: Training | None, tmp_path: Path
) -> None:
    found = load_pipeline(_written(tmp_path, f"{MINIMAL}{section}\n"), changes).distill
    assert found == expected
    if found is not None and expected is not None:
        assert found.given() == expected.given()


def test_no_pipeline_file(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="there is no pipeline file"):
        load_pipeline(tmp_path / "nothing.yaml")


def test_the_command_line_says_where_and_with_what_and_nothing_else(tmp_path: Path) -> None:
    text = MINIMAL + "model: theirs\ncompute: {dtype: float16, device: cuda}\nreduction: {workers: 3}\n"
    recovery = load_pipeline(_written(tmp_path, text))
    assert with_runtime(recovery, None) == recovery
    changed = with_runtime(
        recovery, "mine", compute=Compute(device="cpu"), reduction=Reduction(scheduler="tcp://host:1")
    )
    assert changed.model == "mine"
    assert changed.compute == Compute(dtype="float16", device="cpu")
    assert changed.reduction == Reduction(workers=3, scheduler="tcp://host:1")
    assert changed.reduction.given() == ("scheduler", "workers")


CLUSTER = ROOT / "pipelines" / "cluster" / "dask_cluster.sh"


def _run_cluster(folder: Path, commands: dict[str, str], **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the cluster's script with other programs in the place of some."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, text in commands.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (bin_folder / name).chmod(0o755)
    path = f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "STORE": str(folder / "store"), "LOG": str(folder / "log")}
    return subprocess.run(
        ["bash", str(CLUSTER)],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_cluster_of_several_hosts_needs_a_named_interface(tmp_path: Path) -> None:
    done = _run_cluster(tmp_path, {"dask": "touch $LOG", "ghoststream": "touch $LOG"}, HOSTS="node1 node2")
    assert done.returncode == 2
    assert "set INTERFACE to the network that node1 node2 share" in done.stderr
    assert not (tmp_path / "log").exists()


_LISTENING = """
import json, os, sys
from pathlib import Path
import psutil
from distributed import Client

with Client(sys.argv[sys.argv.index("--scheduler") + 1]) as client:
    client.wait_for_workers(4, timeout=60)
    script = psutil.Process().parent()
    found = [
        place.laddr.ip
        for process in script.children(recursive=True)
        if process.pid != os.getpid()
        for place in process.net_connections("inet")
        if place.status == psutil.CONN_LISTEN
    ]
    Path(os.environ["LOG"]).write_text(json.dumps([client.scheduler.address, found]))
"""


@pytest.mark.soak
@pytest.mark.parametrize("encrypted", [False, True])
def test_the_cluster_listens_on_loopback_only(tmp_path: Path, encrypted: bool) -> None:
    (tmp_path / "listening.py").write_text(_LISTENING, encoding="utf-8")
    settings = {"PORT": "0"}
    if encrypted:
        (recipe,) = re.findall(r"^#   (openssl .*)$", CLUSTER.read_text(encoding="utf-8"), flags=re.MULTILINE)
        subprocess.run(["bash", "-c", recipe], cwd=tmp_path, check=True, capture_output=True)
        settings["TLS"] = str(tmp_path)
    listening = f'exec "{sys.executable}" "{tmp_path}/listening.py" "$@"'
    done = _run_cluster(tmp_path, {"ghoststream": listening}, **settings)
    assert done.returncode == 0, done.stderr
    address, found = json.loads((tmp_path / "log").read_text())
    assert address.startswith("tls://127.0.0.1:" if encrypted else "tcp://127.0.0.1:")
    assert len(found) >= 9  # the scheduler, four workers and their nannies
    assert set(found) == {"127.0.0.1"}
