"""Products of moments on a device: of exact factors, summed in float32, and their sums in float64."""

from __future__ import annotations

import torch

from ghoststream.errors import RequestError
from ghoststream.statistics.blas import FLOAT32_BLOCK_TOKENS

_BLOCKS = 8
"""Blocks whose float32 sums are added up in float32 before they enter the float64 sum."""

_MIRROR_ROWS = 128

PRODUCT_ERROR = (FLOAT32_BLOCK_TOKENS + _BLOCKS + 2) * 2.0**-24 + 3 * 2.0**-18
"""Bound on the error of an entry of a ``float32-blocked`` product, relative to ``sum |x_i| |y_i|``: 2.7e-5.

The first part is that of :func:`~ghoststream.statistics.blas.add_gram_upper_float32` for a block and the sums
of eight. The second is there for rows that bfloat16 does not hold: see :func:`bfloat16_parts`. Products of
rows that it holds are exact, and have the first part alone.
"""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies matrices of bfloat16 into float32, and torch lets it."""
    return device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads()


def bfloat16_parts(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return tensors in bfloat16 whose sum is ``rows``: one where it holds them, else two.

    What is left of two parts is below ``2^-18`` of a value; the product of the smaller parts of two operands
    is left out, too.
    """
    if rows.dtype == torch.bfloat16:
        return (rows,)
    high = rows.to(torch.bfloat16)
    return high, (rows - high.to(rows.dtype)).to(torch.bfloat16)


def require_full_float32() -> None:
    """Check that torch does not round the factors of float32 products to TF32.

    Raises:
        RequestError: If it does.
    """
    if torch.get_float32_matmul_precision() != "highest":
        msg = (
            "torch is set to compute float32 products in less (TF32); set its float32 matmul precision to "
            "highest"
        )
        raise RequestError(msg)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, exact: bool) -> None:
    """Add ``left^T right`` to ``total``, in place.

    Args:
        total: ``(p, C)`` float64.
        left: ``(n, p)``, floating, on the same device.
        right: ``(n, C)``, floating, on the same device.
        exact: Whether products are taken in float64; otherwise in float32 over blocks of
            :data:`~ghoststream.statistics.blas.FLOAT32_BLOCK_TOKENS` rows, with :data:`PRODUCT_ERROR`.

    Memory: in float64 what is not of that type, widened; else
    :func:`~ghoststream.statistics.blas.device_product_bytes` and a block of rows.
    """
    if exact:
        total.addmm_(left.double().T, right.double())
        return
    step = _BLOCKS * FLOAT32_BLOCK_TOKENS
    for first in range(0, len(left), step):
        total += _float32_sum(left[first : first + step], right[first : first + step])


def mirror_upper(gram: torch.Tensor) -> None:
    """Copy the upper triangle of ``gram`` ``(p, p)`` to the lower one, in place, panel by panel."""
    for start in range(0, len(gram), _MIRROR_ROWS):
        stop = min(start + _MIRROR_ROWS, len(gram))
        gram[start:stop, :start] = gram[:start, start:stop].T
        block = gram[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)


def _float32_sum(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros((left.shape[1], right.shape[1]), dtype=torch.float32, device=left.device)
    for part, other in zip(left.split(FLOAT32_BLOCK_TOKENS), right.split(FLOAT32_BLOCK_TOKENS), strict=True):
        if not multiplies_bfloat16(left.device):
            sums.addmm_(part.float().T, other.float())
            continue
        for number, one in enumerate(bfloat16_parts(part)):
            for factor in bfloat16_parts(other)[: 2 - number]:
                sums += torch.mm(one.T, factor, out_dtype=torch.float32)
    return sums
