"""One recovery, however it is asked for: the same bytes, every input opened once, and nothing given in
vain."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import ghoststream as gs
from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
from ghoststream.option_types import Options
from ghoststream.options import Recovery
from ghoststream.stages.run_record import NAME
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import StreamedPass
from ghoststream.text.prepare import prepare_tokens
from tests.helpers.command_bench import BAD_REQUEST, LENGTH, Bench, succeed
from tests.helpers.forking import ForkServer
from tests.helpers.installed_package import install_package, run_with

pytestmark = pytest.mark.integration

LEAST_SQUARES = ("--operator", "least-squares", "--token-weights", "drop_sinks")
#: What is asked for beside the text, as options and as the parts of a pipeline file.
CASES: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "measured and auto": (
        ("--remove", 2, "--max-spans", 1),
        {"remove": 2, "search": {"max_spans": 1}},
    ),
    "running criterion, named operator": (
        ("--remove", 2, "--criterion", "prune-and-repair", *LEAST_SQUARES, "--folds", 2),
        {
            "remove": 2,
            "search": {"criterion": "prune-and-repair", "folds": 2},
            "method": {"operator": "least-squares", "token_weights": "drop_sinks"},
        },
    ),
    "store": (
        ("--remove", 2, "--criterion", "streamline-published", "--operator", "ghost", "--ridge", "1e-5"),
        {
            "remove": 2,
            "search": {"criterion": "streamline-published"},
            "method": {"operator": "ghost", "ridge": 1e-5},
        },
    ),
    "plan, named operator": (
        ("--remove", "1:2 3:5", "--operator", "linear-patch-diagonal", "--micro-batch", 3),
        {
            "remove": "1:2 3:5",
            "method": {"operator": "linear-patch-diagonal"},
            "compute": {"micro_batch": 3},
        },
    ),
    "plan, states of the layer before": (
        ("--remove", "2:4", "--operator", "least-squares", "--features", "mlp"),
        {"remove": "2:4", "method": {"operator": "least-squares", "features": "mlp"}},
    ),
}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text specification of 12 random sequences."""
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(12, LENGTH), dtype=np.int32))
    return f"ids:{path}"


def _request(model: Path, ids: str, parts: dict[str, Any]) -> dict[str, Any]:
    text = {"spec": ids, "sequences": 12, "length": LENGTH}
    return {"model": str(model), "calibration": text, **parts}


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != NAME
    }


@pytest.mark.parametrize("case", CASES)
def test_command_file_and_python_give_the_same_bytes(
    case: str, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    options, parts = CASES[case]
    request = _request(tiny_llama, ids, parts)
    text = ("--calibration", ids, "--sequences", 12, "--length", LENGTH)
    said = {"command": succeed("recover", tiny_llama, *options, *text, "--out", tmp_path / "command")}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(request), encoding="utf-8")
    said["file"] = succeed("run", tmp_path / "job.yaml", "--out", tmp_path / "file")
    for name, one in said.items():
        assert f"next: ghoststream evaluate {tiny_llama} {tmp_path / name} --text SPEC" in one.stdout
    gs.run(Recovery.make(request), tmp_path / "python")
    groups: dict[str, type[Options]] = {"search": gs.Search, "method": gs.Method, "compute": gs.Compute}
    given: dict[str, Any] = {name: group.make(parts[name]) for name, group in groups.items() if name in parts}
    calibration = gs.Text.make(request["calibration"])
    gs.recover(
        tiny_llama, remove=parts["remove"], calibration=calibration, out=tmp_path / "function", **given
    )
    wanted = _files(tmp_path / "command")
    assert any(name.endswith(".safetensors") for name in wanted)
    assert {"ghoststream.json", "config.json", "SHA256SUMS"} <= set(wanted)
    for name in ("file", "python", "function"):
        assert _files(tmp_path / name) == wanted
        # Plan and operators too; a store says when it was made.
        kept = {path: data for path, data in _files(tmp_path / f"{name}.work").items() if "store" not in path}
        assert kept
        assert kept == {path: _files(tmp_path / "command.work")[path] for path in kept}


def _counted(patch: pytest.MonkeyPatch, function: Callable[..., Any], seen: Counter[str]) -> None:
    """Count the calls of a function by its first argument, under every name that a module has for it."""

    def counting(first: Any, *rest: Any, **named: Any) -> Any:
        seen[str(getattr(first, "spec", first))] += 1
        return function(first, *rest, **named)

    for name, module in list(sys.modules.items()):
        if name.startswith("ghoststream") and getattr(module, function.__name__, None) is function:
            patch.setattr(module, function.__name__, counting)


