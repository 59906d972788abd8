"""What is free here: told by files of a system that is made up."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ghoststream.machine import (
    existing_place,
    free_device_memory,
    free_disk,
    free_host_memory,
    idle_page_locked_memory,
    multiplies_bfloat16,
    numbered,
    processors,
)
from ghoststream.statistics.engines import default_workers

AVAILABLE = 1000 * 1024
NEW = ("memory.max", "memory.current", "active_file 60000\ninactive_file 40000\n")
OLD = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "active_file 1\ntotal_active_file 60000\ntotal_inactive_file 40000\n",
)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 2,000 kB, half of them available, very few of them free."""
    facts = {"MemTotal": 2000, "MemFree": 10, "MemAvailable": 1000, "Buffers": 0, "Cached": 900, "Shmem": 0}
    facts |= {"Active": 0, "Inactive": 0, "SReclaimable": 0, "Slab": 0}
    (tmp_path / "meminfo").write_text("".join(f"{name}: {kb} kB\n" for name, kb in facts.items()))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))


def free(tmp_path: Path, membership: str) -> int:
    (tmp_path / "cgroup").write_text(membership, encoding="utf-8")
    return free_host_memory(tmp_path / "cgroup", tmp_path / "groups")


def group(folder: Path, files: tuple[str, str, str], most: str, used: int = 300_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit, current, stat = files
    (folder / limit).write_text(f"{most}\n", encoding="ascii")
    (folder / current).write_text(f"{used}\n", encoding="ascii")
    (folder / "memory.stat").write_text(f"anon 200000\n{stat}", encoding="ascii")


def test_available_memory_counts_and_not_free_memory(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path / "none", tmp_path / "none") == AVAILABLE
    assert free(tmp_path, "0::/\n") == AVAILABLE


@pytest.mark.parametrize(
    ("files", "membership", "mount"), [(NEW, "0::/", ""), (OLD, "5:cpu:/x\n4:memory:/", "memory")]
)
def test_a_control_group_leaves_less(
    tmp_path: Path, files: tuple[str, str, str], membership: str, mount: str
) -> None:
    top = tmp_path / "groups" / mount
    group(top, files, "500000")
    assert free(tmp_path, membership) == 500_000 - 300_000 + 100_000, "pages of files are given back"
    group(top, files, "150000")
    assert free(tmp_path, membership) == 0
    # Without a limit: the word of version 2, the largest number of pages of version 1.
    group(top, files, "max" if files is NEW else "9223372036854771712")
    assert free(tmp_path, membership) == AVAILABLE


@pytest.mark.parametrize(
    ("files", "membership", "mount"), [(NEW, "0::/a/b", ""), (OLD, "4:memory:/a/b\n0::/c", "memory")]
)
def test_every_group_above_limits_too(
    tmp_path: Path, files: tuple[str, str, str], membership: str, mount: str
) -> None:
    top = tmp_path / "groups" / mount
    group(top / "a" / "b", files, "900000")
    group(top / "a", files, "600000")
    assert free(tmp_path, membership) == 400_000
    group(top / "a" / "b", files, "350000")
    assert free(tmp_path, membership) == 150_000
    group(top / "other", files, "1")
    assert free(tmp_path, membership) == 150_000, "a group that this process is not in does not count"


def test_a_container_that_sees_its_group_at_the_top(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "memory", OLD, "500000")
    assert free(tmp_path, "4:memory:/docker/0123abcd") == 300_000


def test_damaged_files_are_no_limit(tmp_path: Path) -> None:
    group(tmp_path / "groups", NEW, "plenty")
    assert free(tmp_path, "0::/") == AVAILABLE


def test_as_many_workers_as_available_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert processors() == 64
    assert default_workers(0) == 64
    assert default_workers(AVAILABLE // 20) == 10
    assert default_workers(AVAILABLE) == 1


def test_what_the_allocator_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_device_memory(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 80)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    assert free_device_memory(torch.device("cuda")) == 150


def test_page_locked_memory_that_torch_keeps_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"allocated_bytes.current": 100, "active_bytes.current": 30}
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: kept)
    assert idle_page_locked_memory(torch.device("cpu")) == 0
    assert idle_page_locked_memory(torch.device("cuda", 0)) == 70
    monkeypatch.setattr(torch.cuda, "host_memory_stats", dict)
    assert idle_page_locked_memory(torch.device("cuda", 0)) == 0


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert numbered(torch.device("cuda")) == torch.device("cuda", 1)
    assert numbered(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert numbered(torch.device("cpu", 0)) == torch.device("cpu")


def test_free_disk_of_a_folder_that_does_not_exist_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {tmp_path: 7}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[path]))
    assert free_disk(tmp_path / "a" / "b") == 7
    assert existing_place(tmp_path / "meminfo") == tmp_path / "meminfo"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("processor : 0\n", None),
    ],
)
def test_which_processors_multiply_bfloat16(text: str, expected: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text, encoding="utf-8")
    assert multiplies_bfloat16(path) is expected
    assert multiplies_bfloat16(tmp_path / "nothing") is None
