"""Variants of the architectures, and the forms in which their checkpoints come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghoststream.checkpoint import CheckpointIndex
from ghoststream.checkpoint.index import SINGLE_NAME
from ghoststream.errors import CheckpointError, UnsupportedModelError
from ghoststream.spans import PruningPlan
from ghoststream.streaming import Lane, PassOptions, Skeleton, StatesFactory, StreamedPass, make_batches
from ghoststream.testing.conformance import check_streamed_equals_resident, random_tokens
from ghoststream.testing.models import save_tiny, tiny_model

pytestmark = pytest.mark.integration
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied, biased, one key for all heads": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ),
    "llama, a key for each head, long rope": (
        "llama",
        {
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "gemma2, untied, no soft caps": (
        "gemma2",
        {
            "tie_word_embeddings": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3, two rope bases": ("gemma3_text", {"final_logit_softcapping": 5.0}),
    "gpt_neox, sequential residual": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "falcon, multi-query": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon, alibi": (
        "falcon",
        {
            "new_decoder_architecture": False,
            "multi_query": False,
            "num_kv_heads": 4,
            "alibi": True,
            "parallel_attn": False,
        },
    ),
    "opt, projected embeddings": ("opt", {"word_embed_proj_dim": 16}),
    "cohere, normed queries": ("cohere", {"use_qk_norm": True}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False}),
    "phi3, part of the head turned": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 8}),
    "mixtral, sliding": ("mixtral", {"sliding_window": 8, "num_local_experts": 12}),
    "granite, biased": ("granite", {"attention_bias": True, "tie_word_embeddings": True}),
    "gpt2, scaled by layer number": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}


@pytest.mark.parametrize("variant", _VARIANTS)
def test_variants_equal_the_resident_model(variant: str, tmp_path: Path) -> None:
    family, overrides = _VARIANTS[variant]
    folder = save_tiny(family, tmp_path / "model", **overrides)
    report = check_streamed_equals_resident(folder, paddings=("none", "right"))
    assert len(report.compared) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_any_stored_dtype_computed_in_float32(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model", dtype=dtype, max_shard_size="1GB")
    assert (folder / SINGLE_NAME).is_file()
    assert Skeleton(folder).dtype == dtype
    check_streamed_equals_resident(folder, paddings=("none",))


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "falcon", "opt"])
def test_checkpoints_saved_from_the_base_model(family: str, tmp_path: Path) -> None:
    """They lack the base model's prefix: ``h.0``, not ``transformer.h.0``; the head is tied."""
    model = tiny_model(family, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    names = CheckpointIndex.open(tmp_path).tensors
    assert not any(name.startswith(("model.layers", "transformer.", "model.decoder")) for name in names)
    check_streamed_equals_resident(tmp_path, paddings=("none",))


def _rewrite(folder: Path, change: Any) -> Path:
    """Apply ``change`` to the tensors of a checkpoint in one file."""
    tensors = load_file(folder / SINGLE_NAME)
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, folder / SINGLE_NAME)
    return folder


def _one_file(family: str, folder: Path, **overrides: Any) -> Path:
    return save_tiny(family, folder / "model", max_shard_size="1GB", **overrides)


