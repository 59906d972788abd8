"""Bad input on the command line: one clear line, exit code 2 or 3, and nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ghoststream.cli import main
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
LENGTH = 16
BAD_REQUEST, BROKEN_DATA = 2, 3
FIRST_LAYER = "model.layers.0.self_attn.q_proj.weight"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def digests(folder: Path) -> dict[str, str]:
    """Digest every file under a folder, locks and temporary names left out."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith((".lock", ".partial"))
    }


@dataclass(frozen=True)
class Bench:
    """What commands are given: made once, and never changed by a command that fails."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        root: Path = object.__getattribute__(self, "root")
        return root / name

    @property
    def text(self) -> str:
        return f"file:{self.root / 'text.txt'}"

    @property
    def capture(self) -> tuple[object, ...]:
        """Options of the capture that made the store."""
        return ("--calibration", self.text, "--sequences", 8, "--length", LENGTH)


def text_of(n_characters: int) -> str:
    letters = np.random.default_rng(0).integers(97, 123, size=n_characters)
    return "".join(map(chr, letters))


def save_model(folder: Path, **options: Any) -> Path:
    save_tiny("llama", folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    bench = Bench(root)
    (root / "text.txt").write_text(text_of(40 * LENGTH))
    (root / "short.txt").write_text("too short")
    save_model(bench.model)
    save_model(bench.other, seed=1, intermediate_size=48)
    save_model(bench.wider, hidden_size=64)
    save_model(bench.deeper, num_hidden_layers=8)
    succeed("capture", bench.model, *bench.capture, "--store", bench.store)
    succeed("capture", bench.model, *bench.capture, "--store", bench.some_store, "--layers", "1,3")
    succeed("solve", bench.store, "--plan", "1:3", "--out", bench.operators)
    succeed("export", bench.model, "--operators", bench.operators, "--out", bench.recovered)
    (root / "full_folder").mkdir()
    (root / "full_folder" / "mine.txt").write_text("do not lose me")
    (root / "mine.json").write_text('{"mine": true}')
    plans = {
        "past_the_end": {"n_layers": 6, "spans": [[4, 9]]},
        "of_another": {"n_layers": 8, "spans": [[1, 3]]},
        "of_all": {"n_layers": 6, "spans": [[0, 6]]},
        "of_none": {"n_layers": 6, "spans": []},
        "malformed": {"n_layers": 6, "spans": [["a", 2]]},
    }
    for name, plan in plans.items():
        (root / f"plan_{name}").write_text(json.dumps(plan))
    return bench


@pytest.fixture
def refused(bench: Bench, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Run a command that must fail as it should, and hold everything that exists against it."""
    before = digests(bench.root)

    def check(*arguments: object, code: int, says: str | tuple[str, ...]) -> str:
        there = digests(tmp_path)
        result = run(*arguments)
        line = last_line(result.stderr)
        assert result.exit_code == code, result.stderr
        for part in (says,) if isinstance(says, str) else says:
            assert part in line
        after = digests(tmp_path)
        assert {path: after.get(path) for path in there} == there, "something that existed was changed"
        return line

    yield check
    assert digests(bench.root) == before


def last_line(stderr: str) -> str:
    """Return the one line of the error; before it only progress may stand."""
    *progress, line = stderr.splitlines()
    assert line.startswith("error: ")
    assert not line.startswith("error: unexpected "), line
    assert "Traceback" not in stderr
    assert not any(text.startswith("error") for text in progress)
    if path := os.environ.get("GHOSTSTREAM_TEST_MESSAGES"):
        with Path(path).open("a") as file:
            print(
                os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0], line, sep="\n    ", file=file
            )
    return line


def copy_of(bench: Bench, tmp_path: Path) -> Path:
    shutil.copytree(bench.model, tmp_path / "model")
    return tmp_path / "model"


def shard_of(model: Path, tensor: str) -> Path:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / str(index["weight_map"][tensor])


