"""Files that survive a kill: atomic writes, seals, locks, work folders, checksums and disk space."""

from __future__ import annotations

from ghoststream.files.atomic import (
    atomic_write_bytes,
    atomic_write_json,
    fsync_folder,
    fsync_path,
    replacing,
    write_all,
)
from ghoststream.files.digests import bytes_digest, file_digest, format_digest, short_digest
from ghoststream.files.inputs import names_file, open_input, read_input, require_path, require_readable_kind
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
from ghoststream.files.seals import is_sealed, read_kept, read_sealed_json, sealed, unseal, write_sealed_json
from ghoststream.files.space import (
    disk_errors,
    format_bytes,
    require_free_space,
    require_writable,
)
from ghoststream.files.staging import JOURNAL_NAME, StagingFolder
from ghoststream.files.sums import SUMS_NAME, verify_sums, write_sums
from ghoststream.files.system_errors import system_error, system_errors
from ghoststream.files.work import WorkFolder

__all__ = [
    "JOURNAL_NAME",
    "SUMS_NAME",
    "FileLock",
    "FolderLock",
    "StagingFolder",
    "WorkFolder",
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
    "is_sealed",
    "json_digest",
    "names_file",
    "open_input",
    "parse_json",
    "parts_of",
    "read_input",
    "read_json",
    "read_json_object",
    "read_kept",
    "read_sealed_json",
    "replacing",
    "require_free_space",
    "require_path",
    "require_readable_kind",
    "require_writable",
    "sealed",
    "short_digest",
    "system_error",
    "system_errors",
    "unseal",
    "verify_sums",
    "write_all",
    "write_sealed_json",
    "write_sums",
]
