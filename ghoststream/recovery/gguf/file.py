"""Writing a GGUF as a stream: its header first, then one tensor after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from ghoststream.checkpoint.contents import ContentCheck, content_digest
from ghoststream.checkpoint.dtypes import DTYPES
from ghoststream.checkpoint.pieces import make_room
from ghoststream.checkpoint.writer import TensorSource
from ghoststream.errors import NumericsError
from ghoststream.files import format_digest, replacing, require_free_space, write_all
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recovery.gguf.layout import GgufTensor
from ghoststream.stopping import require_going_on

ALIGNMENT = 32
"""Tensors begin at multiples of it."""
_BLOCK_ELEMENTS = 2**22
"""Numbers of a tensor that are converted at a time: 16 MiB in float32."""
_SCALED = 32
"""Numbers that have a scale together in Q8_0."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What is known of a finished file.

    Attributes:
        digest: Digest of the file, ``sha256:<hex>``.
        tensors: Digest of the bytes of each tensor, ``xxh3_128:<hex>``.
        n_bytes: Bytes of all tensors.
    """

    digest: str
    tensors: dict[str, str]
    n_bytes: int


def stored_type(tensor: GgufTensor, wanted: str) -> str:
    """Return the type in which a tensor is written, where one of its numbers' type is asked for.

    Vectors stay in F32. Rows that Q8_0 cannot divide are in F16. llama.cpp's converter does both.
    """
    if len(tensor.shape) == 1:
        return "F32"
    return "F16" if wanted == "Q8_0" and tensor.shape[-1] % _SCALED else wanted


def stored_bytes(tensor: GgufTensor, wanted: str) -> int:
    """Return the bytes of a tensor in the file."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[stored_type(tensor, wanted)]]
    return int(np.prod(tensor.shape)) // int(block) * int(size)


def write_file(
    path: Path, writer: Any, tensors: Sequence[GgufTensor], wanted: str, progress: Progress | None
) -> WrittenFile:
    """Write a file; it appears whole or not at all.

    Args:
        path: The file.
        writer: A ``gguf.GGUFWriter`` with all keys, and no tensor.
        tensors: The tensors, in their order.
        wanted: Type of the numbers of matrices: ``F32``, ``F16``, ``BF16`` or ``Q8_0``.
        progress: Told the bytes written.

    Raises:
        NumericsError: If a value is NaN or infinite, also in the type that is written.
        CheckpointError: If a tensor of the checkpoint is not what it is known to be.
        BudgetError, DiskFullError: If the disk is too small.

    Memory: the largest tensor as the checkpoint has it, twice where its rows change places, 64 MiB, and what
    :func:`~ghoststream.checkpoint.pieces.make_room` states.
    """
    progress = progress or SilentProgress()
    n_bytes = sum(stored_bytes(tensor, wanted) for tensor in tensors)
    require_free_space(path.parent, n_bytes, "the GGUF")
    header = _header(writer, tensors, wanted)
    progress.start("writing the GGUF", n_bytes, "B")
    whole, digests = hashlib.sha256(header), {}
    with replacing(path, len(header) + n_bytes) as file:
        write_all(file, header)
        for tensor in tensors:
            own, written = xxhash.xxh3_128(), 0
            for block in _converted(tensor, stored_type(tensor, wanted), path):
                write_all(file, block)
                own.update(block)
                whole.update(block)
                written += len(block)
                progress.advance(len(block))
            padding = bytes(-written % ALIGNMENT)
            write_all(file, padding)
            whole.update(padding)
            digests[tensor.name] = content_digest(own)
            require_going_on()
    progress.finish()
    return WrittenFile(format_digest(whole), digests, n_bytes)


def _header(writer: Any, tensors: Sequence[GgufTensor], wanted: str) -> bytes:
    """Return all that is in front of the first tensor."""
    import gguf

    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[stored_type(tensor, wanted)]
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), stored_bytes(tensor, wanted), raw_dtype=kind
        )
    with TemporaryDirectory(prefix="ghoststream-") as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        found = path.read_bytes()
    return found + bytes(-len(found) % ALIGNMENT)


def _converted(tensor: GgufTensor, kind: str, path: Path) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in the type that is written, some rows at a time."""
    import gguf

    if tensor.source is None:
        values = torch.full(tensor.shape, tensor.value)
    else:
        values = _read(tensor.source, path)
        values = values if tensor.change is None else tensor.change(values)
    width = tensor.shape[-1]
    rows = values.reshape(-1, width)
    step = max(1, _BLOCK_ELEMENTS // width)
    for first in range(0, len(rows), step):
        block: npt.NDArray[np.float32] = rows[first : first + step].float().contiguous().numpy()
        if kind in {"F16", "Q8_0"}:
            _require_range(block, tensor.name, kind)
        made = gguf.quantize(block, gguf.GGMLQuantizationType[kind])
        yield memoryview(np.ascontiguousarray(made).reshape(-1).view(np.uint8))


def _read(source: TensorSource, path: Path) -> torch.Tensor:
    """Read a tensor whole, in the dtype of the checkpoint."""
    whole = bytearray(source.n_bytes)
    done = 0
    check = ContentCheck(source.name, source.dtype_name, path)
    for chunk in source.chunks(make_room()):
        check.update(chunk)
        whole[done : done + len(chunk)] = chunk
        done += len(chunk)
    return torch.frombuffer(whole, dtype=DTYPES[source.dtype_name]).reshape(source.shape)


def _require_range(block: npt.NDArray[np.float32], name: str, kind: str) -> None:
    # Q8_0 keeps its scales, a 127th of the largest number, in half precision.
    largest = float(np.finfo(np.float16).max) * (127.0 if kind == "Q8_0" else 1.0)
    if float(np.abs(block).max(initial=0.0)) > largest:
        msg = f"{name} has values beyond the range of {kind}; give --gguf-type bf16 or f32"
        raise NumericsError(msg)
