"""Hadamard rotations, and the statistics of boundaries in the rotated basis (LinearPatch, arXiv 2505.24680).

A Hadamard matrix of order n has entries 1 and -1 and orthogonal rows; over ``sqrt(n)`` it is a rotation. It
is kept as its Kronecker factors: one of Paley's matrices (R. E. A. C. Paley, On orthogonal matrices, J. Math.
Phys. 12, 1933) for the odd part of n, and Sylvester's for the power of two that is left, in this order. The
arrangement is that of LinearPatch's code, which has its matrices from QuIP#'s: the matrices are the same
where both have one, but for 13, 39 and 43 times a power of two, where those are Williamson's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ghoststream.errors import RequestError
from ghoststream.statistics.boundary import BoundaryReducer

Array = npt.NDArray[np.float64]

_SYLVESTER_BITS = 7
_EXAMPLES = "576, 768, 896, 960, 1536, 2304, 2560, 2880, 3072, 3584, 5120, 6656, 7168 and powers of two"


@dataclass(frozen=True)
class RotatedReducer(BoundaryReducer):
    """Builds the statistics per channel of ``x H`` and ``y H`` in the place of those of ``x`` and ``y``.

    ``H`` is the Hadamard rotation of :func:`rotate`, a channel one of its columns. Token weights are those of
    the hidden states as they are. Energies by position are the same in either basis.

    Raises:
        RequestError: If Grams are asked for.

    Memory: that of :class:`BoundaryReducer` without Grams, and 4 blocks more.
    """

    grams: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grams:
            msg = "statistics in the rotated basis are per channel; reduce them without Grams"
            raise RequestError(msg)

    @property
    def kind(self) -> str:
        """Name of the statistic."""
        return "boundary-rotated"

    def _blocks(self, hidden: int) -> float:
        return super()._blocks(hidden) + 4

    def _in_basis(self, rows: Array) -> Array:
        return rotate(rows)


def rotate(rows: Array) -> Array:
    """Return ``rows H``, ``(n, C)``, ``H`` a Hadamard matrix of order C over ``sqrt(C)``.

    It need not be symmetric.

    Raises:
        RequestError: If no Hadamard matrix of this order is known here.

    Memory: two arrays of the size of ``rows``. Work: ``2 n C`` times the sum of the orders of the factors.
    """
    size = rows.shape[1]
    turned: Array = rows
    after = size
    for factor in hadamard_factors(size):
        order = len(factor)
        after //= order
        if after == 1:
            turned = turned.reshape(-1, order) @ factor
        else:
            turned = np.matmul(factor.T, turned.reshape(-1, order, after))
    result: Array = turned.reshape(rows.shape) / math.sqrt(size)
    return result


def hadamard_matrix(size: int) -> Array:
    """Return ``H``, ``(size, size)`` float64, orthogonal.

    Row ``i`` is what :func:`rotate` makes of unit vector ``i``.

    Raises:
        RequestError: If no Hadamard matrix of this order is known here.
    """
    return rotate(np.eye(size))


@functools.lru_cache(maxsize=8)
def hadamard_factors(size: int) -> tuple[Array, ...]:
    """Return Hadamard matrices (entries 1 and -1) whose Kronecker product is one of order ``size``.

    Of the orders ``size / 2^k`` the smallest is taken for which one of Paley's two constructions with a
    prime, or a product of such matrices, exists: ``q + 1`` for a prime ``q = 3 (mod 4)``, ``2 (q + 1)`` for
    ``q = 1 (mod 4)``. That of order 20 stands behind a factor 2, as in LinearPatch's code.

    Raises:
        RequestError: If there is none.
    """
    odd = size // (size & -size) if size > 0 else 0
    order = 1 if odd == 1 else 4 * odd
    while 0 < order <= size:
        core = () if order == 1 else _core(order)
        if core is not None and order == 20 and size > order:
            return (*_sylvester(2), *core, *_sylvester(size // 40))
        if core is not None:
            return (*core, *_sylvester(size // order))
        order *= 2
    msg = (
        f"no Hadamard matrix of order {size} is known here, so hidden states of that size cannot be "
        f"rotated; sizes that work are {_EXAMPLES}, in general (q + 1) 2^k for primes q = 3 (mod 4), (q + "
        "1) 2^(k+1) for primes q = 1 (mod 4), and products of such; use the operator linear-patch-diagonal"
    )
    raise RequestError(msg)


def _core(order: int) -> tuple[Array, ...] | None:
    found = _paley(order)
    if found is not None:
        return (found,)
    for divisor in range(12, math.isqrt(order) + 1, 4):
        first = _paley(divisor) if order % divisor == 0 else None
        rest = None if first is None else _core(order // divisor)
        if first is not None and rest is not None:
            return (first, *rest)
    return None


def _paley(order: int) -> Array | None:
    if order % 4 or order < 4:
        return None
    if _is_prime(order - 1):
        first: Array = _bordered(order - 1, sign=-1.0) + np.eye(order)
        return first
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):
        doubled = np.kron([[1.0, 1.0], [1.0, -1.0]], _bordered(half - 1, sign=1.0))
        second: Array = doubled + np.kron([[1.0, -1.0], [-1.0, -1.0]], np.eye(half))
        return second
    return None


def _bordered(prime: int, *, sign: float) -> Array:
    # Jacobsthal's matrix, whose entry (i, j) is the Legendre symbol of j - i, with a border of ones.
    symbol = np.full(prime, -1.0)
    symbol[np.arange(prime) ** 2 % prime] = 1.0
    symbol[0] = 0.0
    numbers = np.arange(prime)
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[1:, 1:] = symbol[(numbers - numbers[:, None]) % prime]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = sign
    return matrix


def _sylvester(size: int) -> tuple[Array, ...]:
    # In factors of at most 2^7, of nearly equal size: their product with a block of rows is the cheaper for
    # it.
    bits = size.bit_length() - 1
    n_factors = -(-bits // _SYLVESTER_BITS)
    shares = [bits // n_factors + (number < bits % n_factors) for number in range(n_factors)]
    return tuple(scipy.linalg.hadamard(2**share, dtype=np.float64) for share in shares)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
