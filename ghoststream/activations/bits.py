"""Hidden states as stored: bfloat16 as its bits in ``uint16``, int8 with scales, others as they are.

Zarr has no bfloat16, and numpy has none either; the bits travel through ``uint16`` and every value, NaN
payloads and subnormals included, comes back as it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.activations.dtypes import StoreDtype

_TORCH: dict[StoreDtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.float32,
}

# Bits of a value, and the pattern of positive infinity.
_INFINITY: dict[StoreDtype, tuple[int, int]] = {
    "bfloat16": (16, 0x7F80),
    "float16": (16, 0x7C00),
    "float32": (32, 0x7F80_0000),
}


def torch_dtype(name: StoreDtype) -> torch.dtype:
    """Return the torch dtype of the values that a store dtype is read as: float32 for int8."""
    return _TORCH[name]


def all_finite(raw: npt.NDArray[np.uint8], name: StoreDtype) -> bool:
    """Say whether stored values are neither NaN nor infinite, in one thread.

    torch would look at blocks of this size with all of its threads, which other work has use for.

    Args:
        raw: Bytes of whole values, ``(n,)``.
        name: What they are.
    """
    if name == "int8":
        return True
    # As integers, NaN and infinity are the largest values: those of positive sign as signed, others as
    # unsigned ones.
    bits, infinity = _INFINITY[name]
    positive, negative = raw.view(f"i{bits // 8}").max(initial=0), raw.view(f"u{bits // 8}").max(initial=0)
    return bool(positive < infinity) and bool(negative < infinity + (1 << (bits - 1)))


def decode_torch(stored: npt.NDArray[Any], name: StoreDtype) -> torch.Tensor:
    """Turn a stored array into a tensor of the store dtype that shares its memory; not for int8."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor


def decode_numpy(stored: npt.NDArray[Any], name: StoreDtype, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Turn a stored array into values of a numpy dtype; exact for float32 and float64; not for int8.

    Memory: The result, and for bfloat16 one row (along the first axis) in float32.
    """
    if name != "bfloat16":
        return stored.astype(dtype, copy=False)
    values = np.empty(stored.shape, dtype=dtype)
    for row, bits in zip(values, stored, strict=True):
        row[...] = bits_to_float32(bits)
    return values


def bits_to_float32(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Turn bfloat16 bits (``uint16``) into float32: they are its upper half."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
