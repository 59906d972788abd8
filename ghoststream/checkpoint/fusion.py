"""Parameters that transformers makes of several checkpoint tensors on load: the experts of a mixture.

A released mixture keeps each expert's matrices as tensors of their own; the model's module has one parameter
for all of them. transformers stacks and concatenates the tensors (``WeightConverter``). Both operations only
put tensors next to each other, so each tensor has a place inside the parameter and can be read straight into
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghoststream.errors import CheckpointError, UnsupportedModelError

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A checkpoint tensor and the place that it fills: ``parameter[index]``.

    ``()`` is the whole parameter.
    """

    source: str
    index: Index = ()


@dataclass(frozen=True, slots=True)
class _Block:
    """A tensor that is put together: its shape, and where each source lies in it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def place_sources(
    target: str,
    converter: Any,
    sources: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
    """Follow a converter's operations and return the shape of what it makes and the place of every source.

    Args:
        target: Name of the parameter, for messages.
        converter: The ``WeightConverter`` of transformers that makes it.
        sources: For each of the converter's source patterns the matching checkpoint tensors, in natural
            order.
        shapes: Shape of every checkpoint tensor.

    Raises:
        UnsupportedModelError: If an operation does more than put tensors next to each other.
        CheckpointError: If the tensors do not fit together.
    """
    state: dict[str, list[_Block]] = {
        pattern: [_leaf(name, shapes[name]) for name in names] for pattern, names in sources.items()
    }
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist":
            state = {pattern: [_stack(target, blocks, operation.dim)] for pattern, blocks in state.items()}
        elif kind == "Concatenate":
            ordered = [block for pattern in converter.source_patterns for block in state.get(pattern, ())]
            state = {target: [_concatenate(target, ordered, operation.dim)]}
        else:
            msg = (
                f"{target} is computed from several tensors on load ({kind}); such checkpoints cannot be "
                "streamed"
            )
            raise UnsupportedModelError(msg)
    (blocks,) = state.values()
    return blocks[0].shape, blocks[0].pieces


def _leaf(name: str, shape: tuple[int, ...]) -> _Block:
    return _Block(shape, (Piece(name, tuple(slice(0, size) for size in shape)),))


def _stack(target: str, blocks: Sequence[_Block], dim: int) -> _Block:
    _require_equal(target, [block.shape for block in blocks])
    shape = blocks[0].shape
    pieces = (
        Piece(piece.source, (*piece.index[:dim], number, *piece.index[dim:]))
        for number, block in enumerate(blocks)
        for piece in block.pieces
    )
    return _Block((*shape[:dim], len(blocks), *shape[dim:]), tuple(pieces))


def _concatenate(target: str, blocks: Sequence[_Block], dim: int) -> _Block:
    _require_equal(target, [(*block.shape[:dim], *block.shape[dim + 1 :]) for block in blocks])
    pieces: list[Piece] = []
    offset = 0
    for block in blocks:
        for piece in block.pieces:
            moved = _moved(piece.index[dim], offset)
            pieces.append(Piece(piece.source, (*piece.index[:dim], moved, *piece.index[dim + 1 :])))
        offset += block.shape[dim]
    shape = blocks[0].shape
    return _Block((*shape[:dim], offset, *shape[dim + 1 :]), tuple(pieces))


def _moved(place: int | slice, offset: int) -> int | slice:
    if isinstance(place, slice):
        return slice(place.start + offset, place.stop + offset)
    return place + offset


def _require_equal(target: str, shapes: Sequence[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        msg = (
            f"the tensors that make {target} do not fit together (shapes "
            f"{', '.join(map(str, sorted(set(shapes))))})"
        )
        raise CheckpointError(msg)
