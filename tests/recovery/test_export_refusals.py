"""What an export refuses: operators, bases and places that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ghoststream.checkpoint import checkpoint_fingerprint
from ghoststream.checkpoint.index import SINGLE_NAME
from ghoststream.errors import (
    CheckpointError,
    MismatchError,
    OutputExistsError,
    PlanError,
    UnsupportedModelError,
)
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.export import export
from ghoststream.testing.models import save_tiny
from ghoststream.testing.operators import random_operators
from tests.helpers.recovered_models import HIDDEN, N_LAYERS, PLAN, make_operators

pytestmark = pytest.mark.integration


def _refusals() -> dict[str, tuple[OperatorSet, type[Exception], str]]:
    other = {"base": {"digest": "sha256:" + "0" * 64}}
    features = OperatorSet(
        PruningPlan(N_LAYERS, (Span(1, 3),)),
        "x",
        (
            BoundaryOperator(
                Span(1, 3), "linear", "magnitudes", random_operators(PLAN, HIDDEN).boundaries[0].weight
            ),
        ),
        HIDDEN,
    )
    return {
        "layers": (
            random_operators(PruningPlan.parse(7, "1:3"), HIDDEN),
            PlanError,
            "7 layers, this model has 6",
        ),
        "width": (random_operators(PLAN, 16), MismatchError, "for hidden size 16, the model has 32"),
        "base": (
            make_operators(metadata=other),
            MismatchError,
            r"were made for another checkpoint \(sha256:000",
        ),
        "features": (features, UnsupportedModelError, "reads the features 'magnitudes'"),
    }


@pytest.mark.parametrize("case", sorted(_refusals()))
def test_operators_that_do_not_fit(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    operators, kind, text = _refusals()[case]
    with pytest.raises(kind, match=text):
        export(tiny_llama, operators, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_operators_of_this_base_are_accepted_from_their_file(tiny_llama: Path, tmp_path: Path) -> None:
    operators = make_operators(metadata={"base": checkpoint_fingerprint(tiny_llama)})
    operators.save(tmp_path / "operators.safetensors")
    report = export(str(tiny_llama), tmp_path / "operators.safetensors", tmp_path / "out")
    assert report.layers_after == 2


def test_a_full_output_folder_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        export(tiny_llama, make_operators(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_base_that_lacks_a_tensor(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", max_shard_size="1GB")
    tensors = load_file(base / SINGLE_NAME)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, base / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model.layers.3.mlp.up_proj.weight"):
        export(base, make_operators(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
