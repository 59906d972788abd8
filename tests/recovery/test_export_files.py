"""The files of a recovered checkpoint: tensors, provenance, checksums and what is copied from the base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ghoststream.checkpoint import CheckpointIndex, checkpoint_fingerprint
from ghoststream.checkpoint.index import SINGLE_NAME
from ghoststream.errors import ArtifactError
from ghoststream.files import read_json, sealed, verify_sums
from ghoststream.recovery import load_recovered
from ghoststream.stages.export import export
from ghoststream.testing.models import save_tiny
from tests.helpers.recovered_models import PLAN, make_operators

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_the_bases_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", dtype=dtype)
    operators = make_operators()
    report = export(base, operators, tmp_path / "out")
    index = CheckpointIndex.open(tmp_path / "out")
    original = {name: value for path in base.glob("*.safetensors") for name, value in load_file(path).items()}
    written = load_file(tmp_path / "out" / SINGLE_NAME)
    info = load_recovered(tmp_path / "out")
    assert info is not None
    copied = {name: str(entry["base"]) for name, entry in info.tensors.items() if entry["base"] is not None}
    assert all(torch.equal(written[name], original[source]) for name, source in copied.items())
    assert copied["model.layers.1.mlp.up_proj.weight"] == "model.layers.3.mlp.up_proj.weight"
    weight = operators.boundaries[0].weight
    assert weight is not None
    assert torch.equal(written["model.layers.0.ghost.linear.weight"], torch.from_numpy(weight).to(dtype))
    assert {entry.dtype for entry in index.tensors.values()} == {dtype}
    assert report.bytes_after == index.n_bytes
    assert (report.layers_before, report.layers_after, report.shards) == (6, 2, 1)
    assert report.to_json()["model_type"] == "ghosted_llama"


def test_operator_dtype_can_be_chosen(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    export(base, make_operators(), tmp_path / "out", operator_dtype=torch.float32)
    written = load_file(tmp_path / "out" / SINGLE_NAME)
    assert written["model.norm.ghost.linear.weight"].dtype == torch.float32
    assert written["model.norm.weight"].dtype == torch.bfloat16


def test_provenance_gives_the_operators_back(
    exported_family: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    info = load_recovered(exported_family("gpt2"))
    assert info is not None
    assert info.plan == PLAN
    fingerprint = checkpoint_fingerprint(tiny_checkpoint("gpt2"))
    assert {key: info.base[key] for key in fingerprint} == fingerprint
    assert info.base_model_type == "gpt2"
    assert info.operators.kind == "random"
    for found, made in zip(info.operators.boundaries, make_operators().boundaries, strict=True):
        assert (found.span, found.form, found.diagnostics) == (made.span, made.form, made.diagnostics)
        assert found.weight is not None
        assert made.weight is not None
        assert (found.weight == made.weight).all()
        assert (found.bias is None) == (made.bias is None)
    assert load_recovered(tiny_checkpoint("gpt2")) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"artifact": "recovered checkpoint", "version": 2}'])
def test_damaged_provenance(text: str, tmp_path: Path) -> None:
    (tmp_path / "ghoststream.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"ghoststream\.json"):
        load_recovered(tmp_path)


def test_provenance_that_lacks_a_part(exported_family: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported_family("llama"), folder)
    data = read_json(folder / "ghoststream.json")
    del data["operators"]["kind"]
    (folder / "ghoststream.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"ghoststream\.json fails its digest"):
        load_recovered(folder)
    (folder / "ghoststream.json").write_text(json.dumps(sealed(data)))
    with pytest.raises(ArtifactError, match="is damaged"):
        load_recovered(folder)


def test_checksums_and_small_files(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "tokenizer.model"):
        (base / name).write_text(name)
    for name in ("pytorch_model.bin", ".gitattributes", "model.gguf", "consolidated.00.pth"):
        (base / name).write_text("not to be copied")
    (base / "README.md").write_text("the base's card")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (base / ".git").mkdir()
    export(base, make_operators(metadata={"recipe": {"ridge": 1e-6}}), tmp_path / "out")
    out = tmp_path / "out"
    assert verify_sums(out) == []
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "LICENSE",
        "README.base.md",
        "README.md",
        "SHA256SUMS",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "ghoststream.json",
        "mergekit.yaml",
        "model.safetensors",
        "modeling_ghosted.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert (out / "README.base.md").read_text() == "the base's card"
    card = (out / "README.md").read_text()
    for words in (
        "[0,1) [2,3) [4,6)",
        "ghosted_llama",
        "README.base.md",
        '"ridge": 1e-06',
        "| final norm | linear | 0.75 |",
    ):
        assert words in card


def test_equal_requests_give_equal_files_wherever_they_are(tmp_path: Path) -> None:
    first = save_tiny("qwen2", tmp_path / "one")
    shutil.copytree(first, tmp_path / "elsewhere")
    export(first, make_operators(), tmp_path / "a")
    export(tmp_path / "elsewhere", make_operators(), tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