@pytest.mark.parametrize("case", CASES)
def test_everything_is_opened_once(
    case: str, tiny_llama: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.npy"
    np.save(other, np.random.default_rng(1).integers(3, 128, size=(4, LENGTH), dtype=np.int32))
    evaluate = {"spec": f"ids:{other}", "length": LENGTH}
    recovery = Recovery.make({**_request(tiny_llama, ids, CASES[case][1]), "evaluate": evaluate})
    sessions, fingerprints, texts = Counter[str](), Counter[str](), Counter[str]()
    opened = ModelSession.__init__

    def open_counted(session: ModelSession, model: str | Path, *rest: Any, **named: Any) -> None:
        sessions[str(model)] += 1
        opened(session, model, *rest, **named)

    monkeypatch.setattr(ModelSession, "__init__", open_counted)
    _counted(monkeypatch, checkpoint_fingerprint, fingerprints)
    _counted(monkeypatch, prepare_tokens, texts)
    report = gs.run(recovery, tmp_path / "out")
    assert report.evaluation is not None
    assert len(report.evaluation.rows) == 2
    recovered = str(tmp_path / "out")
    assert sessions[str(tiny_llama)] == 1
    assert fingerprints[str(tiny_llama)] == 1
    assert texts == {ids: 1, f"ids:{other}": 1}
    # What was written is a model of its own, which is looked at once.
    assert set(sessions) | set(fingerprints) <= {str(tiny_llama), recovered}
    assert sessions[recovered] <= 1
    assert fingerprints[recovered] <= 1


RECOVER = ("recover", "{model}", "--calibration", "{text}", "--length", LENGTH, "--out", "{out}")
SELECT = ("select", "--remove", 2, "--out", "{out}")
FIT = ("fit", "--plan", "1:3", "--out", "{out}")
RUNNING = ("--model", "{model}", "--calibration", "{text}", "--length", LENGTH)
STORED = ("--store", "{store}")
GHOST = ("--operator", "ghost")
STREAMLINE = ("--remove", 2, "--criterion", "streamline")
#: What is asked for, and then the option that nothing would read, last.
UNUSED: tuple[tuple[object, ...], ...] = (
    *(
        (*RECOVER, "--remove", 2, *option)
        for option in (
            ("--features", "normed"),
            ("--token-weights", "drop_sinks"),
            ("--ridge", "1e-3"),
            ("--inputs", "dense"),
            ("--seed", 1),
            ("--store", "{out}.store"),
            ("--store-dtype", "bfloat16"),
            ("--layers", "1:3"),
            ("--workers", 2),
            ("--memory", "1GiB"),
        )
    ),
    (*RECOVER, "--remove", 2, *GHOST, "--workers", 2),
    (*RECOVER, "--remove", 2, "--criterion", "prune-and-repair", "--candidates", 3),
    (*RECOVER, "--remove", 2, "--criterion", "perplexity", "--beam", 3),
    (*RECOVER, "--remove", 2, "--criterion", "sleb", *GHOST, "--held-out", 3),
    (*RECOVER, "--remove", 2, "--criterion", "taylor", "--lanes", 3),
    *((*RECOVER, "--remove", "1:3", *option) for option in (("--beam", 2), ("--criterion", "sleb"))),
    *(
        (*RECOVER, "--remove", "1:3", "--operator", "auto", option, 3)
        for option in ("--max-spans", "--lanes")
    ),
    *((*RECOVER, "--remove", "1:3", *GHOST, option, 3) for option in ("--candidates", "--held-out")),
    (*RECOVER, "--remove", "1:3", "--operator", "auto", "--store", "{out}.store"),
    (*RECOVER, "--remove", "1:3", *GHOST, "--inputs", "dense", "--store", "{out}.store"),
    *(
        (*RECOVER, *STREAMLINE, *GHOST, option, 3)
        for option in ("--held-out", "--max-spans", "--beam", "--lanes")
    ),
    *(
        (*SELECT, *STORED, option, 3)
        for option in ("--held-out", "--folds", "--max-spans", "--seed", "--micro-batch")
    ),
    (*SELECT, *STORED, *GHOST),
    (*SELECT, *STORED, "--dtype", "float32"),
    (*SELECT, *STORED, "--model", "{model}"),
    (*SELECT, *STORED, "--length", 8),
    *((*SELECT, *RUNNING, option, 3) for option in ("--workers", "--rank")),
    *(
        (*SELECT, *RUNNING, "--criterion", "sleb", option, 3)
        for option in ("--held-out", "--folds", "--rank")
    ),
    (*SELECT, *RUNNING, "--criterion", "taylor", *GHOST),
    (*FIT, *STORED, "--inputs", "dense"),
    (*FIT, *STORED, "--held-out", 2),
    (*FIT, *STORED, "--micro-batch", 2),
    (*FIT, *STORED, "--model", "{model}"),
    (*FIT, *STORED, "--sequences", 8),
    (*FIT, *RUNNING, *GHOST, "--scheduler", "tcp://nowhere:1", "--memory", "1GiB"),
    (*FIT, *RUNNING, *GHOST, "--workers", 2),
    (*FIT, *RUNNING, *GHOST, "--held-out", 2),
    (*FIT, *RUNNING, "--features", "normed"),
    ("evaluate", "{model}", "--store", "{store}", "--length", 8),
)


def _label(case: tuple[object, ...]) -> str:
    return " ".join(str(word) for word in (case[0], *case[-4:]) if "{" not in str(word))


@pytest.mark.parametrize("case", UNUSED, ids=map(_label, UNUSED))
def test_what_would_not_be_used_is_refused_before_any_work(
    case: tuple[object, ...],
    bench: Bench,
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("work was begun")

    monkeypatch.setattr(StreamedPass, "run", work)
    monkeypatch.setattr("ghoststream.stages.session.prepare_tokens", work)
    monkeypatch.setattr("ghoststream.activations.ActivationStore.read_numpy", work)
    places = {"model": bench.model, "text": bench.text, "store": bench.store, "out": tmp_path / "out"}
    words = [str(word).format(**places) for word in case]
    option = next(word for word in reversed(words) if word.startswith("--"))
    says = (option, "would not be used", "leave it out")
    line = refused(*words, code=BAD_REQUEST, says=says)
    assert line.startswith(f"error: {option} would not be used"), "and no other is named"
    assert list(tmp_path.iterdir()) == []


CODE = """
import json
from pathlib import Path
import numpy as np
from ghoststream.operators import BoundaryOperator, OperatorKind
from ghoststream.selection import Choice, Criterion
from ghoststream.spans import Span
from ghoststream.text import Document
class Quartered(OperatorKind):
    def fit(self, moments):
        total = moments.total()
        scale = np.full(total.gap_energy.shape, 0.25, np.float32)
        return BoundaryOperator(moments.span, "diagonal", weight=scale, diagnostics={"is_mine": True})
class Second(Criterion):
    meaning = "the number of the layer; the second goes"
    def choose(self, evidence, remove):
        layers = [Span(layer, layer + 1) for layer in range(evidence.n_layers)]
        return Choice(tuple((one, float(one.start)) for one in layers), tuple(layers[1 : 1 + remove]))
def poems(rest, part):
    for line in Path(rest).read_text().splitlines():
        yield Document(part, line.encode(), line)
"""
ENTRY_POINTS = """
[ghoststream.operators]
quartered = mine:Quartered
[ghoststream.criteria]
second = mine:Second
[ghoststream.text_sources]
poems = mine:poems
"""


def test_an_installed_package_adds_operator_criterion_and_text(
    warm: ForkServer, bench: Bench, tmp_path: Path
) -> None:
    site, text = install_package(tmp_path / "site", "mine", CODE, ENTRY_POINTS), tmp_path / "poems.txt"
    text.write_text("\n".join(letter * 40 for letter in "abcdefgh"))
    spec = f"poems:{text}"
    options = ("--criterion", "second", "--operator", "quartered", "--sequences", 6, "--length", LENGTH)
    command = ("recover", bench.model, "--remove", 1, "--calibration", spec, *options)
    done = run_with(warm, site, *command, "--out", tmp_path / "command")
    assert done.exit_code == 0, done.stderr
    request = {
        "model": str(bench.model),
        "remove": 1,
        "calibration": {"spec": spec, "sequences": 6, "length": LENGTH},
        "search": {"criterion": "second"},
        "method": {"operator": "quartered"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(request), encoding="utf-8")
    done = run_with(warm, site, "run", tmp_path / "job.yaml", "--out", tmp_path / "file")
    assert done.exit_code == 0, done.stderr
    assert _files(tmp_path / "file") == _files(tmp_path / "command")
    made = json.loads((tmp_path / "file" / "ghoststream.json").read_text())
    assert made["plan"]["spans"] == [[1, 2]]
    assert made["operators"]["kind"] == "quartered"
    assert made["operators"]["boundaries"][0]["diagnostics"]["is_mine"] is True


def test_without_the_package_its_names_are_unknown(
    bench: Bench, refused: Callable[..., str], tmp_path: Path
) -> None:
    recover = ("recover", bench.model, "--remove", 1, "--out", tmp_path / "out", "--calibration")
    refused(*recover, bench.text, "--criterion", "second", code=BAD_REQUEST, says="no criterion 'second'")
    refused(*recover, bench.text, "--operator", "quartered", code=BAD_REQUEST, says="no operator 'quartered'")
    refused(*recover, "poems:x", code=BAD_REQUEST, says="text specification 'poems:x'")
