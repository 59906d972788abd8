"""Recovered models generate with every cache, and compiled, what they generate without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.recovery import register
from ghoststream.stages.export import export
from tests.helpers.recovered_models import IDS, make_operators

pytestmark = [pytest.mark.integration, pytest.mark.soak]
NEW = 8


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    register()
    folder = tmp_path_factory.mktemp("generating") / "out"
    export(tiny_llama, make_operators(), folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def generated(model: Any, **options: Any) -> list[list[int]]:
    found: list[list[int]] = model.generate(
        IDS, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options
    ).tolist()
    return found


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_cache_gives_what_none_gives(cache: str, model: Any) -> None:
    # A static cache compiles the model where it can, which is tested below.
    options = {"disable_compile": True} if cache == "static" else {}
    assert generated(model, cache_implementation=cache, **options) == generated(model, use_cache=False)


def test_a_compiled_model_is_one_graph_and_computes_the_same(model: Any) -> None:
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
