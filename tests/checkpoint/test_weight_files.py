"""Folders as found: what ``from_pretrained`` loads is loaded the same, or refused by the true reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ghoststream.checkpoint import CheckpointIndex
from ghoststream.errors import GhoststreamError, UnsupportedModelError
from ghoststream.spans import PruningPlan
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.export import export
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import Lane, PassOptions, StatesFactory, StreamedPass, make_batches
from ghoststream.testing.conformance import StateRecorder, random_tokens, resident_pass
from ghoststream.testing.models import save_tiny
from ghoststream.testing.operators import random_operators

pytestmark = pytest.mark.integration
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
VALUE_HEAD = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """Copies of one model in shards, or of another one in a single file."""
    root = tmp_path_factory.mktemp("saved")
    save_tiny("llama", root / "shards", seed=0)
    save_tiny("llama", root / "single", seed=1, max_shard_size="5MB")
    save_tiny("llama", root / "tied", seed=2, max_shard_size="5MB", tie_word_embeddings=True)
    return lambda name, folder: Path(shutil.copytree(root / name, folder))


def _logits_of_transformers(folder: Path, batch: Any) -> tuple[torch.Tensor, torch.dtype]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    # What is not in the files gets random values there, with a warning: nobody means that.
    if info["missing_keys"] or info["mismatched_keys"]:
        msg = "made of random values"
        raise ValueError(msg)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return resident_pass(model.eval(), batch)[1], model.dtype


def _compare(folder: Path) -> str:
    """Compare with transformers: the same logits, or both refuse. Return what was said."""
    try:
        skeleton = ModelSession(folder).skeleton
    except GhoststreamError as error:
        ids = torch.arange(3, 43).reshape(2, 20).numpy()
        with pytest.raises((OSError, ValueError, KeyError, IndexError, AttributeError)):
            _logits_of_transformers(folder, make_batches(ids, ids > 0, 2)[0])
        return str(error.args[0])
    ids, mask = random_tokens(skeleton, 2, 20, padding="none")
    batches, recorder = make_batches(ids, mask, 2), StateRecorder()
    lane = Lane("dense", PruningPlan(skeleton.n_layers), logits=recorder)
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    StreamedPass(skeleton, batches, [lane], factory, PassOptions(logit_tokens=None)).run()
    expected, dtype = _logits_of_transformers(folder, batches[0])
    assert skeleton.dtype == dtype
    assert torch.equal(recorder.logits[0], expected.flatten(0, 1))
    return "the same"


def _index(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / INDEX).read_text()))


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps(index))


def _edit_config(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))


def _rename(folder: Path, old: str, new: str) -> None:
    (folder / new).parent.mkdir(exist_ok=True)
    (folder / old).rename(folder / new)


def _single_beside_older_shards(folder: Path, other: Path) -> None:
    shutil.copy(other / SINGLE, folder / SINGLE)


def _index_left_over(folder: Path, other: Path) -> None:
    _single_beside_older_shards(folder, other)
    for path in folder.glob("model-*.safetensors"):
        path.unlink()


def _saved_twice(folder: Path, _: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)


def _shards_in_folders(folder: Path, _: Path) -> None:
    index = _index(folder)
    for number, shard in enumerate(sorted(set(index["weight_map"].values()))):
        _rename(folder, shard, f"part{number % 2}/{shard}")
        for name, place in index["weight_map"].items():
            if place == shard:
                index["weight_map"][name] = f"part{number % 2}/{shard}"
    _write_index(folder, index)


def _same_name_in_two_folders(folder: Path, _: Path) -> None:
    index = _index(folder)
    shards = sorted(set(index["weight_map"].values()))
    new = {shard: f"part{number:02d}/{SINGLE}" for number, shard in enumerate(shards)}
    for shard, name in new.items():
        _rename(folder, shard, name)
    index["weight_map"] = {name: new[shard] for name, shard in index["weight_map"].items()}
    _write_index(folder, index)


def _in_two_shards(folder: Path, _: Path) -> None:
    shards = sorted(set(_index(folder)["weight_map"].values()))
    first = load_file(folder / shards[0])
    name = next(iter(first))
    for shard, factor in ((shards[1], 2.0), (shards[-1], 3.0)):
        tensors = load_file(folder / shard)
        save_file({**tensors, name: first[name] * factor}, folder / shard, {"format": "pt"})


def _in_a_shard_that_the_index_does_not_say(folder: Path, _: Path) -> None:
    index = _index(folder)
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(index["weight_map"], shards[0])
    index["weight_map"] |= {f"nothing.{number}": shard for number, shard in enumerate(shards)}
    _write_index(folder, index)


def _value_head_in_a_shard(folder: Path, _: Path) -> None:
    index = _index(folder)
    save_file(VALUE_HEAD, folder / "head.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(VALUE_HEAD, "head.safetensors")
    _write_index(folder, index)


def _other_models_layers(folder: Path, _: Path) -> None:
    index = _index(folder)
    save_file({"vision_tower.layers.0.mlp.weight": torch.ones(2, 2)}, folder / "vision.safetensors")
    index["weight_map"]["vision_tower.layers.0.mlp.weight"] = "vision.safetensors"
    _write_index(folder, index)


def _unrelated_safetensors(folder: Path, _: Path) -> None:
    for name in ("consolidated.safetensors", "model-00001-of-99999.safetensors", "a/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(VALUE_HEAD, folder / name)


def _named_by_the_configuration(folder: Path, other: Path) -> None:
    shutil.copy(other / SINGLE, folder / "other.safetensors")
    _edit_config(folder, transformers_weights="other.safetensors")


def _index_named_by_the_configuration(folder: Path, other: Path) -> None:
    _rename(folder, INDEX, "own.safetensors.index.json")
    shutil.copy(other / SINGLE, folder / SINGLE)
    _edit_config(folder, transformers_weights="own.safetensors.index.json")


def _no_dtype(folder: Path, _: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))


LOADED = [
    _single_beside_older_shards,
    _index_left_over,
    _saved_twice,
    _shards_in_folders,
    _same_name_in_two_folders,
    _in_two_shards,
    _in_a_shard_that_the_index_does_not_say,
    _value_head_in_a_shard,
    _other_models_layers,
    _unrelated_safetensors,
    _named_by_the_configuration,
    _index_named_by_the_configuration,
    _no_dtype,
]


@pytest.mark.parametrize("change", LOADED, ids=lambda change: change.__name__.strip("_"))
def test_what_transformers_loads_is_loaded_the_same(
    change: Callable[[Path, Path], None], saved: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    folder = saved("shards", tmp_path / "model")
    change(folder, saved("single", tmp_path / "other"))
    assert _compare(folder) == "the same"
    export(folder, random_operators(PruningPlan.parse(6, "2:4"), 32), tmp_path / "out")
    assert _compare(tmp_path / "out") == "the same"
    assert not {name for name in CheckpointIndex.open(tmp_path / "out").tensors if "head.summary" in name}


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for name in ("config.json", SINGLE):
        (folder / name).unlink()


def _pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no weights")


def _training_leftovers(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "training_args.bin").write_bytes(b"x")


def _variant(folder: Path) -> None:
    _rename(folder, SINGLE, "model.fp16.safetensors")


def _own_name(folder: Path) -> None:
    _rename(folder, SINGLE, "llama.safetensors")


def _named_outside(folder: Path) -> None:
    _edit_config(folder, transformers_weights="../other.safetensors")


def _ranks(folder: Path) -> None:
    _rename(folder, SINGLE, "shard-00001-model-00001-of-00001.safetensors")


def _auto_dtype(folder: Path) -> None:
    _edit_config(folder, dtype="auto")


def _empty_index(folder: Path) -> None:
    (folder / SINGLE).unlink()
    _write_index(folder, {"metadata": {}, "weight_map": {}})


def _index_of_pickles(folder: Path) -> None:
    _rename(folder, SINGLE, "pytorch_model.bin")
    _write_index(folder, {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}})


def _no_head(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / SINGLE, {"format": "pt"})


REFUSED = [
    (_adapter, "holds an adapter .* merge it first: load org/base"),
    (_training_leftovers, "neither model.safetensors nor model.safetensors.index.json"),
    (_variant, "as the variant 'fp16' only"),
    (_own_name, "holds llama.safetensors, and transformers loads model.safetensors"),
    (_named_outside, "which is outside of the model's folder"),
    (_auto_dtype, 'says dtype: "auto"'),
    (_empty_index, "weight_map names no files"),
    (_no_head, "lacks the tensor lm_head.weight"),
]


@pytest.mark.parametrize(
    ("change", "said"), REFUSED, ids=lambda value: getattr(value, "__name__", "").strip("_")
)
def test_what_transformers_refuses_is_refused_by_its_reason(
    change: Callable[[Path], None], said: str, saved: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    folder = saved("single", tmp_path / "model")
    change(folder)
    assert re.search(said, _compare(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_pickle, "holds pytorch_model.bin .*save_pretrained to convert it"),
        (_ranks, "holds a distributed checkpoint"),
        (_index_of_pickles, "which is no safetensors file"),
    ],
)
def test_other_formats_are_refused_by_name(
    change: Callable[[Path], None], said: str, saved: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    folder = saved("single", tmp_path / "model")
    change(folder)
    with pytest.raises(UnsupportedModelError, match=said):
        ModelSession(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_a_tied_embedding_is_taken_as_transformers_does(
    tied: bool, equal: bool, saved: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    folder = saved("tied", tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if equal else embedding * 2
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    _edit_config(folder, tie_word_embeddings=tied)
    assert _compare(folder) == "the same"


def test_verify_tells_of_a_tensor_that_no_shard_holds(
    saved: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    folder = saved("shards", tmp_path / "model")
    index = _index(folder)
    index["weight_map"]["v_head.weight"] = next(iter(index["weight_map"].values()))
    _write_index(folder, index)
    assert _compare(folder) == "the same"
    (problem,) = verify_path(folder).problems
    assert "v_head.weight" in problem
