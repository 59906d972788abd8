"""The form gguf beside what llama.cpp computes: refusals, files, types, memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from ghoststream.checkpoint.index import SINGLE_NAME
from ghoststream.checkpoint.writer import stored_tensor
from ghoststream.errors import (
    ArtifactError,
    NumericsError,
    OutputExistsError,
    RequestError,
    UnsupportedModelError,
)
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Method, Recovery, Text
from ghoststream.recovery.gguf.file import write_file
from ghoststream.recovery.gguf.layout import GgufTensor
from ghoststream.spans import PruningPlan
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.export import export
from ghoststream.stages.recover import run as recover
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer
from tests.helpers.command_bench import last_line, run
from tests.helpers.normed_operators import HIDDEN, normed_operators
from tests.helpers.peak import Peak
from tests.helpers.quantised import save_fp8
from tests.helpers.random_ids import random_ids
from tests.helpers.small_tokenizers import small_tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
pytestmark = pytest.mark.integration
PLAN = PruningPlan.parse(6, "2:3")


def _on(features: str, form: Any = "linear") -> OperatorSet:
    widths = {"hidden": HIDDEN, "hidden+normed": 2 * HIDDEN, "hidden+mlp": HIDDEN + 64}
    weight = np.zeros((HIDDEN,) if form == "diagonal" else (HIDDEN, widths[features]), np.float32)
    epsilon = 1e-6 if "normed" in features else None
    boundary = BoundaryOperator(PLAN.spans[0], form, features, weight, norm_epsilon=epsilon)
    return OperatorSet(PLAN, "x", (boundary,), HIDDEN)


@pytest.mark.parametrize(
    ("operators", "says"),
    [
        (
            _on("hidden"),
            r"operator of \[2,3\) \(linear on hidden\) multiplies the hidden state itself",
        ),
        (_on("hidden", "diagonal"), r"\(diagonal on hidden\) multiplies the hidden state itself"),
        (_on("hidden+normed"), r"\(linear on hidden\+normed\) multiplies the hidden state itself"),
        (_on("hidden+mlp"), r"\(linear on hidden\) multiplies the hidden state itself.*--features normed or"),
        (
            normed_operators(PLAN, epsilon=1e-5),
            r"norms with epsilon 1e-05, .* here 1e-06; write the form",
        ),
    ],
    ids=["hidden", "diagonal", "hidden+normed", "hidden+mlp", "epsilon"],
)
def test_operators_without_a_place_are_refused_by_name(
    operators: OperatorSet, says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        export(tiny_llama, operators, tmp_path / "out", form="gguf")
    assert not list(tmp_path.iterdir())


def test_models_that_are_not_written_are_refused_by_name(tmp_path: Path) -> None:
    cases: dict[str, tuple[Path, str]] = {
        "gpt2": (save_tiny("gpt2", tmp_path / "gpt2"), "models of type gpt2 are not written as GGUF here"),
        "gelu": (
            save_tiny("llama", tmp_path / "gelu", hidden_act="gelu"),
            "hidden_act of this llama \\(gelu\\)",
        ),
        "biased": (
            save_tiny("qwen3", tmp_path / "biased", attention_bias=True),
            "attention_bias of this qwen3 \\(True\\)",
        ),
        "rope": (
            save_tiny(
                "llama",
                tmp_path / "rope",
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            ),
            "rope_parameters of this llama .*convert that by convert_hf_to_gguf.py",
        ),
        "llama 3's rope": (
            save_tiny(
                "qwen3",
                tmp_path / "llama3",
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 8,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
            ),
            "rope_parameters of this qwen3",
        ),
        "quantised": (save_fp8(tmp_path / "fp8", "qwen3"), "quantization_config of this qwen3"),
    }
    for base, says in cases.values():
        with pytest.raises(UnsupportedModelError, match=says):
            export(base, None, tmp_path / "out", form="gguf")
    operators = normed_operators(PLAN)
    with pytest.raises(
        UnsupportedModelError, match=r"no place in llama.cpp's architecture qwen3; recover with"
    ):
        export(save_tiny("qwen3", tmp_path / "qwen3"), operators, tmp_path / "out", form="gguf")


def test_tokenizers_with_another_rule_are_refused(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", vocab_size=600)
    tiny_tokenizer().save_pretrained(base)
    with pytest.raises(
        UnsupportedModelError, match=r"not one that is written .*: it is of type WordLevel; write"
    ):
        export(base, None, tmp_path / "out", form="gguf")
    PreTrainedTokenizerFast(tokenizer_object=small_tokenizer("gpt-2")).save_pretrained(base)
    file = base / "tokenizer.json"
    data = json.loads(file.read_text())
    data["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(data))
    with pytest.raises(UnsupportedModelError, match="it divides text by \\['Lowercase'"):
        export(base, None, tmp_path / "out", form="gguf")
    file.rename(base / "tokenizer.model")
    with pytest.raises(UnsupportedModelError, match=r"it has tokenizer.model and no tokenizer.json"):
        export(base, None, tmp_path / "out", form="gguf")


def test_recover_refuses_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    text = Text(spec=random_ids(tmp_path, 8, 16), sequences=8, length=16)
    normed = Method(operator="least-squares", features="normed")
    qwen3 = save_tiny("qwen3", tmp_path / "qwen3")
    for model, method, says in (
        (
            tiny_llama,
            Method(operator="ghost"),
            "operator ghost on the features hidden has no place in llama.cpp",
        ),
        (qwen3, normed, "an operator on normed has no place in llama.cpp's architecture qwen3"),
    ):
        wanted = Recovery(model=str(model), remove="2:3", calibration=text, method=method, form="gguf")
        with pytest.raises(RequestError, match=says):
            recover(wanted, tmp_path / "out")
        with pytest.raises(RequestError, match=says):
            estimate(wanted)
    wanted = Recovery(
        model=str(tiny_llama), remove="2:3", calibration=text, method=normed, form="gguf", gguf_type="q8_0"
    )
    assert recover(wanted, tmp_path / "out").export.model_type == "deci"
    assert gguf.GGUFReader(tmp_path / "out" / "model.gguf").get_field("general.file_type").contents() == 7


@pytest.mark.parametrize(("model_type", "features"), [("llama", {"normed", "mlp"}), ("qwen3", {"mlp"})])
def test_recover_with_its_defaults_tries_what_has_a_place(
    model_type: str, features: set[str], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = Text(spec=random_ids(tmp_path, 8, 16), sequences=8, length=16)
    wanted = Recovery(model=str(tiny_checkpoint(model_type)), remove=2, calibration=text, form="gguf")
    assert [stage.name for stage in estimate(wanted).stages] == ["search", "fit", "export"]
    found = recover(wanted, tmp_path / "out")
    assert {one.features for one in found.operators.boundaries} <= features
    plan = json.loads(next((tmp_path / "out.work").glob("plan-*.json")).read_text())
    assert {one["features"] for one in plan["recipe"]["methods"]} == features
    tried = {label.split(", ")[1] for row in plan["candidates"] for label in row["repair"]}
    assert tried == features
    assert verify_path(tmp_path / "out").sound


def test_a_folder_is_explained_checked_and_taken_again(tiny_llama: Path, tmp_path: Path) -> None:
    normed_operators(PLAN).save(tmp_path / "operators")
    words = ("export", tiny_llama, "--operators", tmp_path / "operators", "--out", tmp_path / "out")
    done = run(*words, "--form", "gguf")
    assert done.exit_code == 0, done.stderr
    assert f"next: llama-cli -m {tmp_path / 'out' / 'model.gguf'}" in done.stdout.replace("\n", "")
    file = tmp_path / "out" / "model.gguf"
    written = file.read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.gguf",
        "ghoststream.json",
        "SHA256SUMS",
    }
    assert run(*words, "--form", "gguf").exit_code == 0
    export(tiny_llama, normed_operators(PLAN), tmp_path / "again", form="gguf")
    assert (tmp_path / "again" / "model.gguf").read_bytes() == written
    other = run(*words, "--form", "gguf", "--gguf-type", "q8_0")
    assert "another request (not the same form)" in last_line(other.stderr)
    assert "--gguf-type is for the form gguf, and the form is custom" in last_line(
        run(*words, "--gguf-type", "f16").stderr
    )
    found = inspect_path(tmp_path / "out")
    assert found.kind == "recovered GGUF"
    assert found.facts["removed"] == "[2,3) (1 of 6 layers)"
    assert verify_path(tmp_path / "out").sound
    assert verify_path(tmp_path / "out", model=tiny_llama).sound
    file.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    assert "model.gguf" in verify_path(tmp_path / "out").problems[0]
    with pytest.raises(ArtifactError, match=r"damaged .*model\.gguf"):
        export(tiny_llama, normed_operators(PLAN), tmp_path / "out", form="gguf")
    with pytest.raises(OutputExistsError):
        export(tiny_llama, normed_operators(PLAN), tmp_path / "again", form="custom")


def test_numbers_keys_and_types(tmp_path: Path) -> None:
    """The numbers are read back by the package gguf; a sliding window bounds the context."""
    base = save_tiny("mistral", tmp_path / "base", dtype=torch.bfloat16, max_shard_size="1GB")
    tensors = load_file(base / SINGLE_NAME)
    for kind, rounding in (("auto", 0.0), ("f16", 2e-4), ("q8_0", 5e-3)):
        export(base, None, tmp_path / kind, form="gguf", gguf_type=kind)  # type: ignore[arg-type]
        reader = gguf.GGUFReader(tmp_path / kind / "model.gguf")
        assert reader.get_field("llama.context_length").contents() == 8
        found = {tensor.name: tensor for tensor in reader.tensors}
        down = found["blk.3.ffn_down.weight"]
        assert down.tensor_type.name == ("BF16" if kind == "auto" else kind.upper())
        assert found["output_norm.weight"].tensor_type.name == "F32"
        expected = tensors["model.layers.3.mlp.down_proj.weight"].float().numpy()
        values = gguf.dequantize(down.data, down.tensor_type)
        np.testing.assert_allclose(values, expected, rtol=rounding, atol=rounding)
    narrow = save_tiny("llama", tmp_path / "narrow", intermediate_size=48)
    export(narrow, None, tmp_path / "q", form="gguf", gguf_type="q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q" / "model.gguf").tensors}
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def _tensors(n_tensors: int, value: float) -> list[GgufTensor]:
    weight = torch.full((512, 1024), value)
    return [
        GgufTensor(name, (512, 1024), stored_tensor(name, weight, torch.float32), torch.clone)
        for name in (f"blk.{number}.ffn_up.weight" for number in range(n_tensors))
    ]


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    peaks = []
    for n_tensors in (2, 12):
        writer = gguf.GGUFWriter(None, "llama")
        with Peak() as peak:
            written = write_file(tmp_path / "file", writer, _tensors(n_tensors, 1.0), "F16", None)
        peaks.append(peak.bytes)
        assert written.n_bytes == n_tensors * 2**20
    assert peaks[1] < 1.1 * peaks[0]


def test_numbers_beyond_a_type_are_refused(tmp_path: Path) -> None:
    for kind, value in (("F16", 1e5), ("Q8_0", 1e7)):
        writer = gguf.GGUFWriter(None, "llama")
        with pytest.raises(NumericsError, match=f"beyond the range of {kind}; give --gguf-type bf16 or f32"):
            write_file(tmp_path / "file", writer, _tensors(1, value), kind, None)
        assert not list(tmp_path.iterdir())


def test_without_the_package_the_form_says_so(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="needs the package gguf; install it with: pip install gguf"):
        export(tiny_llama, normed_operators(PLAN), tmp_path / "out", form="gguf")
