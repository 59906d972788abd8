"""Texts and plans that cannot be used: one clear line, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ghoststream as gs
from ghoststream.errors import PlanError
from tests.helpers.command_bench import BAD_REQUEST, LENGTH, Bench, copy_of, succeed

pytestmark = pytest.mark.integration


def test_text_that_cannot_be_used(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "malformed.jsonl": '{"text": "good"}\n{"text": \n',
        "fields.jsonl": '{"title": "x"}\n',
        "types.jsonl": '{"text": 3}\n',
        "list.jsonl": "[1]\n",
        "empty.txt": "",
        "latin.txt": b"caf\xe9" * 100,
        "text.txt.gz": b"not gzip",
        "ids.npy": b"not numpy",
    }
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    np.save(tmp_path / "large.npy", np.full((8, LENGTH), 1000))
    np.save(tmp_path / "floats.npy", np.zeros((8, LENGTH)))
    cases = {
        f"file:{bench.root}/short.txt": ("short.txt has 9 tokens", f"needs {LENGTH}", "smaller --length"),
        f"file:{tmp_path}/missing.txt": ("no text file", "missing.txt"),
        f"file:{tmp_path}": ("is a folder",),
        f"file:{tmp_path}/malformed.jsonl": ("malformed.jsonl line 2 is not JSON",),
        f"file:{tmp_path}/fields.jsonl": ("line 1 has neither a 'text' nor a 'messages' field", "title"),
        f"file:{tmp_path}/types.jsonl": ("the field 'text'", "line 1", "must be a string"),
        f"file:{tmp_path}/list.jsonl": ("line 1", "list"),
        f"file:{tmp_path}/empty.txt": ("empty.txt is empty",),
        f"file:{tmp_path}/latin.txt": ("not UTF-8", "byte 3"),
        f"file:{tmp_path}/text.txt.gz": ("not a whole gzip file",),
        f"ids:{tmp_path}/ids.npy": ("not a readable .npy file", "numpy.save"),
        f"ids:{tmp_path}/missing.npy": ("no file of token ids",),
        f"ids:{tmp_path}/large.npy": ("token id 1000", "below 128"),
        f"ids:{tmp_path}/floats.npy": ("float64", "integer"),
        "nonsense": ("cannot read the text specification 'nonsense'", "file:PATH"),
        "hf:": ("cannot read the text specification",),
    }
    for spec, says in cases.items():
        text = ("--sequences", 8, "--length", LENGTH)
        store = ("--store", tmp_path / "store")
        refused("capture", bench.model, "--calibration", spec, *text, *store, code=BAD_REQUEST, says=says)
        refused("evaluate", bench.model, "--text", spec, *text, code=BAD_REQUEST, says=says)
        assert not (tmp_path / "store").exists()


def test_text_that_gives_too_few_windows(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    text = ("--calibration", bench.text, "--sequences", 1000, "--length", LENGTH)
    says = ("gives 40 sequences of 16", "1000 were asked for", "ask for fewer")
    refused("capture", bench.model, *text, "--store", tmp_path / "store", code=BAD_REQUEST, says=says)


def test_a_model_without_a_tokenizer(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    model = copy_of(bench, tmp_path)
    for path in model.glob("token*"):
        path.unlink()
    says = ("has no tokenizer", "ids:FILE.npy")
    refused("capture", model, *bench.capture, "--store", tmp_path / "store", code=BAD_REQUEST, says=says)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("past_the_end", ("[4,9) reaches past the last layer",)),
        ("of_another", ("8 layers", "6")),
        ("of_all", ("removes 6 of 6 layers",)),
        ("of_none", ("removes no layer",)),
        ("malformed", ("not a pruning plan",)),
    ],
)
def test_a_plan_that_does_not_fit(
    plan: str, says: tuple[str, ...], bench: Bench, refused: Callable[..., str], tmp_path: Path
) -> None:
    file = bench.root / f"plan_{plan}"
    out = ("--out", tmp_path / "out")
    refused("fit", "--store", bench.store, "--plan", file, *out, code=BAD_REQUEST, says=says)
    refused("recover", bench.model, "--remove", file, *bench.capture, *out, code=BAD_REQUEST, says=says)
    assert list(tmp_path.iterdir()) == []


def test_spans_that_do_not_fit(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    cases = {
        "4:9": "reaches past the last layer",
        "0:6": "removes 6 of 6 layers",
        "3:3": "empty or negative",
        "five": "'five' is neither a plan file that is there nor spans such as 13:19",
        "2026-10/plan.json": "there is no plan file 2026-10/plan.json",
        "no_such_plan.json": "there is no plan file no_such_plan.json",
        str(bench.operators): "is a safetensors file, and a plan file",
        str(bench.root / "mine.json"): "mine.json is not a pruning plan",
    }
    for plan, says in cases.items():
        out = ("--out", tmp_path / "out")
        refused("fit", "--store", bench.store, "--plan", plan, *out, code=BAD_REQUEST, says=says)


def test_too_many_layers_or_none(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    store = ("select", "--store", bench.store)
    for number, says in (
        (6, "cannot remove 6 of"),
        (7, "cannot remove 7 of"),
        (0, "cannot remove 0 layers"),
        (-1, "cannot remove -1 layers"),
        ("x", "'x' is neither a number of layers, nor a plan file that is there, nor spans such as 13:19"),
    ):
        remove = ("--remove", number)
        refused("estimate", bench.model, *remove, "--no-measure", code=BAD_REQUEST, says=says)
        refused("recover", bench.model, *remove, *bench.capture, *out, code=BAD_REQUEST, says=says)
        says = says if number in (6, 7) else "--remove"
        refused(*store, *remove, code=BAD_REQUEST, says=says)
        refused(*store, *remove, "--criterion", "shortgpt", code=BAD_REQUEST, says=says)
    # The first and the last layer are not candidates of this criterion.
    refused("select", "--store", bench.store, "--remove", 5, code=BAD_REQUEST, says="5")
    refused("recover", bench.model, *bench.capture, *out, code=BAD_REQUEST, says="--remove")


@pytest.mark.parametrize("text", ["2,3", "2-3", "2,3,4", "[2,3]"])
def test_what_may_mean_a_list_of_layers(
    text: str, bench: Bench, refused: Callable[..., str], tmp_path: Path
) -> None:
    says, out = (f"cannot read the span '{text}'", "2:4" if text != "2,3,4" else "2:5"), tmp_path / "out"
    line = refused("recover", bench.model, "--remove", text, *bench.capture, "--out", out, code=2, says=says)
    assert refused("estimate", bench.model, "--remove", text, "--no-measure", code=2, says=says) == line
    refused("fit", "--store", bench.store, "--plan", text, "--out", out, code=2, says=says)
    job = tmp_path / "job.yaml"
    job.write_text(f'{{model: {bench.model}, remove: "{text}", calibration: "{bench.text}"}}')
    assert refused("run", job, "--out", out, code=2, says=says) == line
    with pytest.raises(PlanError, match="cannot read the span"):
        gs.recover(bench.model, remove=text, calibration=bench.text, out=out)


@pytest.mark.parametrize("field", ["remove: 13:19", "remove: 2\nstorage:\n  layers: 10:20"])
def test_spans_that_yaml_reads_as_numbers(
    field: str, bench: Bench, refused: Callable[..., str], tmp_path: Path
) -> None:
    job, value = tmp_path / "job.yaml", field.rpartition(" ")[2]
    job.write_text(f"model: {bench.model}\ncalibration: {bench.text}\n{field}\n")
    says = (f"line {field.count(chr(10)) + 3}: YAML reads {value} as a number", f'quote it: "{value}"')
    refused("run", job, "--out", tmp_path / "out", code=BAD_REQUEST, says=says)


@pytest.mark.parametrize("remove", ["[2, 3]", "true", "2.5", "{start: 2}"])
def test_what_says_neither_how_many_nor_which(
    remove: str, bench: Bench, refused: Callable[..., str], tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"model: {bench.model}\ncalibration: {bench.text}\nremove: {remove}\n")
    says = ("neither how many layers nor which", '"5:7 13:19"')
    refused("run", job, "--out", tmp_path / "out", code=BAD_REQUEST, says=says)


def test_all_but_one_layer_says_what_would_do(
    bench: Bench, refused: Callable[..., str], tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out")
    says = "must stay; give a number from 1 to 4, or say which layers go, such as 1:6"
    line = refused("recover", bench.model, "--remove", 5, *bench.capture, *out, code=BAD_REQUEST, says=says)
    assert (
        refused("estimate", bench.model, "--remove", 5, "--no-measure", code=BAD_REQUEST, says=says) == line
    )
    assert "it fits" in succeed("estimate", bench.model, "--remove", "1:6", "--no-measure").stdout


@pytest.mark.parametrize("number", [6, 7])
def test_no_spans_are_advised_where_none_would_do(
    number: int, bench: Bench, refused: Callable[..., str], tmp_path: Path
) -> None:
    request = ("recover", bench.model, "--remove", number, *bench.capture, "--out", tmp_path / "out")
    line = refused(*request, code=BAD_REQUEST, says=f"cannot remove {number} of 6 layers")
    assert line.rstrip().endswith("must stay; give a number from 1 to 4")


@pytest.mark.parametrize("text", ["explored", "first", "plan.jsn", "30%", "2.5", "x" * 5000])
def test_what_is_no_span_at_all_is_not_read_as_one(
    text: str, bench: Bench, refused: Callable[..., str], tmp_path: Path
) -> None:
    out, shown = ("--out", tmp_path / "out"), text[:60]
    says = (shown, "is neither a number of layers, nor a plan file that is there, nor spans such as 13:19")
    refused("recover", bench.model, "--remove", text, *bench.capture, *out, code=BAD_REQUEST, says=says)
    says = (shown, "is neither a plan file that is there nor spans such as 13:19")
    refused("fit", "--store", bench.store, "--plan", text, *out, code=BAD_REQUEST, says=says)


def test_the_folder_of_an_exploration_is_no_plan_but_has_some(
    bench: Bench, refused: Callable[..., str], tmp_path: Path
) -> None:
    plans = tmp_path / "explored" / "plans"
    plans.mkdir(parents=True)
    for removed in (2, 10):
        (plans / f"remove-{removed}.json").write_text("{}")
    says, out = f"name one of its plans, such as {plans / 'remove-2.json'}", ("--out", tmp_path / "out")
    folder = plans.parent
    refused("recover", bench.model, "--remove", folder, *bench.capture, *out, code=BAD_REQUEST, says=says)
    refused("fit", "--store", bench.store, "--plan", folder, *out, code=BAD_REQUEST, says=says)
