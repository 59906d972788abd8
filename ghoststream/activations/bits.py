"""Hidden states as stored: bfloat16 as its bits in ``uint16``, float16 and float32 as they are.

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
}


def torch_dtype(name: StoreDtype) -> torch.dtype:
    """Return the torch dtype of a store dtype."""
    return _TORCH[name]


def encode(rows: torch.Tensor, name: StoreDtype) -> npt.NDArray[Any]:
    """Turn a floating tensor of any shape and device into the array that is stored.

    Memory: A copy of ``rows`` in the store dtype where dtype, device or layout differ, else none.
    """
    cast = rows.detach().to(device="cpu", dtype=_TORCH[name]).contiguous()
    if name == "bfloat16":
        cast = cast.view(torch.uint16)
    array: npt.NDArray[Any] = cast.numpy()
    return array


def decode_torch(stored: npt.NDArray[Any], name: StoreDtype) -> torch.Tensor:
    """Turn a stored array into a tensor of the store dtype that shares its memory."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor


def decode_numpy(stored: npt.NDArray[Any], name: StoreDtype, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Turn a stored array into values of a numpy dtype; exact for float32 and float64.

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
