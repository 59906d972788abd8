"""Token ids that were prepared elsewhere, from an ``.npy`` file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ghoststream.errors import GhoststreamError, InputNotFoundError, RequestError, TextError
from ghoststream.files import open_input

_MAX_ID = np.iinfo(np.int32).max


def read_ids(path: Path, *, sequences: int | None, length: int) -> npt.NDArray[np.int32]:
    """Read sequences of ids: rows of a 2-D array as they are, or windows cut from a 1-D stream.

    Args:
        path: The file, an integer array.
        sequences: How many; ``None`` takes all whole ones.
        length: Tokens of one sequence; must be the row length of a 2-D array.

    Returns:
        int32 ``(sequences, length)``.

    Raises:
        InputNotFoundError: If there is no such file.
        TextError: If it is not such an array, or gives too little.

    Memory: What is returned; the file is mapped.
    """
    array = _open(path)
    if array.ndim == 1:
        rows = array[: array.size // length * length].reshape(-1, length)
    elif array.shape[1] == length:
        rows = array
    else:
        msg = (
            f"the sequences in {path} have {array.shape[1]} tokens, {length} were asked for; use --length "
            f"{array.shape[1]}"
        )
        raise TextError(msg)
    if not rows.size:
        msg = f"{path} holds {array.size} tokens, one window needs {length}; give more or a smaller --length"
        raise TextError(msg)
    if sequences is not None and sequences > len(rows):
        msg = (
            f"{path} gives {len(rows)} sequences of {length} tokens, {sequences} were asked for; ask for "
            "fewer"
        )
        raise TextError(msg)
    wanted = np.asarray(rows[:sequences])
    if wanted.min() < 0 or wanted.max() > _MAX_ID:
        msg = f"{path} holds ids from {wanted.min()} to {wanted.max()}; token ids must be from 0 to {_MAX_ID}"
        raise TextError(msg)
    return np.array(wanted, dtype=np.int32)


def _open(path: Path) -> npt.NDArray[np.integer]:
    if path.is_dir():
        msg = f"{path} is not a readable .npy file (it is a folder); name one file"
        raise TextError(msg)
    try:
        with open_input(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except InputNotFoundError as error:
        msg = f"there is no file of token ids {path}; check the path"
        raise InputNotFoundError(msg) from error
    except RequestError as error:
        raise TextError(str(error)) from error
    except GhoststreamError:
        raise
    # numpy evaluates the header of the file as Python data: there is little that damage cannot make it raise.
    except Exception as error:
        msg = f"{path} is not a readable .npy file ({str(error)[:200]}); write it with numpy.save"
        raise TextError(msg) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in {1, 2}:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        msg = f"{path} holds {found}; token ids are one integer array, (sequences, length) or (tokens,)"
        raise TextError(msg)
    return array
