"""The pages name what there is: links lead somewhere, made pages are up to date."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import click
import pytest

from ghoststream.cli import main

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / name / "README.md" for name in ("benchmarks", "examples", "pipelines")),
        *DOCS.rglob("*.md"),
    ]
)
COLUMNS = 110


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _script(path: Path) -> dict[str, Any]:
    return runpy.run_path(str(path))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            assert not anchor or anchor in _anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_lines_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    # A row of a table is one line, and a long address cannot be broken.
    long = [
        line for line in lines if len(line) > COLUMNS and not line.lstrip().startswith("|") and " " in line
    ]
    assert not [line for line in long if "http" not in line and "](" not in line]


def test_the_index_has_every_page() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (DOCS / "index.md").read_text(encoding="utf-8"))
    assert {(DOCS / link).resolve() for link in links} == {*PAGES, *DOCS.rglob("*.md")} - {DOCS / "index.md"}


def test_the_same_commands_go_on_wherever_that_is_said() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8").partition("## Stopped and run again")[2]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", text.partition("\n## ")[0], flags=re.MULTILINE)
    kept = [names for names, what in rows if not what.startswith("nothing")]
    going_on = {name for names in kept for name in re.findall(r"`(\w+)", names)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.search(r"hub id\. ([^.]*) go on where", readme)
    assert told is not None
    assert set(re.findall(r"`(\w+)`", told[1])) == going_on
    assert "explore" in going_on


def test_the_options_are_those_that_there_are() -> None:
    made = _script(DOCS / "make_options.py")["page"]()
    assert (DOCS / "options.md").read_text(encoding="utf-8") == made, "run python docs/make_options.py"


def test_the_page_of_options_says_which_commands_have_them() -> None:
    sections = (DOCS / "options.md").read_text(encoding="utf-8").split("\n## ")
    told: dict[str, set[str]] = {}
    for section in sections:
        having = re.search(r"^- Commands: ((?:.|\n  )*)$", section, flags=re.MULTILINE)
        for option, text in re.findall(r"^\| `(--[a-z-]+)` \|.*\| (.*) \|$", section, flags=re.MULTILINE):
            assert having is not None
            without = re.search(r" Not of ([^.;]*)", text)
            beside = re.search(r"(?: Also|; also) of ([^.;]*)", text)
            every, less, more = (
                set(re.findall(r"`(\w+)`", one[1] if one else "")) for one in (having, without, beside)
            )
            told.setdefault(option, set()).update(every - less | more)
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in main.list_commands(context)}
    options = {
        name: {option for one in command.params for option in one.opts}
        for name, command in commands.items()
        if command is not None
    }
    assert len(told) > 50
    assert told == {one: {name for name, own in options.items() if one in own} for one in told}


@pytest.mark.parametrize(
    "name",
    [
        "tokens",
        *(
            pytest.param(name, marks=pytest.mark.soak)
            for name in ("default", "stages", "one_gpu_needs", "one_gpu_stages")
        ),
    ],
)
def test_the_tables_of_estimates_are_what_the_estimate_says(name: str) -> None:
    script = _script(DOCS / "make_scaling.py")
    pages = "".join(path.read_text(encoding="utf-8") for path in script["PAGES"])
    assert script["TABLES"][name]() in pages, "run python docs/make_scaling.py"


def test_the_picture_of_the_readme_is_that_of_its_table() -> None:
    script = _script(ROOT / "benchmarks" / "readme_picture.py")
    drawn = script["picture"](script["gaps"]((ROOT / "README.md").read_text(encoding="utf-8")))
    assert script["PICTURE"].read_text(encoding="utf-8") == drawn, "run python benchmarks/readme_picture.py"


def test_the_readme_has_every_room_and_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    tree = text[text.index("    ghoststream/\n") :]
    named = set(re.findall(r"^      ([a-z_]+(?:/|\.py))", tree, flags=re.MULTILINE))
    package = ROOT / "ghoststream"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert named == rooms | {path.name for path in package.glob("[a-z]*.py")}
