"""The README of the benchmarks names every script, and every script that is named is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.unit


def test_the_readme_has_a_row_for_every_script() -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in BENCHMARKS.glob("bench_*.py")}
    assert set(re.findall(r"^\| `(bench_\w+\.py)` \|", readme, flags=re.MULTILINE)) == scripts
    assert scripts <= set(re.findall(r"python benchmarks/(bench_\w+\.py)", readme))


def test_make_bench_and_the_docs_name_scripts_that_are_there() -> None:
    named = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        named |= set(re.findall(r"benchmarks/(\w+\.py)", page.read_text(encoding="utf-8")))
    target = re.search(r"^bench:.*\n\t.*for name in ([\w ]+);", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target is not None
    named |= {f"bench_{name}.py" for name in target[1].split()}
    assert [name for name in sorted(named) if not (BENCHMARKS / name).is_file()] == []


def test_no_file_is_long() -> None:
    assert [path.name for path in BENCHMARKS.rglob("*.py") if len(path.read_text().splitlines()) > 300] == []
