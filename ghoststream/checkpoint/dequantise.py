"""Making weights of what a quantised release holds, by arithmetic, a block of rows at a time.

Each method gives the bits that transformers gives where it dequantises a whole model. Numbers of eight bits
are moved into those of float16, two of four bits are looked up at once: several times as fast as torch's
conversion and transformers' functions. These also refuse blocks that are cut off at an edge, which DeepSeek
V3 has. What compressed-tensors packs is made by that library. torch takes several processors for its parts;
numbers of four bits are made by numpy, in several threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.checkpoint.packed_weight import PackedWeight
from ghoststream.errors import CheckpointError

_BLOCK_ELEMENTS = 2**19
"""Of a weight, that are made at a time: 2 MiB in float32, what a core's cache takes."""
_THREAD_ELEMENTS = 2**18
"""The same where numpy makes them, which keeps a result more beside them."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of four bits, E2M1."""
_WITH_ROWS = frozenset({"weight", "weight_packed", "weight_scale", "weight_zero_point"})


def dequantise_into(
    packed: PackedWeight, parts: Mapping[str, torch.Tensor], target: torch.Tensor, threads: Executor
) -> None:
    """Make a weight in the dtype of ``target``.

    Args:
        packed: What the weight is.
        parts: Its tensors as they are stored, by role.
        target: Host tensor of the weight's shape; need not be contiguous.
        threads: Those that numbers of four bits are made in.

    Raises:
        CheckpointError: If the tensors say another shape.

    Memory: a few times 2 MiB, for each thread; of compressed-tensors with scales of blocks, or with zero
    points that are packed, some times the weight.
    """
    if packed.method == "fp8":
        _float8(parts["weight"], parts["scale"].float(), packed.scheme["block"], target)
    elif packed.method == "mxfp4":
        _mxfp4(parts, target, threads)
    else:
        _compressed(packed, parts, target)


def _float8(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, target: torch.Tensor
) -> None:
    """Multiply in float32 and round once, as transformers does."""
    if weight.ndim > 2:
        for number in range(len(weight)):
            _float8(weight[number], scale if block is None else scale[number], block, target[number])
        return
    rows, columns = weight.shape
    high, wide = block or (rows, columns)
    # (rows of blocks, columns)
    spread = scale.reshape(-1, scale.shape[-1] if block else 1).repeat_interleave(wide, 1)[:, :columns]
    numbers = weight.view(torch.int8)
    # Moved to the sign and the upper bits of float16, a number of eight bits is so much smaller there: both
    # kinds have its layout, one with a shorter exponent, in whose place is a copy of the sign.
    is_short = weight.dtype == torch.float8_e4m3fn
    bits, mask, smaller = (7, ~(1 << 14), 2.0**8) if is_short else (8, -1, 1.0)
    spread = spread * smaller
    for first, stop in _steps(rows, columns, high if block else 1, _BLOCK_ELEMENTS):
        moved = numbers[first:stop].to(torch.int16).bitwise_left_shift_(bits).bitwise_and_(mask)
        made = moved.view(torch.float16).float()
        for begin in range(first // high * high, stop, high):
            made[max(begin - first, 0) : begin - first + high].mul_(spread[begin // high])
        target[first:stop].copy_(made)


def _mxfp4(parts: Mapping[str, torch.Tensor], target: torch.Tensor, threads: Executor) -> None:
    """Multiply numbers of four bits, two of them a byte, with powers of two; exact but for the range."""
    values, byte = np.array(_FP4, np.float32), np.arange(256)
    # Two numbers of float32 as one of 64 bits.
    pairs = np.stack([values[byte & 15], values[byte >> 4]], -1).view(np.int64).ravel()
    with np.errstate(over="ignore"):
        powers = np.ldexp(np.float32(1), byte - 127)
    # numpy has no bfloat16: its bits are the upper half of a float32 that has no others.
    is_short = target.dtype == torch.bfloat16
    place = (target.view(torch.int16) if is_short else target).numpy()
    blocks, scales = (parts[role].view(torch.uint8).numpy() for role in ("blocks", "scales"))
    steps = [
        (*matrix, first, stop)
        for matrix in zip(blocks, scales, place, strict=True)
        for first, stop in _steps(len(matrix[0]), len(matrix[2]), 1, _THREAD_ELEMENTS)
    ]
    deque(threads.map(partial(_four_bits, pairs, powers), *zip(*steps, strict=True)), maxlen=0)


def _four_bits(
    pairs: npt.NDArray[np.int64],
    powers: npt.NDArray[np.float32],
    blocks: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    place: npt.NDArray[Any],
    first: int,
    stop: int,
) -> None:
    """Make the columns ``first:stop`` of a matrix, which are rows of its blocks."""
    rows = blocks[first:stop]
    found = np.empty(rows.shape, np.int64)
    # Clipping changes nothing; without it numpy would take the result through a buffer.
    np.take(pairs, rows, out=found, mode="clip")
    numbers = found.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers *= powers[scales[first:stop]][..., None]
        made = numbers.view(np.int16)[..., 1::2] if place.dtype == np.int16 else numbers
        place[:, first:stop] = made.reshape(stop - first, -1).T


def _compressed(packed: PackedWeight, parts: Mapping[str, torch.Tensor], target: torch.Tensor) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(dict(packed.scheme))
    compressor: Any = BaseCompressor.get_value_from_registry(packed.scheme["format"])
    said = parts.get("weight_shape")
    if said is not None and tuple(said.tolist()) != tuple(target.shape):
        msg = (
            f"{packed.parts['weight_shape']} says {tuple(said.tolist())}, the numbers of {packed.name} are "
            f"for {tuple(target.shape)}; download or copy the shard again"
        )
        raise CheckpointError(msg)
    rows, columns = target.shape
    sided = {role: part for role, part in parts.items() if role in _WITH_ROWS and part.numel() > 1}
    separable = all(len(part) == rows for part in sided.values())
    for first, stop in _steps(rows, columns, 1, _BLOCK_ELEMENTS) if separable else [(0, rows)]:
        state = {**parts, **{role: part[first:stop] for role, part in sided.items()}}
        if said is not None:
            state["weight_shape"] = torch.tensor([stop - first, columns])
        target[first:stop].copy_(compressor.decompress(state, scheme)["weight"])


def _steps(rows: int, columns: int, unit: int, elements: int) -> Iterator[tuple[int, int]]:
    """Yield spans of rows, whole units each but the last, of so many elements or a unit."""
    step = max(1, elements // max(1, columns * unit)) * unit
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
