"""The card of a result, its pipeline file, its half for mergekit, and a tokenizer that asks nothing."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from pydantic import BaseModel, ConfigDict
from transformers import AutoTokenizer

import ghoststream as gs
from ghoststream.files import file_digest
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery.notes import mergekit_yaml
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.repair import passing_method
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer
from tests.helpers.command_bench import succeed
from tests.helpers.recovered_models import HIDDEN, PLAN, in_clean_process, make_operators

pytestmark = pytest.mark.integration


def test_the_front_matter_is_what_the_hub_reads(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "hub" / "models--org--base" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_llama, base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- mine\n---\n# Base\n")
    gs.export(base, make_operators(), tmp_path / "custom")
    data = ModelCard.load(tmp_path / "custom" / "README.md").data.to_dict()
    assert data == {
        "base_model": ["org/base"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ghoststream", "layer-pruning", "custom_code"],
        "license": "apache-2.0",
        "language": ["en"],
    }
    gs.export(base, make_operators(), tmp_path / "adapter", form="adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "ghoststream.load(BASE, FOLDER)" in card.text
    (base / "README.md").write_text("---\n: [\n---\n")
    gs.export(base, make_operators(), tmp_path / "again")
    assert "license" not in ModelCard.load(tmp_path / "again" / "README.md").data.to_dict()


class Slice(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    layer_range: tuple[int, int]


class Output(BaseModel):
    model_config = ConfigDict(extra="forbid")
    sources: list[Slice]


class Merge(BaseModel):
    """What mergekit's ``MergeConfiguration`` has of fields that a passthrough of slices needs."""

    model_config = ConfigDict(extra="forbid")
    slices: list[Output]
    merge_method: str
    dtype: str


@pytest.mark.parametrize("spans", ["0:1", "2:3 4:6", "1:2 3:4", "5:6"])
def test_mergekit_keeps_the_layers_that_are_left(spans: str) -> None:
    plan = PruningPlan.parse(6, spans)
    merge = Merge.model_validate(yaml.safe_load(mergekit_yaml(plan, model="org/base", dtype="bfloat16")))
    assert merge.merge_method == "passthrough"
    kept = [layer for one in merge.slices for layer in range(*one.sources[0].layer_range)]
    assert kept == list(plan.kept)


def test_the_pruning_half_lies_beside_the_checkpoint_for_all_rounds(tiny_llama: Path, tmp_path: Path) -> None:
    gs.export(tiny_llama, make_operators(PruningPlan.parse(6, "2:3")), tmp_path / "one")
    gs.export(tmp_path / "one", make_operators(PruningPlan.parse(5, "2:3")), tmp_path / "two")
    data = yaml.safe_load((tmp_path / "two" / "mergekit.yaml").read_text())
    assert [one["sources"][0]["layer_range"] for one in data["slices"]] == [[0, 2], [4, 6]]
    assert data["dtype"] == "float32"
    assert gs.verify_path(tmp_path / "two").sound


def test_run_takes_the_recipe_of_a_card_back(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 128, (12, 16)).astype(np.int32))
    text = ("--calibration", f"ids:{ids}", "--sequences", 12, "--length", 16)
    search = ("--max-spans", 1, "--held-out", 4, "--search", "exhaustive")
    given = (*text, *search, "--operator", "least-squares", "--ridge", "0.01", "--dtype", "float32")
    succeed("recover", tiny_llama, "--remove", 1, *given, "--out", tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    recipe = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe)["calibration"] == {"spec": "ids:ids.npy", "sequences": 12, "length": 16}
    assert str(tmp_path) not in card
    (tmp_path / "recipe.yaml").write_text(recipe.replace("ids:ids.npy", f"ids:{ids}"))
    succeed("run", tmp_path / "recipe.yaml", "--model", tiny_llama, "--out", tmp_path / "two")
    for name in ("model.safetensors", "config.json", "mergekit.yaml"):
        assert file_digest(tmp_path / "one" / name) == file_digest(tmp_path / "two" / name)
    figures = card.split("| dense model | ")[1]
    dense = gs.evaluate([tiny_llama], text=gs.Text(spec=f"ids:{ids}", length=16)).rows[0]
    held_out = np.mean(dense.losses.sequence_losses[-4:])
    assert float(figures.split(" |")[0]) == pytest.approx(float(held_out), abs=1e-4)


