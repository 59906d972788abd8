"""The identity of a checkpoint: the same for a copy, another for other weights of the same shapes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghoststream.checkpoint import checkpoint_fingerprint
from ghoststream.errors import CheckpointError
from ghoststream.testing.models import save_tiny

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("fingerprint") / "model")


def _copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_copy_has_the_same_fingerprint(model: Path, tmp_path: Path) -> None:
    assert checkpoint_fingerprint(_copy(model, tmp_path)) == checkpoint_fingerprint(model)


def test_weights_of_another_training_have_another(model: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=1)
    mine, theirs = checkpoint_fingerprint(model), checkpoint_fingerprint(other)
    assert mine["digest"] != theirs["digest"]
    for shard, identity in mine["shards"].items():
        found = theirs["shards"][shard]
        assert (found["header"], found["bytes"]) == (identity["header"], identity["bytes"])
        assert found["sample"] != identity["sample"]


def test_one_tensor_that_was_trained_on_is_enough(model: Path, tmp_path: Path) -> None:
    copy = _copy(model, tmp_path)
    shard = min(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    name = min(tensors)
    tensors[name] = tensors[name] + torch.full_like(tensors[name], 1e-3)
    save_file(tensors, shard, metadata={"format": "pt"})
    assert checkpoint_fingerprint(copy)["digest"] != checkpoint_fingerprint(model)["digest"]


def test_a_changed_configuration_has_another(model: Path, tmp_path: Path) -> None:
    copy = _copy(model, tmp_path)
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert checkpoint_fingerprint(copy)["config"] != checkpoint_fingerprint(model)["config"]


def test_a_folder_without_a_configuration_is_refused(model: Path, tmp_path: Path) -> None:
    copy = _copy(model, tmp_path)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        checkpoint_fingerprint(copy)
