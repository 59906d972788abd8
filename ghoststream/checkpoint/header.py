"""What the header of a safetensors file says: every tensor's dtype, shape and place.

The safetensors library parses and checks it: what it refuses is refused here, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ghoststream.errors import CheckpointError, MachineError, RequestError
from ghoststream.files import open_input, system_error

if TYPE_CHECKING:
    import torch

_PREFIX_BYTES = 8
# What the library says of a file that is shorter, or longer, than its header asks for.
_NOT_COVERED = "file not fully covered"

BITS: Mapping[str, int] = MappingProxyType(
    {
        "F64": 64,
        "F32": 32,
        "F16": 16,
        "BF16": 16,
        "F8_E4M3": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2": 8,
        "F8_E5M2FNUZ": 8,
        "F8_E8M0": 8,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F4": 4,
        "C64": 64,
        "I64": 64,
        "I32": 32,
        "I16": 16,
        "I8": 8,
        "U64": 64,
        "U32": 32,
        "U16": 16,
        "U8": 8,
        "BOOL": 8,
    }
)
"""Bits of an element, by the names of safetensors headers: all that the library knows."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` and ``n_bytes`` are absolute byte positions in the shard file."""

    name: str
    shard: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            CheckpointError: If torch here has no such dtype.
        """
        # Not at the top: what reads headers only must not wait for torch.
        from ghoststream.checkpoint.dtypes import DTYPES

        if self.dtype_name not in DTYPES:
            msg = f"tensor {self.name} in {self.shard} has dtype {self.dtype_name}, which cannot be read here"
            raise CheckpointError(msg)
        return DTYPES[self.dtype_name]


def tensor_bytes(dtype_name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor."""
    return prod(shape) * BITS[dtype_name] // 8


def read_header(path: Path) -> list[TensorEntry]:
    """Read one safetensors header, in the order in which the tensors lie in the file.

    Raises:
        CheckpointError: If the file is missing, or safetensors refuses it.
    """
    entries: list[TensorEntry] = []
    with _opened(path) as file:
        with path.open("rb") as raw:
            offset = _PREFIX_BYTES + int.from_bytes(raw.read(_PREFIX_BYTES), "little")
        # The library has checked that tensors follow each other without a gap, up to the end of the file.
        for name in file.offset_keys():
            described = file.get_slice(name)
            dtype, shape = str(described.get_dtype()), tuple(described.get_shape())
            if dtype not in BITS:
                msg = f"{path}: tensor {name} has dtype {dtype}, which this version does not know; update it"
                raise CheckpointError(msg)
            n_bytes = tensor_bytes(dtype, shape)
            entries.append(TensorEntry(name, path.name, dtype, shape, offset, n_bytes))
            offset += n_bytes
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """Return the ``__metadata__`` strings of a safetensors file.

    Raises:
        CheckpointError: If the file is missing, or safetensors refuses it.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    # Not at the top: most commands read no header before they do other work.
    from safetensors import SafetensorError, safe_open

    try:
        _require_file(path)
        # The library calls a file missing that may not be read.
        with open_input(path), safe_open(path, framework="np") as file:
            yield file
    except FileNotFoundError:
        msg = f"shard {path.name} is missing from {path.parent}; download or copy it again"
        raise CheckpointError(msg) from None
    except SafetensorError as error:
        reason = str(error)
        if _NOT_COVERED in reason:
            msg = (
                f"{path} is truncated, or longer than its header says (safetensors: {reason}); download or "
                "copy this shard again"
            )
        else:
            msg = f"{path} is not a complete safetensors file ({reason}); download or copy it again"
        raise CheckpointError(msg) from error
    except CheckpointError:
        raise
    except (RequestError, MachineError):
        raise
    except OSError as error:
        said = system_error(error, path, doing="read")
        msg = f"{path} cannot be read ({error}); check the disk, or copy the shard again"
        raise (said or CheckpointError(msg)) from error


def _require_file(path: Path) -> None:
    """Refuse a folder, and what might wait for ever when it is opened, such as a pipe."""
    if path.exists() and not path.is_file():
        msg = f"{path} is not a file, a shard of a checkpoint was expected there; copy the shard again"
        raise CheckpointError(msg)
