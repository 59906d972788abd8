"""Several texts in one calibration: the steps see windows that take turns, and say their figures by text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import ghoststream as gs
from ghoststream.activations import ActivationStore
from ghoststream.errors import RequestError
from ghoststream.options import Compute, Recovery, Search, Text
from ghoststream.selection import Selection
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.pipeline import load_pipeline
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import CHARACTERS, tiny_tokenizer
from tests.helpers.command_bench import run
from tests.helpers.requests import fit, select
from tests.helpers.searching import HELD, MICRO_BATCH, S, T, open_model, save_windows

pytestmark = pytest.mark.integration
EXHAUSTIVE = {"search": "exhaustive", "max_spans": 1, "operator": "ghost", "held_out": HELD}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("several") / "model")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two files of unlike text."""
    folder = tmp_path_factory.mktemp("texts")
    draw = np.random.default_rng(1)
    for name, characters in (("a", CHARACTERS[:40]), ("b", CHARACTERS[:4])):
        (folder / f"{name}.txt").write_text("".join(draw.choice(list(characters), 2000)))
    return f"file:{folder}/a.txt", f"file:{folder}/b.txt"


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows, and every second of them as a text of its own."""
    folder = save_windows(tmp_path_factory.mktemp("ids"))
    windows = np.load(folder / "all.npy")
    windows[1::2] = windows[1::2] % 11 + 3
    np.save(folder / "all.npy", windows)
    np.save(folder / "even.npy", windows[0::2])
    np.save(folder / "odd.npy", windows[1::2])
    return folder


def _searched(model: Path, ids: Path, *names: str, **options: Any) -> Selection:
    text: dict[str, Any] = {"calibration": [f"ids:{ids / name}.npy" for name in names], "sequences": S}
    return select(2, model=model, **text, length=T, micro_batch=MICRO_BATCH, **{**EXHAUSTIVE, **options})


def test_two_texts_are_the_one_text_of_their_windows_in_turn(model: Path, ids: Path) -> None:
    _, tokens = open_model(model, ids)
    one, two = _searched(model, ids, "all"), _searched(model, ids, "even", "odd")
    assert two.recipe["tokens"] == one.recipe["tokens"] == tokens.digest
    assert two.recipe["text"]["spec"] == ["ids:even.npy", "ids:odd.npy"]
    assert two.plan == one.plan
    assert one.candidates
    for own, row in zip(two.candidates, one.candidates, strict=True):
        assert {name: own[name] for name in row} == row
        gaps = np.array(row["window_gaps"])
        # The first window that is held out is the tenth.
        assert own["window_texts"] == [(S - HELD + index) % 2 for index in range(HELD)]
        by_text = [gaps[np.array(own["window_texts"]) == text].mean() for text in (0, 1)]
        np.testing.assert_allclose(own["gaps_by_text"], by_text, rtol=1e-12)
        assert "gaps_by_text" not in row


def test_a_window_that_predicts_nothing_shifts_no_text(model: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    documents = [["".join(draw.choice(list(CHARACTERS[:20]), 16)) for _ in range(8)] for _ in range(2)]
    documents[1][6] = CHARACTERS[0]
    for name, own in zip("ab", documents, strict=True):
        lines = [json.dumps({"text": text}) for text in own]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    text = Text(
        spec=tuple(f"file:{tmp_path}/{name}.jsonl" for name in "ab"), sequences=16, length=16, pack=False
    )
    found = gs.select(
        2,
        gs.Source(model=str(model), calibration=text),
        search=Search(search="exhaustive", max_spans=1, held_out=4),
        method=gs.Method(operator="ghost"),
        compute=Compute(micro_batch=2),
    )
    # Documents take turns: of the last four the third is the second text's, with one token.
    for row in found.candidates:
        assert row["window_texts"] == [0, 0, 1]
        assert row["gaps_by_text"][1] == row["window_gaps"][2]


def test_the_worst_text_ranks(model: Path, ids: Path) -> None:
    mean = _searched(model, ids, "even", "odd")
    worst = _searched(model, ids, "even", "odd", across_texts="worst")
    gaps = {str(row["spans"]): max(row["gaps_by_text"]) for row in mean.candidates}
    ordered = [str(row["spans"]) for row in worst.candidates]
    assert ordered == sorted(gaps, key=gaps.__getitem__)
    for row in worst.candidates:
        assert row["gaps_by_text"][row["worst_text"]] == gaps[str(row["spans"])]
    assert worst.meaning.endswith("on the text where that is highest")
    assert worst.digest != mean.digest
    assert "across_texts" not in json.dumps(mean.recipe)
    assert worst.recipe["across_texts"] == "worst"


def test_a_race_measures_every_text_in_each_round(model: Path, ids: Path) -> None:
    found = _searched(model, ids, "even", "odd", search="race", max_spans=2, across_texts="worst")
    assert {row["round"] for row in found.candidates} == {1, 2, 3}
    for row in found.candidates:
        assert set(row["window_texts"]) == {0, 1}
        assert all(gap is not None for gap in row["gaps_by_text"])


def test_recover_by_command_pipeline_and_python_is_one(
    model: Path, texts: tuple[str, str], tmp_path: Path
) -> None:
    text: dict[str, Any] = {"sequences": 8, "length": 16}
    named = [word for spec in texts for word in ("--calibration", spec)]
    options = ["--sequences", 8, "--length", 16, "--operator", "ghost", "--across-texts", "worst"]
    result = run("recover", model, "--remove", 2, *named, *options, "--out", tmp_path / "command")
    assert result.exit_code == 0, result.stderr
    assert "(by text " in result.stderr
    job: dict[str, Any] = {"model": str(model), "remove": 2, "method": {"operator": "ghost"}}
    job |= {"calibration": {"spec": list(texts), **text}, "search": {"across_texts": "worst"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert load_pipeline(tmp_path / "job.yaml").calibration == Text(spec=texts, **text)
    assert run("run", tmp_path / "job.yaml", "--out", tmp_path / "pipeline").exit_code == 0
    gs.recover(
        model,
        remove=2,
        calibration=Text(spec=texts, **text),
        out=tmp_path / "python",
        search=Search(across_texts="worst"),
        method=gs.Method(operator="ghost"),
    )
    files = ("model.safetensors", "README.md", "ghoststream.json")
    for other in ("pipeline", "python"):
        for name in files:
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    card = (tmp_path / "command" / "README.md").read_text()
    assert '"file:a.txt"' in card
    assert '"file:b.txt"' in card
    plan = tmp_path / "command.work" / "plan-measured-2.json"
    candidates, recipe = inspect_path(plan).tables
    assert list(candidates.headers[-3:]) == ["file:a.txt", "file:b.txt", ""]
    values = {str(name): value for name, value in recipe.rows}
    assert values["text.spec"] == '["file:a.txt", "file:b.txt"]'


def test_specifications_alone_stand_for_a_text(texts: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"remove": 2, "calibration": list(texts)}))
    assert load_pipeline(tmp_path / "job.yaml").calibration == Text(spec=texts)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"remove": 2, "calibration": [texts[0]]}))
    assert load_pipeline(tmp_path / "job.yaml").calibration == Text(spec=texts[0])
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"remove": 2, "calibration": []}))
    with pytest.raises(RequestError, match=r"calibration\.spec: no text is named"):
        load_pipeline(tmp_path / "job.yaml")


def test_a_store_names_its_texts_and_folds_have_each(model: Path, ids: Path, tmp_path: Path) -> None:
    both = ["--calibration", f"ids:{ids / 'even.npy'}", "--calibration", f"ids:{ids / 'odd.npy'}"]
    text = ["--sequences", S, "--length", T, "--micro-batch", MICRO_BATCH]
    assert run("capture", model, *both, *text, "--store", tmp_path / "store").exit_code == 0
    store = ActivationStore.open(str(tmp_path / "store"))
    assert store.recipe["text"]["spec"] == ["ids:even.npy", "ids:odd.npy"]
    assert [one["spec"] for one in store.fingerprint["text"]["texts"]] == store.recipe["text"]["spec"]
    operators = fit("2:4", store=tmp_path / "store", out=tmp_path / "o.safetensors", folds=3)
    # Two windows each, one of each text; by themselves they would be dealt out one by one.
    assert operators.metadata["recipe"]["range_sequences"] == 2


def test_ways_to_repair_a_given_plan_are_ranked_too(model: Path, ids: Path, tmp_path: Path) -> None:
    text: dict[str, Any] = {"calibration": [f"ids:{ids / name}.npy" for name in ("even", "odd")]}
    text |= {"sequences": S, "length": T, "micro_batch": MICRO_BATCH}
    out = tmp_path / "o.safetensors"
    operators = fit("2:4", model=model, across_texts="worst", held_out=HELD, out=out, **text)
    tried = [max(row["gaps_by_text"]) for row in operators.metadata["chosen"]]
    assert len(tried) > 1
    assert tried == sorted(tried)
    assert operators.metadata["recipe"]["chosen_on"]["across_texts"] == "worst"
    assert operators.boundaries[0].features in operators.metadata["chosen"][0]["repair"][0]


def test_estimate_takes_them(model: Path, texts: tuple[str, str]) -> None:
    one, two = (
        gs.estimate(Recovery(model=str(model), remove=2, calibration=Text(spec=spec)), measure=False)
        for spec in (texts[0], texts)
    )
    assert two.to_json()["needs"].keys() == one.to_json()["needs"].keys()


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        ("even", EXHAUSTIVE, "there is one text to calibrate on"),
        ("even odd", {**EXHAUSTIVE, "held_out": 1}, "each of 2 texts, and 1 windows are held out"),
        (
            "even odd",
            {"criterion": "taylor"},
            "--across-texts would not be used: taylor measures no candidate",
        ),
    ],
)
def test_ranking_by_text_is_refused_where_it_cannot_be(
    model: Path, ids: Path, names: str, options: dict[str, Any], says: str
) -> None:
    specs = [f"ids:{ids / name}.npy" for name in names.split()]
    text: dict[str, Any] = {"calibration": specs, "sequences": len(specs) * 6, "length": T}
    with pytest.raises(RequestError, match=says):
        select(2, model=model, micro_batch=1, across_texts="worst", **text, **options)


def test_ranking_by_text_is_refused_where_nothing_is_measured(model: Path, texts: tuple[str, str]) -> None:
    for remove, method in (("2:4", gs.Method(operator="ghost")), (2, None)):
        search = Search(across_texts="worst", criterion=None if method else "streamline")
        request = Recovery(
            model=str(model),
            remove=remove,
            calibration=Text(spec=texts),
            search=search,
            method=method or gs.Method(operator="ghost"),
        )
        with pytest.raises(RequestError, match="--across-texts would not be used: nothing is measured"):
            gs.estimate(request, measure=False)


def test_figures_are_of_one_text(model: Path, texts: tuple[str, str]) -> None:
    says = "are 2 texts, and figures are of one; measure on each by itself"
    with pytest.raises(RequestError, match=says):
        Recovery.make({"remove": 2, "calibration": texts[0], "evaluate": list(texts)})
    result = run("evaluate", model, *(word for spec in texts for word in ("--text", spec)), "--length", 16)
    assert result.exit_code == 2
    assert says in result.stderr
    with pytest.raises(RequestError, match=says):
        gs.evaluate([model], text=list(texts), compute=Compute())  # type: ignore[arg-type]
