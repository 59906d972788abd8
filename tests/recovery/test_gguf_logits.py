"""GGUF files through llama.cpp, against the resident recovered model and the tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ghoststream.options import GgufType
from ghoststream.recovery import register
from ghoststream.spans import PruningPlan
from ghoststream.stages.export import export
from ghoststream.testing.models import save_tiny
from tests.helpers.llama_cpp import llama_cpp_logits, llama_cpp_tokens, needs_llama_cpp
from tests.helpers.normed_operators import normed_operators
from tests.helpers.resident_absorbing import absorbing_operators
from tests.helpers.small_tokenizers import SMALL_TOKENIZERS, TEXT, small_tokenizer

pytestmark = [pytest.mark.integration, needs_llama_cpp]
# Longer than the original context of the scaled rotary embeddings, no longer than the sliding windows.
IDS = torch.arange(3, 19).reshape(2, 8)
# Of logits up to 3: rounding of weights, and of what they are multiplied by, through four layers.
TOLERANCES: dict[GgufType, float] = {"f32": 2e-5, "f16": 2e-2, "bf16": 0.15, "q8_0": 0.4}
_ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 4}
_LLAMA3 = {**_ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Case:
    model_type: str
    architecture: str
    types: tuple[GgufType, ...] = ("f32",)
    changes: Any = None


CASES = {
    "llama": Case("llama", "deci", ("f32", "f16", "bf16", "q8_0")),
    "llama with biases, tied": Case("llama", "deci", changes=_BIASED),
    "llama 3, wide heads": Case("llama", "deci", changes={"rope_parameters": _LLAMA3, "head_dim": 16}),
    "mistral": Case("mistral", "deci"),
    "qwen2": Case("qwen2", "deci", ("f32", "q8_0")),
    "llama folded": Case("llama", "llama", ("f32", "q8_0")),
    "llama 3 folded": Case("llama", "llama", changes={"rope_parameters": _LLAMA3}),
    "linear": Case("llama", "llama", changes={"rope_parameters": {**_ROPE, "rope_type": "linear"}}),
    "yarn": Case("llama", "llama", changes={"rope_parameters": {**_ROPE, "rope_type": "yarn"}}),
    "qwen2 folded": Case("qwen2", "qwen2"),
    "qwen3 folded": Case("qwen3", "qwen3", ("f32", "q8_0")),
}
Logits = dict[str, tuple[Any, dict[GgufType, Any]]]


def _base(case: Case, tiny: Callable[[str], Path], folder: Path) -> Path:
    if case.changes is None:
        return tiny(case.model_type)
    config = AutoConfig.from_pretrained(tiny(case.model_type))
    for key, value in case.changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def logits(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Logits:
    """Logits of every case, of transformers and of llama.cpp, which is started once for all."""
    register()
    files: dict[tuple[str, GgufType], Path] = {}
    expected = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        base = _base(case, tiny_checkpoint, folder / "base")
        # In front of the first layer, of two layers in a row, and of the final norm.
        normed = normed_operators(PruningPlan.parse(6, "0:1 2:3 4:6"))
        operators = (
            normed
            if case.architecture == "deci"
            else absorbing_operators("mlp", PruningPlan.parse(6, "2:3 4:6"))
        )
        export(base, operators, folder / "custom")
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(folder / "custom", dtype=torch.float32)
            expected[name] = model(IDS).logits.numpy()
        for kind in case.types:
            report = export(base, operators, folder / kind, form="gguf", gguf_type=kind)
            assert report.model_type == case.architecture
            files[name, kind] = folder / kind / "model.gguf"
    found = dict(zip(files, llama_cpp_logits(list(files.values()), IDS.numpy()), strict=True))
    return {
        name: (expected[name], {kind: found[name, kind] for kind in case.types})
        for name, case in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_transformers_does(name: str, logits: Logits) -> None:
    expected, by_type = logits[name]
    for kind, found in by_type.items():
        assert found.shape == expected.shape
        difference = float(np.abs(found - expected).max())
        assert difference < TOLERANCES[kind], f"{kind}: {difference}"


def test_operators_of_two_removals_stand_in_their_order(tiny_llama: Path, tmp_path: Path) -> None:
    """The second removal puts its operator in front of that of the first."""
    register()
    export(tiny_llama, normed_operators(PruningPlan.parse(6, "2:3")), tmp_path / "one")
    again = normed_operators(PruningPlan.parse(5, "1:2"))
    export(tmp_path / "one", again, tmp_path / "two")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "two")(IDS).logits.numpy()
    export(tmp_path / "one", again, tmp_path / "made", form="gguf")
    export(tmp_path / "two", None, tmp_path / "written", form="gguf")
    files = [tmp_path / name / "model.gguf" for name in ("made", "written")]
    for found in llama_cpp_logits(files, IDS.numpy()):
        np.testing.assert_allclose(found, expected, atol=TOLERANCES["f32"])


def test_llama_cpp_reads_text_as_the_tokenizers_do(tmp_path: Path) -> None:
    expected, files = [], []
    for name in SMALL_TOKENIZERS:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=small_tokenizer(name), bos_token="<s>", eos_token="<|end|>"
        )
        # The embedding has rows without a token.
        base = save_tiny("llama", tmp_path / name / "base", vocab_size=len(tokenizer) + 3)
        tokenizer.save_pretrained(base)
        export(base, None, tmp_path / name / "out", form="gguf")
        expected.append(tokenizer(TEXT).input_ids)
        files.append(tmp_path / name / "out" / "model.gguf")
    for name, wanted, found in zip(SMALL_TOKENIZERS, expected, llama_cpp_tokens(files, TEXT), strict=True):
        assert found == wanted, name
        assert len(found) > 60
