"""Bytes that a quantised release holds of each weight, where only its configuration is known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

_FP4_BITS = 4 + 8 / 32
"""Of a number in MXFP4: four, and an exponent of a byte for each 32."""
_SCALE_BYTES = 4
_BLOCK = (128, 128)
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def released_bytes(
    said: Mapping[str, Any], module: str, shape: tuple[int, ...], *, is_linear: bool, head: str
) -> int | None:
    """Return the bytes of a weight and its scales; None if it is plain, or the method tells too little.

    Args:
        said: The ``quantization_config``.
        module: Path of the module that has the weight.
        shape: Its shape; experts are stacked.
        is_linear: Whether the module is a linear map.
        head: Path of the output head, which is left as it is where no list says otherwise.
    """
    is_stack = len(shape) == 3
    if said["quant_method"] == "mxfp4" and is_stack:
        return round(prod(shape) * _FP4_BITS / 8)
    if said["quant_method"] != "fp8" or not (is_stack or (is_linear and len(shape) == 2)):
        return None
    if _matches(module, said.get("modules_to_not_convert") or said.get("ignored_layers") or [head]):
        return None
    *stacked, rows, columns = shape
    high, wide = said.get("weight_block_size", _BLOCK) or (rows, columns)
    return prod(shape) + _SCALE_BYTES * prod(stacked) * -(-rows // high) * -(-columns // wide)


def _matches(module: str, names: Iterable[str]) -> bool:
    """Say whether a module is one of a list, as transformers reads such lists."""
    return any(re.match(f"(?:{name}){_BOUNDARY}", module) or module.endswith(name) for name in names)
