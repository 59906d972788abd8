"""Hooks of mkdocs: the pages of this folder become a site, and stay pages that a forge shows.

- The navigation is made of the tables of ``docs/index.md``, so that there is one list of pages.
- Pages that it names outside this folder become pages of the site. Other files that pages link to outside
  this folder are copied into it, at ``source/``.
- The reference of the public names is a page of the site alone.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
INDEX = DOCS / "index.md"
API = "api.md"
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_config(config: Any) -> Any:
    """Make the navigation of the index: a section for each of its headings, a page for each of its rows."""
    config.nav = [{"All pages": INDEX.name}, {"Overview": _page(ROOT / "README.md")}]
    for part in INDEX.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        rows = re.findall(r"^\| \[([^]]+)\]\(([^)]+)\) \|(.*)\|$", text, flags=re.MULTILINE)
        pages = [{_title(name, about): _page((DOCS / target).resolve())} for name, target, about in rows]
        config.nav.append({title: pages})
    config.nav.append({"Python reference": API})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside this folder, the files that pages link to, and the reference."""
    outside = {path for path in _linked(INDEX) if path.suffix == ".md" and not path.is_relative_to(DOCS)}
    for path in sorted(outside):
        files.append(File.generated(config, _page(path), abs_src_path=str(path)))
    others = {
        target
        for page in [*DOCS.rglob("*.md"), *outside]
        for target in _linked(page)
        if target.is_file() and not target.is_relative_to(DOCS) and target not in outside
    }
    for path in sorted(others):
        files.append(File.generated(config, f"source/{path.relative_to(ROOT)}", abs_src_path=str(path)))
    files.append(File.generated(config, API, content=_reference()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that lead out of this folder to where their files are on the site."""
    del config
    if page.file.src_uri == API:
        return markdown
    here, known = Path(page.file.abs_src_path).resolve(), {Path(f.abs_src_path or "x"): f for f in files}

    def turned(link: re.Match[str]) -> str:
        found = known.get((here.parent / link[2]).resolve())
        if found is None:
            return link[0]
        target = posixpath.relpath(found.src_uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{link[1]}{target}{link[3] or ''}{link[4]}"

    return _LINK.sub(turned, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Write what docstrings say in the roles of Sphinx as code."""
    del config, files
    if page.file.src_uri != API:
        return html
    html = re.sub(r":\w+:<code>~(?:\w+\.)*(\w+)</code>", r"<code>\1</code>", html)
    return re.sub(r":(?:class|func|meth|mod|data|attr):(<code>)", r"\1", html)


def _title(name: str, about: str) -> str:
    """Return a row's title: decisions are known by number, and say what was decided."""
    return f"{name} {about.strip().replace('`', '')}" if name.isdigit() else name


def _page(path: Path) -> str:
    """Return the place of a page on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    # A README is the index of its folder to mkdocs, and the site has an index.
    name = path.relative_to(ROOT).as_posix()
    return "readme.md" if name == "README.md" else name


def _linked(page: Path) -> set[Path]:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    return {path for _, target, *_ in links if (path := (page.parent / target).resolve()).exists()}


def _reference() -> str:
    """Return the page of the public names, in the order in which the package lists them."""
    tree = ast.parse((ROOT / "ghoststream" / "__init__.py").read_text(encoding="utf-8"))
    names: list[str] = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    lines = ["# Python reference", "", "Everything here is imported from `ghoststream`."]
    lines += ["Fields of option groups are those of [options](options.md).", ""]
    for title, group in (
        ("Functions", [name for name in names if name[0].islower()]),
        ("Classes", [name for name in names if name[0].isupper()]),
    ):
        lines += [f"## {title}", "", *(f"::: ghoststream.{name}\n" for name in group)]
    return "\n".join(lines)
