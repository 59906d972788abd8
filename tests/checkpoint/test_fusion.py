"""Reading tensors to their places gives what the operations of transformers' converters give."""

from __future__ import annotations

import pytest
import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from ghoststream.checkpoint.fusion import place_sources
from ghoststream.errors import CheckpointError, UnsupportedModelError

pytestmark = pytest.mark.unit
_TARGET = "layers.0.mlp.experts.made"


def _tensors(
    converter: WeightConverter, n_experts: int, rows: int
) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    names: dict[str, list[str]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for number, pattern in enumerate(converter.source_patterns):
        for expert in range(n_experts):
            name = pattern.replace("*", str(expert))
            names.setdefault(pattern, []).append(name)
            tensors[name] = torch.randn(rows + number, 5)
    return names, tensors


def _converted(
    converter: WeightConverter, names: dict[str, list[str]], tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    for pattern, sources in names.items():
        for source in sources:
            converter.add_tensor(_TARGET, source, pattern, lambda source=source: tensors[source])
    (made,) = converter.convert(_TARGET).values()
    result: torch.Tensor = made[0] if isinstance(made, list) else made
    return result


def _placed(
    converter: WeightConverter, names: dict[str, list[str]], tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shape, pieces = place_sources(_TARGET, converter, names, shapes)
    made = torch.full(shape, torch.nan)
    for piece in pieces:
        made[piece.index].copy_(tensors[piece.source])
    return made


def _converters(model_type: str) -> list[WeightConverter]:
    mapping = get_checkpoint_conversion_mapping(model_type)
    return [item for item in mapping if isinstance(item, WeightConverter)]


@pytest.mark.parametrize("n_experts", [1, 3, 12])
@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v3"]
)
def test_placing_is_what_transformers_computes(model_type: str, n_experts: int) -> None:
    for number, converter in enumerate(_converters(model_type)):
        names, tensors = _tensors(converter, n_experts, rows=4)
        placed = _placed(converter, names, tensors)
        assert torch.equal(placed, _converted(_converters(model_type)[number], names, tensors))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_any_order_and_dimension(dim: int) -> None:
    def make() -> WeightConverter:
        return WeightConverter(
            ["a.*.x", "b.*.y"], "made", [MergeModulelist(dim), Concatenate(0 if dim else 1)]
        )

    names, tensors = _tensors(make(), 3, rows=4)
    tensors = {name: value[:4] for name, value in tensors.items()}
    assert torch.equal(_placed(make(), names, tensors), _converted(make(), names, tensors))


def test_stacking_after_concatenation_of_a_stacked_dimension() -> None:
    def make() -> WeightConverter:
        return WeightConverter(["a.*.x", "b.*.y"], "made", [MergeModulelist(0), Concatenate(0)])

    names, tensors = _tensors(make(), 2, rows=4)
    tensors = {name: value[:4] for name, value in tensors.items()}
    assert torch.equal(_placed(make(), names, tensors), _converted(make(), names, tensors))


@pytest.mark.parametrize("operation", [Chunk(0), Transpose(0, 1)])
def test_operations_that_do_more_than_placing_are_refused(operation: object) -> None:
    converter = WeightConverter("a.weight", "made", [operation])
    with pytest.raises(UnsupportedModelError, match=f"computed .* on load \\({type(operation).__name__}\\)"):
        place_sources(_TARGET, converter, {"a.weight": ["a.weight"]}, {"a.weight": (4, 2)})


def test_tensors_of_different_shapes_do_not_fit() -> None:
    converter = WeightConverter("a.*.x", "made", [MergeModulelist(0)])
    shapes = {"a.0.x": (4, 2), "a.1.x": (4, 3)}
    with pytest.raises(CheckpointError, match=r"do not fit together \(shapes \(4, 2\), \(4, 3\)\)"):
        place_sources(_TARGET, converter, {"a.*.x": list(shapes)}, shapes)