def test_masks_and_frequencies_of_early_versions_are_ignored(tmp_path: Path) -> None:
    masks = {
        "gpt2": {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        },
        "gpt_neo": {
            "transformer.h.1.attn.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
            "transformer.h.1.attn.attention.masked_bias": torch.tensor(-1e9),
        },
        "gpt_neox": {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    }
    for family, extra in masks.items():
        folder = _one_file(family, tmp_path / family)
        _rewrite(folder, lambda tensors, extra=extra: {**tensors, **extra})
        check_streamed_equals_resident(folder, paddings=("right",))


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """DeepSeek's follow the last layer; transformers ignores them by name."""
    folder = _one_file("deepseek_v3", tmp_path)
    _rewrite(folder, lambda tensors: {**tensors, "model.layers.61.eh_proj.weight": torch.ones(4, 4)})
    check_streamed_equals_resident(folder, paddings=("none",))
    assert "model.layers.61.eh_proj.weight" not in Skeleton(folder).keys.sources()


def test_a_real_bias_that_the_model_lacks_is_not_ignored(tmp_path: Path) -> None:
    folder = _one_file("gpt_neo", tmp_path)
    _rewrite(folder, lambda tensors: {**tensors, "transformer.h.1.attn.attention.bias": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"unexpected tensor transformer.h.1.attn.attention.bias"):
        Skeleton(folder)


def test_the_head_of_early_gpt_neox_checkpoints_is_renamed(tmp_path: Path) -> None:
    folder = _one_file("gpt_neox", tmp_path)
    renamed = {"lm_head.weight": "embed_out.weight"}
    _rewrite(folder, lambda tensors: {renamed.get(name, name): value for name, value in tensors.items()})
    assert "embed_out.weight" in CheckpointIndex.open(folder).tensors
    check_streamed_equals_resident(folder, paddings=("none",))


@pytest.mark.parametrize("kept", ["both", "head"])
def test_tied_weights_may_be_saved_under_either_name(kept: str, tmp_path: Path) -> None:
    folder = _one_file("llama", tmp_path, tie_word_embeddings=True)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = tensors.pop("model.embed_tokens.weight")
        both = {"model.embed_tokens.weight": embedding.clone()} if kept == "both" else {}
        return {**tensors, **both, "lm_head.weight": embedding.clone()}

    check_streamed_equals_resident(_rewrite(folder, change), paddings=("none",))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_experts_that_are_saved_fused(family: str, tmp_path: Path) -> None:
    """The module's own parameter names and shapes, without any conversion."""
    folder = _one_file(family, tmp_path)
    state = dict(tiny_model(family).state_dict())
    check_streamed_equals_resident(_rewrite(folder, lambda _: state), paddings=("none",))


def test_each_byte_of_a_mixture_is_read_once_into_the_reused_buffers(tmp_path: Path) -> None:
    skeleton = Skeleton(save_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16))
    batches = make_batches(*random_tokens(skeleton, 5, 20, padding="none"), micro_batch=1)
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    lanes = [
        Lane("dense", PruningPlan(6), logits=_Ignoring()),
        Lane("cut", PruningPlan.parse(6, "2:4"), logits=_Ignoring()),
    ]
    StreamedPass(skeleton, batches, lanes, factory, PassOptions()).run()
    embedding = skeleton.index.tensors["model.embed_tokens.weight"].n_bytes
    gathered = torch.cat([batch.ids for batch in batches]).unique().numel() * 32 * 2
    assert skeleton.reader.bytes_read == skeleton.index.n_bytes - embedding + gathered
    weights = skeleton.read_layer(0)
    experts = weights["mlp.experts.gate_up_proj"]
    assert experts.shape == (4, 128, 32)
    assert {tensor.untyped_storage().data_ptr() for tensor in weights.values()} == {
        experts.untyped_storage().data_ptr()
    }
    for expert in range(4):
        for name, rows in (("w1", slice(0, 64)), ("w3", slice(64, 128))):
            source = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"
            assert torch.equal(experts[expert, rows], skeleton.reader.read(source))


class _Ignoring:
    def observe_logits(self, batch: Any, first: int, logits: torch.Tensor) -> None:
        pass


def test_mixtures_with_missing_experts(tmp_path: Path) -> None:
    folder = _one_file("mixtral", tmp_path)
    expert = "model.layers.2.block_sparse_moe.experts.1"

    def without(*names: str) -> Any:
        return lambda tensors: {name: value for name, value in tensors.items() if name not in names}

    _rewrite(folder, without(f"{expert}.w1.weight"))
    with pytest.raises(
        CheckpointError, match=r"that make model.layers.2.mlp.experts.gate_up_proj do not fit"
    ):
        Skeleton(folder)
    _rewrite(folder, without(f"{expert}.w3.weight"))
    with pytest.raises(CheckpointError, match=r"the 6 tensors that make .* give shape \(3, 128, 32\)"):
        Skeleton(folder)
    _rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if ".2.block_sparse_moe.exp" not in k})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model.layers.2.mlp.experts"):
        Skeleton(folder)


def test_what_transformers_keeps_in_float32_stays_there(tmp_path: Path) -> None:
    folder = save_tiny("deepseek_v3", tmp_path / "model", dtype=torch.bfloat16)
    weights = Skeleton(folder).read_layer(4)
    assert weights["mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert weights["mlp.experts.down_proj"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name",
    ["self_attn.q_proj.qweight", "mlp.up_proj.weight_scale_inv", "mlp.up_proj.weight.absmax", "mlp.x_blocks"],
)
def test_quantised_tensors_without_a_word_in_the_config(name: str, tmp_path: Path) -> None:
    folder = _one_file("llama", tmp_path)
    _rewrite(folder, lambda tensors: {**tensors, f"model.layers.0.{name}": torch.ones(4)})
    with pytest.raises(UnsupportedModelError, match=rf"holds quantised weights \(model.layers.0.{name}\)"):
        Skeleton(folder)