def edit_shard(model: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = shard_of(model, tensor)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **values}))


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# --- the model


def unknown_architecture(model: Path) -> None:
    edit_json(model / "config.json", model_type="ctrl", architectures=["CTRLLMHeadModel"])


def unheard_of_architecture(model: Path) -> None:
    edit_json(model / "config.json", model_type="nonesuch")


def composite(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "llava"}))


def quantised(model: Path) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def only_bin(model: Path) -> None:
    for path in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"pickle")


def no_weights(model: Path) -> None:
    for path in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        path.unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def broken_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": ')


def missing_shard(model: Path) -> None:
    shard_of(model, FIRST_LAYER).unlink()


def truncated_shard(model: Path) -> None:
    path = shard_of(model, FIRST_LAYER)
    path.write_bytes(path.read_bytes()[:-100])


def empty_shard(model: Path) -> None:
    shard_of(model, FIRST_LAYER).write_bytes(b"")


def garbage_header(model: Path) -> None:
    path = shard_of(model, FIRST_LAYER)
    path.write_bytes(struct.pack("<Q", 40) + b"\xff" * 200)


def wrong_header(model: Path) -> None:
    header = b'{"a": {"dtype": "F32"}, "b": 3}'
    path = shard_of(model, FIRST_LAYER)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)


def wrong_shape(model: Path) -> None:
    edit_shard(model, FIRST_LAYER, lambda tensors: tensors.update({FIRST_LAYER: torch.zeros(32, 16)}))


