"""Recovered checkpoints of every family: loaded by a plain transformers in a process that cannot import
ghoststream, and equal to the resident original with hooks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ghoststream.files import read_json
from ghoststream.recovery import register
from ghoststream.testing.conformance import check_streamed_equals_resident
from ghoststream.testing.models import TINY_CONFIGS
from tests.helpers.families import families
from tests.helpers.recovered_models import IDS, N_LAYERS, NEW_TOKENS, PLAN, make_operators, reference_model

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("model_type", families())
def test_loads_strictly(model_type: str, exported: dict[str, Path], examined: dict[str, Any]) -> None:
    facts = examined[str(exported[model_type])]
    for info in ("info", "again_info", "base_info"):
        # The base model alone has no head; transformers ignores or reports only that.
        ignored = ("lm_head", "embed_out") if info == "base_info" else ()
        found = [key for keys in facts[info].values() for key in keys if not key.startswith(ignored or "\0")]
        assert found == [], info
    assert facts["n_layers"] == len(PLAN.kept)
    assert facts["class"].startswith("Ghosted")
    assert facts["base_class"].startswith("Ghosted")
    assert facts["base_agrees"]


@pytest.mark.parametrize("model_type", families())
def test_saving_and_training_a_loaded_model(
    model_type: str, exported: dict[str, Path], examined: dict[str, Any]
) -> None:
    facts = examined[str(exported[model_type])]
    assert facts["round_trip"]
    assert "modeling_ghosted.py" in facts["again_files"]
    assert facts["again_auto_map"] == read_json(exported[model_type] / "config.json")["auto_map"]
    assert facts["fresh_is_identity"]
    assert facts["trains"]


@pytest.mark.parametrize("model_type", families())
def test_experts_are_computed_as_in_the_base(
    model_type: str,
    tiny_checkpoint: Callable[[str], Path],
    exported: dict[str, Path],
    examined: dict[str, Any],
) -> None:
    """Whatever else was loaded in the process; two ways round differently."""
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(model_type), dtype=torch.float32)
    wanted = getattr(base.config, "_experts_implementation", None)
    assert examined[str(exported[model_type])]["experts"] == wanted


def test_plain_transformers_refuses(examined: dict[str, Any]) -> None:
    assert "trust_remote_code=True" in examined["refusal"]


def test_with_the_type_of_the_base_the_operators_would_be_dropped(
    exported: dict[str, Path], examined: dict[str, Any], tmp_path: Path
) -> None:
    """Why recovered models have a type of their own."""
    assert examined
    folder = tmp_path / "disguised"
    shutil.copytree(exported["llama"], folder)
    config = read_json(folder / "config.json")
    config["model_type"] = "llama"
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert (
        {name for name in info["unexpected_keys"] if ".ghost." in name}
        == set(info["unexpected_keys"])
        != set()
    )
    with torch.no_grad():
        logits = model(IDS).logits
    right = load_file(f"{exported['llama']}.out.safetensors")["logits"]
    assert (logits - right).abs().max() > 0.1


def test_after_registration_no_trust_is_needed(exported: dict[str, Path], examined: dict[str, Any]) -> None:
    assert examined
    register()
    register()
    for model_type, folder in exported.items():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(model).__module__ == "ghoststream.recovery.modeling_ghosted"
        assert AutoConfig.from_pretrained(folder).model_type == f"ghosted_{model_type}"
        with torch.no_grad():
            logits = model.eval()(IDS).logits
        assert torch.equal(logits, load_file(f"{folder}.out.safetensors")["logits"])


@pytest.mark.parametrize("model_type", families())
def test_computes_what_the_original_with_hooks_computes(
    model_type: str,
    exported: dict[str, Path],
    examined: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    reference = reference_model(tiny_checkpoint(model_type), make_operators())
    facts = examined[str(exported[model_type])]
    seen = load_file(f"{exported[model_type]}.out.safetensors")
    with torch.no_grad():
        expected = reference(IDS, use_cache=False, output_hidden_states=True, labels=IDS)
        generated = reference.generate(
            IDS, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False
        )
    torch.testing.assert_close(seen["logits"], expected.logits, rtol=1e-5, atol=1e-5)
    assert facts["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert facts["generated"] == generated.tolist()
    assert facts["cache_agrees"]


@pytest.mark.parametrize("model_type", families(set(TINY_CONFIGS) - {"mamba2"}))
def test_hidden_states_at_a_boundary_are_those_before_the_operator(
    model_type: str,
    exported: dict[str, Path],
    examined: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    facts = examined[str(exported[model_type])]
    assert facts["before"] == [True, True]
    seen = load_file(f"{exported[model_type]}.out.safetensors")
    reference = reference_model(tiny_checkpoint(model_type), make_operators())
    with torch.no_grad():
        states = reference(IDS, use_cache=False, output_hidden_states=True).hidden_states
    # Entry 0: the embeddings (Mamba 2 leaves them out); then what each surviving layer returned; the last one
    # after the final norm.
    originals = [0, *(layer + 1 for layer in PLAN.kept[:-1]), N_LAYERS]
    for number, original in enumerate(originals):
        torch.testing.assert_close(seen[f"hidden.{number}"], states[original], rtol=1e-5, atol=1e-5)
    assert f"hidden.{len(originals)}" not in seen


@pytest.mark.parametrize("model_type", families())
def test_recovered_models_are_streamed_too(model_type: str, exported: dict[str, Path]) -> None:
    register()
    report = check_streamed_equals_resident(exported[model_type], paddings=("right",))
    assert report.n_tensors == 3 * (len(PLAN.kept) + 2)
