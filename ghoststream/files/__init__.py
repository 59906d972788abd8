"""Files that survive a kill: atomic writes, digests, locks, staging folders, checksums and disk space."""

from __future__ import annotations

from ghoststream.files.atomic import atomic_write_bytes, atomic_write_json, fsync_folder, fsync_path
from ghoststream.files.digests import bytes_digest, file_digest, format_digest
from ghoststream.files.inputs import names_file, open_input, read_input, require_readable_kind
from ghoststream.files.json_data import (
    canonical_json,
    canonical_object,
    differences,
    json_digest,
    parse_json,
    parts_of,
    read_json,
    read_json_object,
)
from ghoststream.files.locks import FileLock, FolderLock
from ghoststream.files.space import (
    disk_errors,
    format_bytes,
    require_free_space,
    require_writable,
)
from ghoststream.files.staging import StagingFolder
from ghoststream.files.sums import SUMS_NAME, missing_files, verify_sums, write_sums
from ghoststream.files.system_errors import system_error, system_errors

__all__ = [
    "SUMS_NAME",
    "FileLock",
    "FolderLock",
    "StagingFolder",
    "atomic_write_bytes",
    "atomic_write_json",
    "bytes_digest",
    "canonical_json",
    "canonical_object",
    "differences",
    "disk_errors",
    "file_digest",
    "format_bytes",
    "format_digest",
    "fsync_folder",
    "fsync_path",
    "json_digest",
    "missing_files",
    "names_file",
    "open_input",
    "parse_json",
    "parts_of",
    "read_input",
    "read_json",
    "read_json_object",
    "require_free_space",
    "require_readable_kind",
    "require_writable",
    "system_error",
    "system_errors",
    "verify_sums",
    "write_sums",
]