def missing_tensor(model: Path) -> None:
    tensor_not_where_the_index_says(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    del index["weight_map"][FIRST_LAYER]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def tensor_not_where_the_index_says(model: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[FIRST_LAYER]

    edit_shard(model, FIRST_LAYER, remove)


def unexpected_tensor(model: Path) -> None:
    edit_shard(model, FIRST_LAYER, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"][FIRST_LAYER]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def not_finite(model: Path) -> None:
    edit_shard(
        model, FIRST_LAYER, lambda tensors: tensors.update({FIRST_LAYER: torch.full((32, 32), torch.nan)})
    )


MODELS: tuple[tuple[Callable[[Path], None], int, tuple[str, ...]], ...] = (
    (unknown_architecture, BAD_REQUEST, ("'ctrl' cannot be streamed", "supported are")),
    (unheard_of_architecture, BAD_REQUEST, ("nonesuch",)),
    (composite, BAD_REQUEST, ("llava", "text part")),
    (quantised, BAD_REQUEST, ("gptq", "unquantised")),
    (only_bin, BAD_REQUEST, ("pytorch_model.bin", "save_pretrained")),
    (no_weights, BAD_REQUEST, ("model.safetensors",)),
    (no_config, BROKEN_DATA, ("config.json",)),
    (broken_config, BROKEN_DATA, ("config.json",)),
    (broken_index, BROKEN_DATA, ("model.safetensors.index.json", "again")),
    (missing_shard, BROKEN_DATA, (".safetensors is missing", "again")),
    (truncated_shard, BROKEN_DATA, ("is truncated", "again")),
    (empty_shard, BROKEN_DATA, ("not a complete safetensors file", "again")),
    (garbage_header, BROKEN_DATA, ("not a complete safetensors file", "again")),
    (wrong_header, BROKEN_DATA, ("safetensors",)),
    (wrong_shape, BROKEN_DATA, (FIRST_LAYER, "(32, 16)", "(32, 32)")),
    (missing_tensor, BROKEN_DATA, ("lacks the tensor", FIRST_LAYER)),
    (tensor_not_where_the_index_says, BROKEN_DATA, (FIRST_LAYER, "does not hold it")),
    (unexpected_tensor, BROKEN_DATA, ("unexpected tensor", "model.extra.weight")),
)


@pytest.mark.parametrize(("damage", "code", "says"), MODELS, ids=[case[0].__name__ for case in MODELS])
def test_a_model_that_cannot_be_used(
    damage: Callable[[Path], None],
    code: int,
    says: tuple[str, ...],
    bench: Bench,
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    model = copy_of(bench, tmp_path)
    damage(model)
    line = refused("capture", model, *bench.capture, "--store", tmp_path / "store", code=code, says=says)
    assert not (tmp_path / "store").exists()
    assert refused("plan", model, "--remove", 2, "--no-measure", code=code, says=says) == line
    refused("evaluate", model, "--text", bench.text, "--length", LENGTH, code=code, says=says)
    out = ("--operators", bench.operators, "--out", tmp_path / "out")
    refused("export", model, *out, code=code, says=says)
    refused("recover", model, "--remove", 2, *bench.capture, "--out", tmp_path / "out", code=code, says=says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_weights_that_are_not_finite(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    model = copy_of(bench, tmp_path)
    not_finite(model)
    says = ("not finite", "position 1", "check the weights")
    refused("capture", model, *bench.capture, "--store", tmp_path / "store", code=BROKEN_DATA, says=says)
    refused("evaluate", model, "--text", bench.text, "--length", LENGTH, code=BROKEN_DATA, says=says)


def test_a_model_that_is_not_there(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    refused(
        "capture", tmp_path / "nowhere", *bench.capture, *store, code=BAD_REQUEST, says="no model folder at"
    )
    refused("capture", "org/nowhere", *bench.capture, *store, code=BAD_REQUEST, says="'org/nowhere'")
    refused("capture", bench.text, *bench.capture, *store, code=BAD_REQUEST, says="no model folder at")


# --- the text


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
        f"file:{tmp_path}/types.jsonl": ("the field 'text'", "line 1", "not a string"),
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


# --- the plan


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
    refused("solve", bench.store, "--plan", file, *out, code=BAD_REQUEST, says=says)
    refused("recover", bench.model, "--plan", file, *bench.capture, *out, code=BAD_REQUEST, says=says)
    assert list(tmp_path.iterdir()) == []


def test_spans_that_do_not_fit(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    cases = {
        "4:9": "reaches past the last layer",
        "0:6": "removes 6 of 6 layers",
        "3:3": "empty or negative",
        "five": "cannot read the span 'five'",
        "no_such_plan.json": "there is no plan file no_such_plan.json",
        str(bench.operators): "is not readable JSON",
        str(bench.root / "mine.json"): "mine.json: not a pruning plan",
    }
    for plan, says in cases.items():
        code = BROKEN_DATA if plan == str(bench.operators) else BAD_REQUEST
        refused("solve", bench.store, "--plan", plan, "--out", tmp_path / "out", code=code, says=says)


def test_too_many_layers_or_none(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    for number, says in ((6, "6"), (7, "7"), (0, "--remove"), (-1, "--remove"), ("x", "--remove")):
        remove = ("--remove", number)
        refused("plan", bench.model, *remove, "--no-measure", code=BAD_REQUEST, says=says)
        refused("select", bench.store, *remove, code=BAD_REQUEST, says=says)
        refused("select", bench.store, *remove, "--criterion", "shortgpt", code=BAD_REQUEST, says=says)
        refused("recover", bench.model, *remove, *bench.capture, *out, code=BAD_REQUEST, says=says)
    # The first and the last layer are not candidates of this criterion.
    refused("select", bench.store, "--remove", 5, code=BAD_REQUEST, says="5")
    both = ("--remove", 2, "--plan", "1:3")
    refused("recover", bench.model, *both, *bench.capture, *out, code=BAD_REQUEST, says="not both")
    refused("recover", bench.model, *bench.capture, *out, code=BAD_REQUEST, says="which plan")


# --- artifacts of something else


def test_a_store_of_another_request(bench: Bench, refused: Callable[..., str]) -> None:
    other_text = ("--calibration", bench.text, "--sequences", 8, "--length", 8)
    cases: tuple[tuple[Path, tuple[object, ...], str], ...] = (
        (bench.other, bench.capture, "recipe.model_digest"),
        (bench.deeper, bench.capture, "recipe.layers is"),
        (bench.wider, bench.capture, "recipe.model_digest"),
        (bench.model, other_text, "recipe.text.length is 16, asked for 8"),
        (bench.model, (*bench.capture[:2], "--sequences", 7, "--length", LENGTH), "recipe.text.sequences is 8, asked for 7"),
        (bench.model, (*bench.capture, "--bos", "always"), "recipe.tokens_digest"),
        (bench.model, (*bench.capture, "--dtype", "bfloat16"), 'recipe.dtype is "float32", asked for "bfloat16"'),
        (bench.model, (*bench.capture, "--store-dtype", "float16"), 'store_dtype is "float32", asked for "float16"'),
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
    refused("solve", bench.some_store, "--plan", "1:4", *out, code=BROKEN_DATA, says=says)
    refused("select", bench.some_store, "--remove", 2, code=BROKEN_DATA, says="run capture again")
    refused(
        "solve", tmp_path / "nowhere", "--plan", "1:3", *out, code=BAD_REQUEST, says="no activation store"
    )
    refused("solve", bench.model, "--plan", "1:3", *out, code=BROKEN_DATA, says="is not an activation store")
    refused("solve", bench.operators, "--plan", "1:3", *out, code=BAD_REQUEST, says="is a file")
    assert list(tmp_path.iterdir()) == []


def test_operators_of_another_model(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    out = ("--operators", bench.operators, "--out", tmp_path / "out")
    refused(
        "export", bench.other, *out, code=BAD_REQUEST, says=("made for another checkpoint", "give the one")
    )
    refused("export", bench.wider, *out, code=BAD_REQUEST, says=("hidden size 32", "64"))
    refused("export", bench.deeper, *out, code=BAD_REQUEST, says=("6 layers", "8"))
    refused("export", bench.recovered, *out, code=BAD_REQUEST, says="recovered checkpoint already")
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


# --- options


def test_options_with_unknown_values(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    cases: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
        (("--dtype", "int8"), ("--dtype", "int8", "bfloat16")),
        (("--store-dtype", "float64"), ("--store-dtype", "float64")),
        (("--device", "abacus"), ("unknown device 'abacus'", "cpu")),
        (("--device", "cuda:99"), ("cuda:99",)),
        (("--attention", "telepathy"), ("telepathy", "eager")),
        (("--bos", "maybe"), ("--bos", "maybe")),
        (("--layers", "9"), ("h[0] to h[6]",)),
        (("--layers", "x"), ("--layers", "0,10:20,30")),
        (("--host-memory", "lots"), ("--host-memory", "8GiB")),
        (("--micro-batch", "0"), ("--micro-batch",)),
        (("--length", "1"), ("--length",)),
        (("--nonsense",), ("--nonsense", "--help")),
    )
    for options, says in cases:
        if options == ("--device", "cuda:99") and torch.cuda.is_available():
            continue
        refused("capture", bench.model, *bench.capture, *store, *options, code=BAD_REQUEST, says=says)
    refused("capture", bench.model, *store, code=BAD_REQUEST, says=("--calibration", "--help"))
    refused("solve", bench.store, "--plan", "1:3", "--operator", "magic", code=BAD_REQUEST, says="magic")
    refused("select", bench.store, "--remove", 2, "--criterion", "luck", code=BAD_REQUEST, says="luck")
    refused("repair", bench.model, code=BAD_REQUEST, says="repair")
    assert list(tmp_path.iterdir()) == []


# --- places for results


def test_an_output_that_exists(bench: Bench, refused: Callable[..., str]) -> None:
    full, mine = bench.root / "full_folder", bench.root / "mine.json"
    code = BAD_REQUEST
    operators = ("--operators", bench.operators)
    refused("export", bench.model, *operators, "--out", full, code=code, says=("not empty", "mine.txt"))
    refused("export", bench.model, *operators, "--out", mine, code=code, says="is a file")
    recover = ("recover", bench.model, "--remove", 2, *bench.capture)
    refused(*recover, "--out", full, code=code, says=("full_folder is not empty",))
    refused(*recover, "--out", mine, code=code, says="is a file")
    refused("capture", bench.model, *bench.capture, "--store", full, code=code, says="something else")
    refused("capture", bench.model, *bench.capture, "--store", mine, code=code, says="is a file")
    solve = ("solve", bench.store, "--plan", "1:3")
    refused(*solve, "--out", mine, code=code, says=("mine.json exists", "choose another name"))
    refused(*solve, "--out", full, code=code, says="full_folder")
    select = ("select", bench.store, "--remove", 2)
    refused(*select, "--out", mine, code=code, says=("mine.json exists", "choose another name"))
    refused(*select, "--out", full, code=code, says="full_folder")
    evaluate = ("evaluate", bench.model, "--text", bench.text, "--length", LENGTH)
    refused(*evaluate, "--json", mine, code=code, says=("mine.json exists", "choose another name"))
    refused(*evaluate, "--json", full, code=code, says="full_folder")


def test_results_of_another_request(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    succeed("select", bench.store, "--remove", 2, "--out", tmp_path / "plan.json")
    select = ("select", bench.store, "--remove", 3, "--out", tmp_path / "plan.json")
    refused(*select, code=BAD_REQUEST, says="not the plan of this request")
    evaluate = ("evaluate", bench.model, "--text", bench.text, "--json", tmp_path / "figures.json")
    succeed(*evaluate, "--length", LENGTH)
    succeed(*evaluate, "--length", LENGTH)
    refused(*evaluate, "--length", 8, code=BAD_REQUEST, says="figures of this request")
    diagonal = ("--operator", "linear-patch-diagonal")
    solve = ("solve", bench.store, "--plan", "1:3", *diagonal, "--out")
    refused(*solve, bench.operators, code=BAD_REQUEST, says="not the result of this request")
    succeed(*solve, tmp_path / "diagonal")
    says: tuple[str, ...] = ("recovered checkpoint of another request", "operators", "choose another place")
    out = ("--operators", tmp_path / "diagonal", "--out", bench.recovered)
    refused("export", bench.model, *out, code=BAD_REQUEST, says=says)
    recover = ("recover", bench.model, *bench.capture, "--out", bench.recovered, "--plan")
    says = ("another request", "plan.spans")
    refused(*recover, "2:4", code=BAD_REQUEST, says=says)
    assert not bench.root.joinpath("recovered.work").exists(), "refused before the pass"


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if result.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {result.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    yield from mounted(tmp_path / "disk", "size=32k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A place that nobody may write to."""
    yield from mounted(tmp_path / "disk", "ro")


def test_a_read_only_place(bench: Bench, refused: Callable[..., str], read_only: Path) -> None:
    out = ("--out", read_only / "out")
    says = (str(read_only), "choose a place that you may write to")
    commands: tuple[tuple[object, ...], ...] = (
        ("capture", bench.model, *bench.capture, "--store", read_only / "store"),
        ("select", bench.store, "--remove", 2, *out),
        ("solve", bench.store, "--plan", "1:3", *out),
        ("export", bench.model, "--operators", bench.operators, *out),
        ("evaluate", bench.model, "--text", bench.text, "--length", LENGTH, "--json", read_only / "x.json"),
        ("recover", bench.model, "--remove", 2, *bench.capture, *out),
    )
    for command in commands:
        refused(*command, code=BAD_REQUEST, says=says)


def test_a_disk_that_is_too_small_is_found_before(
    bench: Bench, refused: Callable[..., str], small_disk: Path
) -> None:
    says = (str(small_disk), "needs", "are free there")
    capture = ("capture", bench.model, *bench.capture, "--store", small_disk / "store")
    refused(*capture, code=BAD_REQUEST, says=says)
    out = ("--operators", bench.operators, "--out", small_disk / "out")
    refused("export", bench.model, *out, code=BAD_REQUEST, says=says)


def test_a_disk_that_becomes_full(
    bench: Bench, refused: Callable[..., str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free before says nothing of what others write meanwhile."""
    for place in ("activations.opening", "checkpoint.writer", "statistics.boundary", "statistics.reduction"):
        monkeypatch.setattr(f"ghoststream.{place}.require_free_space", lambda *_: None, raising=False)
    says = ("no space left while writing", str(small_disk), "run the same command again")
    capture = ("capture", bench.model, *bench.capture, "--store", small_disk / "store")
    refused(*capture, code=BROKEN_DATA, says=says)
    shutil.rmtree(small_disk / "store")
    out = ("--operators", bench.operators, "--out", small_disk / "out")
    refused("export", bench.model, *out, code=BROKEN_DATA, says=says)
    assert not (small_disk / "out").exists()
    shutil.rmtree(small_disk / "out.partial")
    solve = ("solve", bench.store, "--plan", "1:3", "--out", small_disk / "operators")
    refused(*solve, code=BROKEN_DATA, says=says)
    assert not (small_disk / "operators").exists()


# --- damage


def test_a_flipped_bit_in_the_store(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    store = Path(shutil.copytree(bench.store, tmp_path / "store"))
    shard = next((store / "hidden" / "3").glob("c.*"))
    flip_bit(shard, 1000)
    out = ("--out", tmp_path / "out")
    says = (str(store), "hidden/3/c.0.0.0", "chunk 0", "capture again")
    refused("solve", store, "--plan", "1:3", *out, code=BROKEN_DATA, says=says)
    refused("select", store, "--remove", 2, code=BROKEN_DATA, says=says)
    verified = run("verify", store)
    assert verified.exit_code == BROKEN_DATA
    assert "hidden/3/c.0.0.0" in verified.stdout


def test_a_damaged_store(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    store = Path(shutil.copytree(bench.store, tmp_path / "store"))
    solve = ("solve", store, "--plan", "1:3", "--out", tmp_path / "out")
    capture = ("capture", bench.model, *bench.capture, "--store", store)
    shard = next((store / "hidden" / "3").glob("c.*"))
    shard.unlink()
    for command in (solve, capture):
        refused(*command, code=BROKEN_DATA, says=("hidden/3/c.0.0.0 is missing", "capture again"))
    flip_bit(store / "manifest.json", 100)
    for command in (solve, capture):
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
    refused("export", bench.model, *mine, code=BROKEN_DATA, says="mine.json")
    shard = next(bench.model.glob("*.safetensors"))
    shards = ("--operators", shard, "--out", tmp_path / "out")
    refused("export", bench.model, *shards, code=BROKEN_DATA, says="no readable ghoststream metadata")


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


# --- in a process of its own


@pytest.mark.parametrize("debug", [False, True])
def test_in_a_process_of_its_own(debug: bool, bench: Bench, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ghoststream", "solve", str(bench.store), "--plan", "4:9"]
    command += ["--out", str(tmp_path / "out"), *(["--debug"] if debug else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == BAD_REQUEST
    assert done.stdout == ""
    assert ("Traceback" in done.stderr) == debug
    assert done.stderr.splitlines()[-1].startswith("error: span [4,9) reaches past the last layer")
    assert debug or len(done.stderr.splitlines()) == 1


def test_a_file_that_may_not_grow(bench: Bench, tmp_path: Path) -> None:
    """The limit of a process on the size of its files stands for any write that fails for its size."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000));"
        "from ghoststream.cli import main; main(sys.argv[1:])"
    )
    arguments = ["capture", bench.model, *bench.capture, "--store", tmp_path / "store"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == BROKEN_DATA, done.stderr
    line = last_line(done.stderr)
    assert "store" in line
    assert "run the same command again" in line
    succeed(*arguments)
    assert list(digests(tmp_path / "store").values()) == list(digests(bench.store).values())
