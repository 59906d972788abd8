"""Files that survive a kill: atomic writes, digests, locks, staging folders, checksums and disk space."""

from __future__ import annotations

from ghoststream.files.atomic import atomic_write_bytes, atomic_write_json, fsync_folder, fsync_path
from ghoststream.files.digests import bytes_digest, file_digest, format_digest
from ghoststream.files.json_data import canonical_json, differences, json_digest, read_json
from ghoststream.files.locks import FileLock, FolderLock
from ghoststream.files.space import (
    disk_errors,
    format_bytes,
    require_free_space,
    require_writable,
)
from ghoststream.files.staging import StagingFolder
from ghoststream.files.sums import SUMS_NAME, missing_files, verify_sums, write_sums

__all__ = [
    "SUMS_NAME",
    "FileLock",
    "FolderLock",
    "StagingFolder",
    "atomic_write_bytes",
    "atomic_write_json",
    "bytes_digest",
    "canonical_json",
    "differences",
    "disk_errors",
    "file_digest",
    "format_bytes",
    "format_digest",
    "fsync_folder",
    "fsync_path",
    "json_digest",
    "missing_files",
    "read_json",
    "require_free_space",
    "require_writable",
    "verify_sums",
    "write_sums",
]