def test_what_is_not_repaired_has_no_loss_after(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 128, (8, 16)).astype(np.int32))
    text = ("--calibration", f"ids:{ids}", "--sequences", 8, "--length", 16)
    for criterion in ("perplexity", "sleb"):
        # Their figures are of single layers that are missing, or of a plan before any repair.
        given = (
            "--remove",
            2,
            "--criterion",
            criterion,
            "--operator",
            "ghost",
            "--out",
            tmp_path / criterion,
        )
        succeed("recover", tiny_llama, *text, *given, "--out", tmp_path / criterion)
        assert "| dense model | " not in (tmp_path / criterion / "README.md").read_text()


def test_a_second_round_without_operators_claims_no_repair(tiny_llama: Path, tmp_path: Path) -> None:
    bare = BoundaryOperator(Span(2, 3), "identity")
    for n_layers, base, name in ((6, tiny_llama, "one"), (5, tmp_path / "one", "two")):
        operators = OperatorSet(PruningPlan.parse(n_layers, "2:3"), "none", (bare,), HIDDEN)
        gs.export(base, operators, tmp_path / name)
        assert "nothing stands in for them" in (tmp_path / name / "README.md").read_text()


def test_a_recipe_with_given_spans_says_them(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 128, (8, 16)).astype(np.int32))
    text = ("--calibration", f"ids:{ids}", "--sequences", 8, "--length", 16)
    succeed("recover", tiny_llama, "--remove", "1:3", *text, "--operator", "ghost", "--out", tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (recipe["remove"], recipe["method"]) == ("1:3", {"operator": "ghost"})
    assert "## Figures" not in card


def test_a_recipe_of_a_plan_that_repairs_in_several_ways_names_its_file(
    tiny_llama: Path, tmp_path: Path
) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 128, (8, 16)).astype(np.int32))
    text, source = gs.Text(spec=f"ids:{ids}", sequences=8, length=16), tmp_path / "plan.json"
    plan = gs.select(
        2, gs.Source(model=str(tiny_llama), calibration=text), search=gs.Search(criterion="sleb")
    )
    assert len(plan.plan.spans) == 2, "what the test needs"
    ways = [gs.Method(operator="ghost"), gs.Method(operator="least-squares", features="normed", ridge=0.01)]
    replace(plan, methods=tuple(map(passing_method, ways))).save(source)
    one, two = tmp_path / "one", tmp_path / "two"
    gs.recover(tiny_llama, remove=str(source), calibration=text, out=one)
    recipe = (one / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe)["remove"] == "plan.json"
    (tmp_path / "recipe.yaml").write_text(recipe)
    with chdir(tmp_path):
        succeed("run", "recipe.yaml", "--model", tiny_llama, "--out", two)
    assert file_digest(one / "model.safetensors") == file_digest(two / "model.safetensors")


_ASKS = """
import json, sys
from transformers import AutoTokenizer
found = {}
for folder in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found[folder] = [type(tokenizer).__name__, tokenizer("abcd")["input_ids"]]
print("RESULT" + json.dumps(found))
"""


def test_the_tokenizer_asks_nothing(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    gs.export(base, make_operators(PLAN), tmp_path / "whole")
    said = json.loads((base / "tokenizer_config.json").read_text())
    del said["tokenizer_class"]
    (base / "tokenizer_config.json").write_text(json.dumps(said))
    gs.export(base, make_operators(PLAN), tmp_path / "unnamed")
    (base / "tokenizer_config.json").unlink()
    gs.export(base, make_operators(PLAN), tmp_path / "alone")
    folders = [str(tmp_path / name) for name in ("whole", "unnamed", "alone")]
    found = in_clean_process(_ASKS, folders, tmp_path)
    wanted = AutoTokenizer.from_pretrained(base)("abcd")["input_ids"]
    assert [ids for _, ids in found.values()] == [wanted] * 3
    assert gs.verify_path(tmp_path / "alone").sound
