"""The dtypes that hidden states can be stored in, by name; importing them waits for no torch."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from ghoststream.errors import RequestError

StoreDtype = Literal["bfloat16", "float16", "float32", "int8"]
"""Names of the dtypes that hidden states can be stored in."""

STORE_DTYPES: tuple[StoreDtype, ...] = get_args(StoreDtype)

_NUMPY: dict[StoreDtype, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}


def require_store_dtype(name: str) -> StoreDtype:
    """Return ``name`` if hidden states can be stored in it.

    Raises:
        RequestError: If they cannot.
    """
    for known in STORE_DTYPES:
        if name == known:
            return known
    msg = f"hidden states cannot be stored as {name!r}; choose one of {', '.join(STORE_DTYPES)}"
    raise RequestError(msg)


def numpy_dtype(name: StoreDtype) -> np.dtype[Any]:
    """Return the dtype of the stored array: ``uint16`` for bfloat16, else the dtype itself."""
    return _NUMPY[name]
