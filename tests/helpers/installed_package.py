"""Packages as pip would leave them, and commands that run where they are installed."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers.command_bench import REPOSITORY
from tests.helpers.forking import ForkServer, Outcome


def install_package(folder: Path, name: str, code: str, entry_points: str) -> Path:
    """Put a package of one module where Python finds it once the folder is on its path; return the folder.

    Args:
        folder: Stands for site-packages.
        name: Of the package and of its module.
        code: Content of the module.
        entry_points: What ``entry_points.txt`` says.
    """
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)
    return folder


def with_packages(folder: Path) -> dict[str, str]:
    """Return the environment of a process in which the packages of a folder are installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(folder)])}


def run_with(warm: ForkServer, folder: Path, *arguments: object) -> Outcome:
    """Run ghoststream in a process of its own, with the packages in a folder installed."""
    code = "import sys\nsys.path.append(sys.argv.pop(1))\nfrom ghoststream.__main__ import run\nrun()"
    return warm.python(code, folder, *arguments)
