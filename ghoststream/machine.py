"""What this machine has free: memory of host and accelerator, disk, processors. Everybody asks here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

_MEMBERSHIP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# Where the memory controller is mounted, its limit, its use, and the pages of files that are given back.
_VERSION_2 = ("", "memory.max", "memory.current", ("inactive_file", "active_file"))
_VERSION_1 = (
    "memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def free_host_memory(membership: Path = _MEMBERSHIP, groups: Path = _GROUPS) -> int:
    """Return the bytes that this process may still take: what is available, or less in a control group.

    Args:
        membership: Where the system lists the control groups of this process.
        groups: Where control groups are mounted.
    """
    return min([int(psutil.virtual_memory().available), *_left_in_groups(membership, groups)])


def free_device_memory(device: torch.device) -> int | None:
    """Return the bytes of an accelerator that this process may still take; ``None`` for the CPU.

    Memory that torch's allocator keeps after use, for what comes next, counts as free.
    """
    if device.type != "cuda":
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def idle_page_locked_memory(device: torch.device) -> int:
    """Return the bytes of page-locked host memory that torch keeps for what comes next; 0 without a card.

    The system counts them as taken, and a pass takes them again.
    """
    if device.type != "cuda":
        return 0
    import torch

    kept = torch.cuda.host_memory_stats()
    names = ("allocated_bytes.current", "active_bytes.current")
    return int(kept[names[0]]) - int(kept[names[1]]) if all(name in kept for name in names) else 0


def numbered(device: torch.device) -> torch.device:
    """Return a device as tensors name it: ``cuda`` is the ``cuda:N`` that is current in this thread.

    Without a number it would equal the device of no tensor, and another one in threads started later.
    """
    import torch

    if device.type != "cuda":
        return torch.device(device.type)
    # torch says that an index is always a number; that of "cuda" is None.
    has_number = str(device) != "cuda"
    return device if has_number else torch.device("cuda", torch.cuda.current_device())


def may_have_accelerator() -> bool:
    """Say whether the system shows a device that torch might call CUDA, without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(
        Path("/dev", name).exists() for name in ("kfd", "dxg")
    )


def free_disk(path: Path) -> int:
    """Return the bytes free for this user where ``path`` is, or would be once it is made."""
    return shutil.disk_usage(existing_place(path)).free


def existing_place(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def multiplies_bfloat16(processors: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Say whether the processor has instructions for products of bfloat16; None where that is not known.

    Without them torch computes such products element by element: on two cores with AVX2 alone, 8 against 65
    GFLOP a second in float32.
    """
    try:
        lines = processors.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags[0])) if flags else None


def _left_in_groups(membership: Path, groups: Path) -> Iterator[int]:
    """Yield what each control group of this process leaves: every group above one limits it too."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount, limit, used, cached = _VERSION_1 if controllers else _VERSION_2
        # In a container the path may be the host's: what is not here is skipped, up to the container's group.
        group = groups / mount / path.lstrip("/")
        for folder in (group, *group.parents):
            left = _left_in_group(folder, limit, used, cached)
            if left is not None:
                yield left
            if folder == groups / mount:
                break


def _left_in_group(folder: Path, limit: str, used: str, cached: tuple[str, ...]) -> int | None:
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        taken = int((folder / used).read_text(encoding="ascii"))
        stat = dict(
            line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        )
        given_back = sum(int(stat.get(name, 0)) for name in cached)
        return None if most == "max" else max(0, int(most) - taken + given_back)
    except (OSError, ValueError):
        return None
