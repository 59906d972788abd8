"""Taps: which layer has which, where they are, what folds, and what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.checkpoint import ARCHITECTURES, architecture_of
from ghoststream.errors import RequestError, UnsupportedModelError
from ghoststream.streaming import TAPS, LayerTaps, Replay, Skeleton, make_batches, mlp_projection, tap_point
from ghoststream.testing.conformance import random_tokens
from ghoststream.testing.models import TINY_CONFIGS, save_tiny, tiny_config, tiny_model
from tests.helpers.families import families
from tests.helpers.resident_taps import absent_taps

pytestmark = pytest.mark.unit
POST_NORMED = {"exaone4", "gemma2", "gemma3_text", "glm4", "olmo2", "olmo3"}
SCALES = {"falcon_h1": 0.6, "granite": 0.7, "granitemoe": 0.7, "granitemoehybrid": 0.7}
PROJECTIONS = {
    "bamba": "feed_forward.down_proj",
    "bloom": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
    "falcon_h1": "feed_forward.down_proj",
    "gpt2": "mlp.c_proj",
    "gpt_bigcode": "mlp.c_proj",
    "gpt_neo": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "gptj": "mlp.fc_out",
    "jamba": "feed_forward.down_proj",
    "lfm2": "feed_forward.w2",
    "lfm2_moe": "feed_forward.w2",
    "llama4_text": "feed_forward.down_proj",
    "nemotron_h": "mixer.down_proj",
    "opt": "fc2",
    "phi": "mlp.fc2",
    "starcoder2": "mlp.c_proj",
}


def _layers(model: Any) -> Any:
    return model.get_submodule(architecture_of(model.config).layers_path)


@pytest.mark.parametrize("model_type", families())
def test_every_layer_has_each_tap_or_refuses_it_by_name(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    family = architecture_of(model.config)
    for number, layer in enumerate(_layers(model)):
        for name in TAPS:
            if name in absent_taps(model_type, number):
                with pytest.raises(UnsupportedModelError, match=f"has no tap '{name}': |layers with experts"):
                    tap_point(family, layer, name)
            else:
                layer.get_submodule(tap_point(family, layer, name).path)
        projection = mlp_projection(family, layer)
        absent = "mlp_intermediate" in absent_taps(model_type, number)
        assert projection.path == ("" if absent else PROJECTIONS.get(model_type, "mlp.down_proj"))
        assert projection.absorbs == (not absent and model_type not in POST_NORMED)
        assert projection.absorbs == (projection.reason == "")
        assert projection.transposed == (model_type != "gpt2")
        assert projection.scale == SCALES.get(model_type, 1.0)


def test_every_supported_family_is_among_the_tiny_models() -> None:
    assert set(TINY_CONFIGS) == set(ARCHITECTURES)


def test_why_nothing_folds_is_said() -> None:
    def reason(model_type: str, **overrides: Any) -> str:
        model = tiny_model(model_type, **overrides)
        return mlp_projection(architecture_of(model.config), _layers(model)[0]).reason

    assert re.search("GptOssDecoderLayer with experts has no single last linear map", reason("gpt_oss"))
    assert re.search("the norm post_feedforward_layernorm is between mlp.down_proj", reason("gemma2"))
    assert re.search("residual_multiplier 0 adds nothing", reason("granite", residual_multiplier=0.0))


def test_unknown_tap_is_refused_with_the_names_that_there_are(tiny_llama: Path) -> None:
    with pytest.raises(RequestError, match=r"no tap 'mlp_out'; choose from attention_input, .*, output"):
        LayerTaps(Skeleton(tiny_llama), 0, ["mlp_out"])


@pytest.mark.parametrize("layer", [-1, 6])
def test_layers_that_are_not_there_are_refused(layer: int, tiny_llama: Path) -> None:
    with pytest.raises(
        RequestError, match=f"layer {layer} cannot be run again; the model has the layers 0 to 5"
    ):
        Replay(Skeleton(tiny_llama), layer)


def test_a_tap_at_a_module_that_is_not_called_is_refused(tmp_path: Path) -> None:
    """BLOOM multiplies with slices of its weight when it repeats how it was trained."""
    folder = save_tiny("bloom", tmp_path / "model", pretraining_tp=2, slow_but_exact=True)
    skeleton = Skeleton(folder)
    (batch,) = make_batches(*random_tokens(skeleton, 2, 8, padding="none"), 2)
    with (
        Replay(skeleton, 1) as work,
        pytest.raises(
            UnsupportedModelError, match=r"layer 1 \(BloomBlock\) ran without calling 'mlp.dense_4h_to_h'"
        ),
    ):
        work.taps(batch, torch.ones(2, 8, 32), ["mlp_output"])


def test_states_of_another_shape_or_dtype_are_refused(tiny_llama: Path) -> None:
    skeleton = Skeleton(tiny_llama)
    (batch,) = make_batches(*random_tokens(skeleton, 2, 8, padding="none"), 2)
    with Replay(skeleton, 0) as work:
        for states in (torch.ones(2, 7, 32), torch.ones(2, 8, 32, dtype=torch.bfloat16)):
            with pytest.raises(
                RequestError, match=r"were given for sequences \[0,2\), which need \(2, 8, 32\)"
            ):
                work.taps(batch, states, ["output"])


def test_nothing_is_left_in_the_model(tiny_checkpoint: Callable[[str], Path]) -> None:
    skeleton = Skeleton(tiny_checkpoint("llama"))
    (batch,) = make_batches(*random_tokens(skeleton, 2, 8, padding="right"), 2)
    with Replay(skeleton, 2) as work:
        taken = work.taps(batch, torch.ones(2, 8, 32), list(TAPS))
        taken["output"] += 1  # what is given belongs to who asked for it
        again = work.taps(batch, torch.ones(2, 8, 32), ["output"])
    assert torch.equal(taken["output"], again["output"] + 1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in skeleton.model.modules())
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_the_documentation_lists_every_tap() -> None:
    text = (Path(__file__).parents[2] / "docs" / "taps.md").read_text(encoding="utf-8")
    table = text.split("| tap |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE) == list(TAPS)
