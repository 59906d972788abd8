"""Recipes: frozen, strict, one digest, and differences in words."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import pytest
from pydantic import ValidationError

from ghoststream import recipe as recipes
from ghoststream.errors import ArtifactError
from ghoststream.options import Method
from ghoststream.recipe import (
    CaptureRecipe,
    EvaluateRecipe,
    Recipe,
    StoreFitRecipe,
    TextRecipe,
    differences,
    library_versions,
)

pytestmark = pytest.mark.unit
DIGEST = "sha256:" + "0" * 64
TEXT = TextRecipe(spec="file:wiki.valid.raw", sequences=96, length=512, first_tokens=())


def capture(**changes: Any) -> CaptureRecipe:
    fields: dict[str, Any] = {
        "model_digest": DIGEST,
        "config_digest": DIGEST,
        "text": TEXT,
        "tokens_digest": DIGEST,
        "dtype": "float32",
        "store_dtype": "bfloat16",
        "attention": "sdpa",
        "micro_batch": 4,
        "layers": (0, 1, 2),
        "sequences_per_shard": 8,
    }
    return CaptureRecipe(**{**fields, **changes})


def fit(**changes: Any) -> StoreFitRecipe:
    fields: dict[str, Any] = {
        "method": Method(operator="ghost", ridge=1e-6),
        "range_sequences": 16,
        "folds": 4,
        "block_tokens": 2048,
        "store_digest": DIGEST,
    }
    return StoreFitRecipe(**{**fields, **changes})


ALL: list[Recipe] = [
    capture(),
    fit(),
    EvaluateRecipe(
        text=TEXT,
        tokens_digest=DIGEST,
        dtype="float32",
        attention="sdpa",
        micro_batch=1,
        loss_chunk_tokens=512,
    ),
]


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    again = type(recipe).from_json(recipe.to_json(), "memory")
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert recipe.digest().startswith("sha256:")


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
def test_a_recipe_cannot_be_changed(recipe: Recipe) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(recipe, next(iter(type(recipe).model_fields)), "changed")


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
def test_an_unknown_field_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ArtifactError, match=r"in old\.json .*speed: there is no such option"):
        type(recipe).from_json({**recipe.to_json(), "speed": 1}, "old.json")


def test_a_missing_field_is_refused_by_name() -> None:
    data = capture().to_json()
    del data["dtype"]
    with pytest.raises(ArtifactError, match=r"CaptureRecipe in memory cannot be used .*dtype: is missing"):
        CaptureRecipe.from_json(data, "memory")


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 0},
        {"dtype": "float8"},
        {"store_dtype": "float64"},
        {"model_digest": "md5:1"},
        {"layers": (-1,)},
        {"sequences_per_shard": 0},
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        capture(**changes)


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_the_ridge_is_finite_and_not_negative(ridge: float) -> None:
    with pytest.raises(ValidationError):
        Method(operator="ghost", ridge=ridge)


def test_each_field_changes_the_digest() -> None:
    changes: list[dict[str, Any]] = [
        {"dtype": "bfloat16"},
        {"micro_batch": 5},
        {"layers": (0, 1)},
        {"attention": "eager"},
        {"revision": "abc"},
        {"text": TextRecipe(spec="file:wiki.valid.raw", sequences=95, length=512, first_tokens=())},
        {"text": TextRecipe(spec="file:wiki.valid.raw", sequences=96, length=512, first_tokens=(1,))},
    ]
    assert len({capture().digest(), *(capture(**change).digest() for change in changes)}) == 1 + len(changes)


def test_differences_name_field_and_values() -> None:
    shorter = TextRecipe(spec="file:wiki.valid.raw", sequences=96, length=256, first_tokens=())
    other = capture(text=shorter, micro_batch=2)
    assert differences(capture(), other) == [
        "micro_batch is 4, asked for 2",
        "text.length is 512, asked for 256",
    ]
    assert differences(capture().to_json(), capture()) == []


def test_versions_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_LIBRARIES", ("numpy", "a-package-that-nobody-has"))
    assert library_versions() == {
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "a-package-that-nobody-has": "not installed",
    }
