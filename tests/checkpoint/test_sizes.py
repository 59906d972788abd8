"""Sizes read off headers are those of the model that transformers builds, for every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ghoststream.checkpoint.sizes import read_sizes
from ghoststream.errors import CheckpointError, UnsupportedModelError
from ghoststream.recovery.absorbing import require_absorbable
from ghoststream.spans import Span
from ghoststream.stages.capturing.tap_store import tap_width
from ghoststream.streaming import Skeleton, parse_dtype
from ghoststream.streaming.budget import layer_work_bytes
from tests.helpers.families import families
from tests.helpers.resident_taps import absent_taps

# Float32 values a token: of Mamba 2 five matrices of a chunk (8) for each of 4 heads and three of its state
# (8); of Mamba 1 four states (8) of 64 channels; of Kimi's rule three of 64 x 8 for each of 4 heads.
SCANS = {
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h"), 4 * 4 * (40 + 24)),
    "jamba": 4 * 4 * 64 * 8,
    "kimi_linear": 4 * 3 * 4 * 64 * 8,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", families())
def test_sizes_of_headers_are_those_of_the_skeleton(
    tiny_checkpoint: Callable[[str], Path], model_type: str, dtype: str
) -> None:
    root = tiny_checkpoint(model_type)
    skeleton, sizes = Skeleton(root, dtype=parse_dtype(dtype)), read_sizes(root, dtype=dtype)
    assert sizes.n_layers == skeleton.n_layers
    assert sizes.hidden == skeleton.hidden_size
    # What transformers keeps in float32 is counted at the compute dtype: eight bytes of a layer here.
    kept = 0.0 if dtype == "float32" else 1e-3
    largest = max(map(skeleton.layer_bytes, range(skeleton.n_layers)))
    assert sizes.layer_bytes == pytest.approx(largest, rel=kept, abs=0)
    assert sizes.unit_bytes == pytest.approx(skeleton.unit_bytes, rel=kept, abs=0)
    head = skeleton.model.get_output_embeddings().weight
    assert sizes.head_bytes == head.numel() * skeleton.dtype.itemsize
    assert sizes.checkpoint_bytes == skeleton.index.n_bytes
    work = (4 * sizes.widest + 8 * sizes.hidden) * sizes.itemsize + sizes.heads * 16 * (
        2 * sizes.itemsize + 4
    )
    assert work + SCANS.get(model_type, 0) == layer_work_bytes(skeleton, 16)
    assert sizes.scan_bytes == SCANS.get(model_type, 0)
    # Mamba 2 calls its only implementation eager, and has no attention.
    assert bool(sizes.heads) == (skeleton.attention == "eager" and model_type != "mamba2")
    try:
        require_absorbable(skeleton, Span(1, 2), "mlp")
    except UnsupportedModelError:
        assert sizes.refusal
        assert sizes.intermediate == 0
    else:
        assert sizes.refusal == ""
        assert sizes.intermediate == tap_width(skeleton, 0, "mlp_intermediate")
    heads = [
        tap_width(skeleton, layer, "attention_heads")
        for layer in range(skeleton.n_layers)
        if "attention_heads" not in absent_taps(model_type, layer)
    ]
    if heads:
        assert sizes.tap_width(("attention_heads", "output")) == max(heads) + skeleton.hidden_size


def test_the_dtype_of_the_checkpoint_acts_unless_one_is_given(tiny_llama: Path) -> None:
    assert read_sizes(tiny_llama).dtype == "float32"
    half = read_sizes(tiny_llama, dtype="bfloat16")
    assert half.unit_bytes * 2 == read_sizes(tiny_llama).unit_bytes


def test_attention_that_is_asked_for_counts(tiny_checkpoint: Callable[[str], Path]) -> None:
    assert read_sizes(tiny_checkpoint("llama"), attention="eager").heads == 4
    assert read_sizes(tiny_checkpoint("gemma2"), attention="sdpa").heads == 0


def test_a_layer_that_is_missing_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(CheckpointError, match=r"holds 6 decoder layers, its config\.json says 7"):
        read_sizes(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "rwkv"}))
    with pytest.raises(UnsupportedModelError, match="recurrent layers"):
        read_sizes(tmp_path)


def test_mixtures_have_no_tap_of_one_mlp(tiny_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="layers with experts have no tap"):
        read_sizes(tiny_checkpoint("mixtral")).tap_width(("mlp_intermediate",))


def test_neither_torch_nor_transformers_is_imported(tiny_llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ghoststream.checkpoint.sizes import read_sizes; "
        f"read_sizes(Path({str(tiny_llama)!r})); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
