"""Stores, operators and recovered checkpoints of something else, or damaged: one clear line, no loss."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.command_bench import BAD_REQUEST, BROKEN_DATA, LENGTH, Bench, flip_bit, run

pytestmark = pytest.mark.integration


def test_a_store_of_another_request(bench: Bench, refused: Callable[..., str]) -> None:
    fewer = (*bench.capture[:2], "--sequences", 7, "--length", LENGTH)
    bfloat16, float16 = ("--dtype", "bfloat16"), ("--store-dtype", "float16")
    other_text = ("--calibration", bench.text, "--sequences", 8, "--length", 8)
    cases: tuple[tuple[Path, tuple[object, ...], str], ...] = (
        (bench.other, bench.capture, "recipe.model_digest"),
        (bench.deeper, bench.capture, "recipe.layers is"),
        (bench.wider, bench.capture, "recipe.model_digest"),
        (bench.model, other_text, "recipe.text.length is 16, asked for 8"),
        (bench.model, fewer, "recipe.text.sequences is 8, asked for 7"),
        (bench.model, (*bench.capture, "--bos", "always"), "recipe.tokens_digest"),
        (bench.model, (*bench.capture, *bfloat16), 'recipe.dtype is "float32", asked for "bfloat16"'),
        (bench.model, (*bench.capture, *float16), 'store_dtype is "float32", asked for "float16"'),
        (bench.model, (*bench.capture, "--attention", "eager"), "recipe.attention"),
        (bench.model, (*bench.capture, "--micro-batch", 3), "recipe.micro_batch"),
        (bench.model, (*bench.capture, "--layers", "1:4"), "layers"),
    )  # fmt: skip
    for model, options, says in cases:
        where = (says, str(bench.store), "choose another place")
        refused("capture", model, *options, "--store", bench.store, code=BAD_REQUEST, says=where)


def test_a_store_that_lacks_what_is_needed(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    says = ("h[4]", "run capture again")
    refused("fit", "--store", bench.some_store, "--plan", "1:4", *out, code=BROKEN_DATA, says=says)
    refused("select", "--store", bench.some_store, "--remove", 2, code=BROKEN_DATA, says="run capture again")
    refused(
        "fit",
        "--store",
        tmp_path / "nowhere",
        "--plan",
        "1:3",
        *out,
        code=BAD_REQUEST,
        says="no activation store",
    )
    refused(
        "fit",
        "--store",
        bench.model,
        "--plan",
        "1:3",
        *out,
        code=BROKEN_DATA,
        says="is not an activation store",
    )
    refused("fit", "--store", bench.operators, "--plan", "1:3", *out, code=BAD_REQUEST, says="is a file")
    assert list(tmp_path.iterdir()) == []


def test_operators_of_another_model(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    out = ("--operators", bench.operators, "--out", tmp_path / "out")
    refused(
        "export", bench.other, *out, code=BAD_REQUEST, says=("made for another checkpoint", "give the one")
    )
    refused("export", bench.wider, *out, code=BAD_REQUEST, says=("hidden size 32", "64"))
    refused("export", bench.deeper, *out, code=BAD_REQUEST, says=("6 layers", "8"))
    refused("export", bench.recovered, *out, code=BAD_REQUEST, says=("6 layers", "this model has 4"))
    nowhere = ("--operators", tmp_path / "nowhere", "--out", tmp_path / "out")
    refused("export", bench.model, *nowhere, code=BAD_REQUEST, says=str(tmp_path / "nowhere"))
    says = "give that model too"
    refused(
        "evaluate",
        tmp_path / "ops.safetensors",
        "--text",
        bench.text,
        code=BAD_REQUEST,
        says="ops.safetensors",
    )
    operators = Path(shutil.copy(bench.operators, tmp_path / "ops.safetensors"))
    refused("evaluate", operators, "--text", bench.text, "--length", LENGTH, code=BAD_REQUEST, says=says)


def test_what_is_no_run_is_told_what_it_is(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    says = f"{bench.store} is an activation store, of which a report shows nothing"
    refused("report", bench.store, "--out", tmp_path / "page.html", code=BAD_REQUEST, says=says)


def test_a_flipped_bit_in_the_store(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    store = Path(shutil.copytree(bench.store, tmp_path / "store"))
    shard = next((store / "hidden" / "3").glob("c.*"))
    flip_bit(shard, 1000)
    out = ("--out", tmp_path / "out")
    says = (str(store), "hidden/3/c.0.0.0", "chunk 0", "capture again")
    refused("fit", "--store", store, "--plan", "1:3", *out, code=BROKEN_DATA, says=says)
    refused("select", "--store", store, "--remove", 2, code=BROKEN_DATA, says=says)
    verified = run("verify", store)
    assert verified.exit_code == BROKEN_DATA
    assert "hidden/3/c.0.0.0" in verified.stdout


def test_a_damaged_store(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    store = Path(shutil.copytree(bench.store, tmp_path / "store"))
    fit = ("fit", "--store", store, "--plan", "1:3", "--out", tmp_path / "out")
    capture = ("capture", bench.model, *bench.capture, "--store", store)
    shard = next((store / "hidden" / "3").glob("c.*"))
    shard.unlink()
    for command in (fit, capture):
        refused(*command, code=BROKEN_DATA, says=("hidden/3/c.0.0.0 is missing", "capture again"))
    flip_bit(store / "manifest.json", 100)
    for command in (fit, capture):
        refused(*command, code=BROKEN_DATA, says=("manifest.json", "capture again"))


def test_damaged_operators(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    for place, says in ((-5, "fails its digest"), (30, "ops.safetensors")):
        operators = Path(shutil.copy(bench.operators, tmp_path / "ops.safetensors"))
        flip_bit(operators, place)
        out = ("--operators", operators, "--out", tmp_path / "out")
        refused("export", bench.model, *out, code=BROKEN_DATA, says=says)
        text = ("--text", bench.text, "--length", LENGTH)
        refused("evaluate", bench.model, operators, *text, code=BROKEN_DATA, says=says)
    operators.write_bytes(operators.read_bytes()[:500])
    refused("export", bench.model, *out, code=BROKEN_DATA, says="ops.safetensors")
    mine = ("--operators", bench.root / "mine.json", "--out", tmp_path / "out")
    refused("export", bench.model, *mine, code=BAD_REQUEST, says="mine.json is JSON, and an operators file")
    shard = next(bench.model.glob("*.safetensors"))
    shards = ("--operators", shard, "--out", tmp_path / "out")
    refused("export", bench.model, *shards, code=BROKEN_DATA, says="carries no ghoststream metadata")


def test_a_damaged_recovered_checkpoint(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    for damage, says in (
        (lambda path: flip_bit(path / "model.safetensors", -100), "model.safetensors has changed"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: (path / "config.json").write_text("{}"), "config.json has changed"),
        (lambda path: (path / "ghoststream.json").write_text("{"), "ghoststream.json"),
        (lambda path: (path / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    ):
        folder = tmp_path / "recovered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bench.recovered, folder)
        assert run("verify", folder).exit_code == 0
        damage(folder)
        verified = run("verify", folder)
        assert verified.exit_code == BROKEN_DATA
        assert says in verified.stdout
    shutil.copytree(bench.recovered, folder, dirs_exist_ok=True)
    text = ("--text", bench.text, "--length", LENGTH)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    refused("evaluate", folder, *text, code=BROKEN_DATA, says="is truncated")
    out = ("--operators", bench.operators, "--out", folder)
    refused("export", bench.model, *out, code=BROKEN_DATA, says=("damaged", "is truncated", "move it away"))
