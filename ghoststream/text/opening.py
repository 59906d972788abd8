"""Files of text opened as bytes: plain or compressed, and what can be wrong with them said by their name."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from ghoststream.errors import GhoststreamError, InputNotFoundError, RequestError, TextError
from ghoststream.files import open_input, system_error

_MAGIC = {
    b"\x93NUMPY": "a numpy array, not text; token ids are given as ids:FILE",
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
    b"\x1f\x8b": "compressed by gzip; give it a name that ends in .gz",
    b"BZh": "compressed by bzip2; give it a name that ends in .bz2",
    b"\xfd7zXZ\x00": "compressed by xz; give it a name that ends in .xz",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; give it a name that ends in .zst",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"%PDF": "a PDF; save its text as a file",
    b"\xff\xfe": "UTF-16; convert it to UTF-8",
    b"\xfe\xff": "UTF-16; convert it to UTF-8",
}
"""What files that are not text begin with, and what to do with them."""


def require_file(path: Path, what: str) -> None:
    """Check that there is a regular file: a pipe or a device would make its reader wait.

    Args:
        path: The file.
        what: What it holds, for messages (``"text"``).

    Raises:
        InputNotFoundError: If there is nothing.
        TextError: If it is a folder, a pipe or a device, or the path cannot be followed.
    """
    with reading(path):
        if not path.exists():
            msg = f"there is no {what} file {path}; check the path"
            raise InputNotFoundError(msg)
        if path.is_dir():
            msg = f"{path} is a folder, not a {what} file; name one file"
            raise TextError(msg)
        if not path.is_file():
            msg = f"{path} is a pipe or a device, which cannot be read twice; write it to a file first"
            raise TextError(msg)


def plain_suffix(path: Path) -> str:
    """Return the suffix in small letters, that of the compression left out: ``.jsonl`` of ``a.jsonl.gz``."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in _UNPACKERS else suffix


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked if its suffix says that it is compressed.

    Raises:
        InputNotFoundError: If it does not exist.
        TextError: If it is no regular file, is damaged, may not be read, or needs a package that is missing.
        MachineError: If the machine fails to read it.
    """
    require_file(path, "text")
    unpacked = _UNPACKERS.get(path.suffix.lower(), nullcontext)
    with reading(path), open_input(path) as raw, unpacked(raw) as file:
        yield file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into an error that names it.

    Raises:
        InputNotFoundError: If it does not exist.
        TextError: If it is not what its suffix says, or may not be read.
        MachineError: If the machine fails to read it.
    """
    try:
        yield
    except GhoststreamError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise damaged(path, error) from error
    except FileNotFoundError as error:
        msg = f"there is no file {path}; check the path"
        raise InputNotFoundError(msg) from error
    except OSError as error:
        said = system_error(error, path, doing="read")
        if said is None:
            # gzip, bz2 and pyarrow say so of data that they cannot unpack.
            raise damaged(path, error) from error
        raise TextError(str(said)) if isinstance(said, RequestError) else said from error


def decode(data: bytes, place: str) -> str:
    """Decode UTF-8.

    Raises:
        TextError: If it is something else; says what, where that can be told.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        known = next((what for magic, what in _MAGIC.items() if data.startswith(magic)), None)
        msg = f"{place} is {known}" if known else _not_utf8(data, place, error.start)
        raise TextError(msg) from error


def require_package(name: str, place: object) -> Any:
    """Import a package that only some files need.

    Raises:
        TextError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        msg = (
            f"{place} needs the package {package}, which is not installed; install ghoststream[text], or "
            "give the text as .txt or .jsonl"
        )
        raise TextError(msg) from error


def damaged(path: Path, error: Exception) -> TextError:
    """Return the error of a file that is not what its suffix says."""
    kind = _KINDS.get(path.suffix.lower(), "text")
    return TextError(f"{path} is not a whole {kind} file ({error}); get it again")


def _not_utf8(data: bytes, place: str, start: int) -> str:
    return f"{place} is not UTF-8 (byte {start} is 0x{data[start]:02x}); convert it to UTF-8"


def _zstandard(raw: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(require_package("pyarrow", raw.name).CompressedInputStream(raw, "zstd"))


_UNPACKERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".lzma": lzma.LZMAFile,
    ".zst": _zstandard,
}
_KINDS = {
    ".gz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "Zstandard",
    ".parquet": "Parquet",
}
