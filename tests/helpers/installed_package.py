"""Packages as pip would leave them, and commands that run where they are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.command_bench import REPOSITORY


def install_package(
    folder: Path, name: str, code: str, entry_points: Mapping[str, Mapping[str, str]]
) -> None:
    """Put a package of one module where Python finds it once the folder is on its path.

    Args:
        folder: Stands for site-packages.
        name: Of the package and of its module.
        code: Content of the module.
        entry_points: For each group of entry points the objects of the module by name.
    """
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    sections = [
        "\n".join([f"[{group}]", *(f"{entry} = {name}:{value}" for entry, value in entries.items())])
        for group, entries in entry_points.items()
    ]
    (about / "entry_points.txt").write_text("\n\n".join(sections) + "\n")


def run_with(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ghoststream in a process of its own, with the packages in a folder installed."""
    path = os.pathsep.join([str(folder), str(REPOSITORY)])
    return subprocess.run(
        [sys.executable, "-m", "ghoststream", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
