"""Models that cannot be used: one clear line from every command that reads one, and nothing lost."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.command_bench import BAD_REQUEST, BROKEN_DATA, LENGTH, Bench, copy_of, run, succeed

pytestmark = pytest.mark.integration
FIRST_LAYER = "model.layers.0.self_attn.q_proj.weight"


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


def unknown_architecture(model: Path) -> None:
    edit_json(model / "config.json", model_type="ctrl", architectures=["CTRLLMHeadModel"])


def unheard_of_architecture(model: Path) -> None:
    edit_json(model / "config.json", model_type="nonesuch")


def composite(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    whole = {
        "model_type": "llava",
        "text_config": config,
        "vision_config": {"model_type": "clip_vision_model"},
    }
    (model / "config.json").write_text(json.dumps(whole))


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


def edit_header(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the entry of the first layer's tensor."""
    path = shard_of(model, FIRST_LAYER)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header[FIRST_LAYER])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def negative_offset(model: Path) -> None:
    edit_header(model, lambda entry: entry.update(data_offsets=[-4096, 0]))


def shifted_offset(model: Path) -> None:
    def shift(entry: dict[str, Any]) -> None:
        entry["data_offsets"] = [place + 64 for place in entry["data_offsets"]]

    edit_header(model, shift)


def integers_as_weights(model: Path) -> None:
    edit_header(model, lambda entry: entry.update(dtype="I32"))


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
    edit_shard(
        model,
        FIRST_LAYER,
        lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.zeros(3)}),
    )
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.mlp.extra.weight"] = index["weight_map"][FIRST_LAYER]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def not_finite(model: Path) -> None:
    edit_shard(
        model, FIRST_LAYER, lambda tensors: tensors.update({FIRST_LAYER: torch.full((32, 32), torch.nan)})
    )


#: What only a model that is built shows. An estimate reads headers and configuration; the latter is enough.
UNSEEN_BY_ESTIMATE = (wrong_shape, missing_tensor, unexpected_tensor, no_weights)
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
    (negative_offset, BROKEN_DATA, ("not a complete safetensors file", "`-4096`")),
    (shifted_offset, BROKEN_DATA, ("not a complete safetensors file", "invalid offset")),
    (integers_as_weights, BROKEN_DATA, (FIRST_LAYER, "dtype I32")),
    (wrong_shape, BROKEN_DATA, (FIRST_LAYER, "(32, 16)", "(32, 32)")),
    (missing_tensor, BROKEN_DATA, ("lacks the tensor", FIRST_LAYER)),
    (tensor_not_where_the_index_says, BROKEN_DATA, (FIRST_LAYER, "does not hold it")),
    (unexpected_tensor, BROKEN_DATA, ("unexpected tensor", "model.layers.0.mlp.extra.weight")),
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
    estimate = ("estimate", model, "--remove", 2, "--no-measure")
    if damage in UNSEEN_BY_ESTIMATE:
        succeed(*estimate)
    elif damage is unheard_of_architecture:
        refused(*estimate, code=code, says=says)  # transformers, which is not asked, says it in its own words
    else:
        assert refused(*estimate, code=code, says=says) == line
    refused("evaluate", model, "--text", bench.text, "--length", LENGTH, code=code, says=says)
    out = ("--operators", bench.operators, "--out", tmp_path / "out")
    refused("export", model, *out, code=code, says=says)
    refused("recover", model, "--remove", 2, *bench.capture, "--out", tmp_path / "out", code=code, says=says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_verify_says_that_weights_and_configuration_do_not_fit(bench: Bench, tmp_path: Path) -> None:
    model = copy_of(bench, tmp_path)
    edit_json(model / "config.json", num_hidden_layers=9)
    result = run("verify", model)
    assert (result.exit_code, "its config.json says 9" in result.stdout) == (BROKEN_DATA, True)
    # Of models that are not streamed anyway, headers alone are checked.
    unknown_architecture(model)
    succeed("verify", model)
    edit_json(model / "config.json", **json.loads((bench.model / "config.json").read_text()))
    succeed("verify", model)
    integers_as_weights(model)
    result = run("verify", model)
    assert result.exit_code == BROKEN_DATA
    assert f"tensor {FIRST_LAYER} in" in result.stdout
    assert "has dtype I32, and a weight is a floating-point number" in result.stdout
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    succeed("verify", model)


def test_weights_that_are_not_finite(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    model = copy_of(bench, tmp_path)
    not_finite(model)
    says = (f"tensor {FIRST_LAYER} in", "holds NaN")
    refused("capture", model, *bench.capture, "--store", tmp_path / "store", code=BROKEN_DATA, says=says)
    refused("evaluate", model, "--text", bench.text, "--length", LENGTH, code=BROKEN_DATA, says=says)


def test_a_model_that_is_not_there(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    refused(
        "capture", tmp_path / "nowhere", *bench.capture, *store, code=BAD_REQUEST, says="no model folder at"
    )
    refused("capture", "org/nowhere", *bench.capture, *store, code=BAD_REQUEST, says="'org/nowhere'")
    refused("capture", bench.text, *bench.capture, *store, code=BAD_REQUEST, says="no model folder at")
