from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ghoststream.errors import ArtifactError, InputNotFoundError, NumericsError, RequestError
from ghoststream.files import json_digest
from ghoststream.files.tensor_files import TensorFile, write_tensors
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.spans import PruningPlan, Span

pytestmark = pytest.mark.unit
PLAN = PruningPlan(8, (Span(1, 3), Span(4, 5), Span(6, 8)))


def operators() -> OperatorSet:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((4, 4)).astype(np.float32), np.ones(4, dtype=np.float32)
    boundaries = (
        BoundaryOperator(
            Span(1, 3), "linear", "hidden", weight, bias, {"r2": 0.1 + 0.2, "warnings": ["hot"]}
        ),
        BoundaryOperator(Span(4, 5), "diagonal", "hidden", bias),
        BoundaryOperator(Span(6, 8), "identity"),
    )
    return OperatorSet(PLAN, "mixed", boundaries, 4, {"base": {"digest": "sha256:0"}, "versions": {"a": "1"}})


def write_otherwise(path: Path, **changes: Any) -> None:
    """Write what another version of ghoststream might: whole, but not as this one reads it."""
    with TensorFile(path) as file:
        metadata, arrays = file.metadata, {name: file.read(name) for name in file.digests}
    write_tensors(path, arrays, {**metadata, **changes})


def test_file_holds_named_tensors_and_one_metadata_key(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "operators.safetensors"
    operators().save(path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"boundary.1-3.weight", "boundary.1-3.bias", "boundary.4-5.weight"}
        assert set(file.metadata()) == {"ghoststream", "digest"}
        assert (
            file.get_tensor("boundary.1-3.weight").numpy().tolist()
            == load_file(path)["boundary.1-3.weight"].tolist()
        )
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_load_gives_back_every_bit_and_equal_content_equal_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    original = operators()
    original.save(first)
    loaded = OperatorSet.load(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    assert (loaded.plan, loaded.kind, loaded.hidden, loaded.metadata) == (PLAN, "mixed", 4, original.metadata)
    assert [operator.form for operator in loaded.boundaries] == ["linear", "diagonal", "identity"]
    assert [operator.span for operator in loaded.operators] == [Span(1, 3), Span(4, 5)]
    assert loaded.diagnostics["[1,3)"]["r2"] == 0.1 + 0.2
    assert loaded.warnings == ("hot",)
    rows = np.ones((2, 4))
    for before, after in zip(original.boundaries, loaded.boundaries, strict=True):
        assert (before.apply(rows) == after.apply(rows)).all()


def test_a_set_without_operators_is_a_file_too(tmp_path: Path) -> None:
    plan = PruningPlan(4, (Span(1, 2),))
    OperatorSet(plan, "none", (BoundaryOperator(Span(1, 2), "identity"),), 4).save(tmp_path / "none")
    loaded = OperatorSet.load(tmp_path / "none")
    assert (loaded.plan, loaded.operators) == (plan, ())


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "operators.safetensors"
    operators().save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"tensor boundary\.4-5\.weight fails its digest"):
        OperatorSet.load(path)


def test_files_that_are_no_operators_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "operators.safetensors"
    with pytest.raises(InputNotFoundError, match="no file"):
        OperatorSet.load(path)
    save_file({"a": np.ones(2)}, path)
    advice = "; restore it from a copy, or fit again$"
    with pytest.raises(ArtifactError, match="carries no ghoststream metadata: .*" + advice):
        OperatorSet.load(path)
    write_tensors(path, {"a": np.ones(2)}, {})
    with pytest.raises(ArtifactError, match="not an operator file"):
        OperatorSet.load(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="not a complete safetensors file .*" + advice):
        OperatorSet.load(path)
    for change, text in (
        ({"encoding-version": "9.0"}, "update ghoststream"),
        ({"boundaries": [{}]}, "lacks a part"),
        ({"plan": {"n_layers": 8, "spans": []}}, "lacks a part"),
        ({"recipe": {"ridge": 1.0}, "recipe_digest": json_digest({"ridge": 2.0})}, "recipe does not have"),
    ):
        operators().save(path)
        write_otherwise(path, **change)
        with pytest.raises(ArtifactError, match=text):
            OperatorSet.load(path)


def test_every_character_of_the_metadata_counts(tmp_path: Path) -> None:
    path = tmp_path / "operators.safetensors"
    weight = np.eye(4, dtype=np.float32)
    normed = BoundaryOperator(Span(1, 3), "linear", "normed", weight, norm_epsilon=1e-5)
    recipe = {"ridge": 0.5}
    metadata = {"recipe": recipe, "recipe_digest": json_digest(recipe), "versions": {"numpy": "2.0"}}
    OperatorSet(PruningPlan(8, (Span(1, 3),)), "ghost", (normed,), 4, metadata).save(path)
    content = path.read_bytes()
    for before, after in (
        (b"1e-05", b"1e-02"),
        (b'numpy\\":\\"2.0', b'numpy\\":\\"2.1'),
        (b'ridge\\":0.5', b'ridge\\":0.6'),
        (b"normed", b"hidden"),
        (b'n_layers\\":8', b'n_layers\\":9'),
    ):
        assert content.count(before) == 1
        path.write_bytes(content.replace(before, after))
        with pytest.raises(ArtifactError, match=r"operators\.safetensors fails its digest"):
            OperatorSet.load(path)
    path.write_bytes(content)
    assert OperatorSet.load(path).digest == json_digest(recipe)


def test_operators_must_be_finite_fit_their_form_and_their_plan() -> None:
    with pytest.raises(NumericsError, match="not finite in float32"):
        BoundaryOperator(Span(1, 2), "diagonal", "hidden", np.array([np.nan], dtype=np.float32))
    with pytest.raises(RequestError, match="rank 1"):
        BoundaryOperator(Span(1, 2), "linear", "hidden", np.ones(3, dtype=np.float32))
    with pytest.raises(RequestError, match="do not fit the plan"):
        OperatorSet(PLAN, "none", (BoundaryOperator(Span(1, 3), "identity"),), 4)
    with pytest.raises(RequestError, match="no feature 'unknown'"):
        BoundaryOperator(Span(1, 2), "linear", "unknown", np.ones((3, 3), dtype=np.float32)).apply(np.ones(3))
    with pytest.raises(RequestError, match="scales the hidden state itself, not 'normed'"):
        BoundaryOperator(Span(1, 2), "diagonal", "normed", np.ones(3, dtype=np.float32))
