"""Counters and limits of Linux: bytes read, the page cache, memory and disk rate of a group of processes.

Standard library only, so that rivals can use it from any environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_BLOCK_BYTES = 4 * 2**20


def io_counters() -> dict[str, int]:
    """Return bytes of this process: ``rchar`` (by read calls), ``read_bytes`` and ``write_bytes`` (disk)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counters = dict(line.split(": ") for line in lines)
    return {name: int(counters[name]) for name in ("rchar", "read_bytes", "write_bytes")}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files below a folder."""
    return sorted(path for path in folder.rglob("*.safetensors") if path.is_file())


def evict(files: Sequence[Path]) -> None:
    """Drop files from the page cache; pages that a process has mapped stay."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(files: Sequence[Path]) -> None:
    """Bring files into the page cache."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached_bytes(files: Sequence[Path]) -> int | None:
    """Return the bytes of files in the page cache; ``None`` where util-linux's fincore is missing."""
    if not files or shutil.which("fincore") is None:
        return None
    command = ["fincore", "--noheadings", "--bytes", "--output", "RES", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(line) for line in done.stdout.split())


def limits_reason() -> str | None:
    """Say why a limit cannot be set here; ``None`` where it can."""
    if not (_GROUPS / "memory" / "memory.limit_in_bytes").exists():
        return "needs control groups version 1; on version 2 run the script under systemd-run -p MemoryMax="
    return None if os.geteuid() == 0 else "needs root"


@contextmanager
def limited(folder: Path, memory: int | None, read_rate: int | None) -> Iterator[list[str]]:
    """Make groups with limits; gives the words to put before a command that shall run within them.

    Args:
        folder: The files to read lie on its disk.
        memory: Bytes of memory and page cache together.
        read_rate: Bytes a second from that disk.
    """
    settings = {}
    if memory:
        settings["memory"] = {"memory.limit_in_bytes": str(memory)}
    if read_rate:
        settings["blkio"] = {"blkio.throttle.read_bps_device": f"{_whole_disk(folder)} {read_rate}"}
    made: list[Path] = []
    try:
        for controller, files in settings.items():
            group = _own_group(controller) / f"ghoststream-bench-{os.getpid()}"
            group.mkdir()
            made.append(group)
            for name, value in files.items():
                (group / name).write_text(value)
        joins = "".join(f"echo $$ > '{group}/cgroup.procs' && " for group in made)
        yield ["sh", "-c", f'{joins}exec "$@"', "sh"] if made else []
    finally:
        for group in made:
            _remove(group)


def _own_group(controller: str) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, place = line.split(":", 2)
        if controller in names.split(","):
            return _GROUPS / controller / place.lstrip("/")
    msg = f"no group of the {controller} controller"
    raise OSError(msg)


def _remove(group: Path) -> None:
    """Remove a group; the kernel lets go of its last process a moment after that ended."""
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return


def _whole_disk(folder: Path) -> str:
    """Return ``major:minor`` of the disk that a folder lies on; partitions cannot be throttled."""
    number = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (block / "partition").exists():
        block = block.parent
    return (block / "dev").read_text().strip()
