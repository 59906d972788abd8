"""The pages are a site: it builds without a warning, has every page, and asks nobody else for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ghoststream

pytestmark = pytest.mark.integration
pytest.importorskip("mkdocs", reason="the extra docs (mkdocs-material, mkdocstrings) is not installed")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # A link that leads nowhere, an anchor that is not there and a page outside the navigation are warnings.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_row_of_the_index_is_in_the_navigation(site: Path) -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    html = (site / "index.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'href="([^"#]+)" class="md-nav__link', html))
    for target in re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", index, flags=re.MULTILINE):
        page = re.sub(r"README\.md$", "index.md", target.removeprefix("../"))
        assert page.replace(".md", ".html") in shown, target
    assert "readme.html" in shown


def test_the_reference_has_every_public_name(site: Path) -> None:
    html = (site / "api.html").read_text(encoding="utf-8")
    headings = set(re.findall(r'<h3 id="([\w.]+)" class="doc doc-heading"', html))
    assert {name.rpartition(".")[2] for name in headings} == set(ghoststream.__all__)
    assert ":class:" not in html


def test_pages_ask_nobody_else_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', html)
        loaded += re.findall(r'<link[^>]* rel="(?:stylesheet|preconnect|icon)"[^>]* href="([^"]+)"', html)
        loaded += re.findall(r'<link[^>]* href="([^"]+)"[^>]* rel="(?:stylesheet|preconnect|icon)"', html)
        assert not [one for one in loaded if "//" in one], page.name


def test_what_leads_out_of_the_folder_leads_to_pages_of_the_site(site: Path) -> None:
    overview = (site / "readme.html").read_text(encoding="utf-8")
    assert 'href="settings.html#stopped-and-run-again"' in overview
    assert 'src="images/recover.svg"' in overview
    assert 'href="../settings.html' in (site / "decisions" / "0012-copying-counts-as-much.html").read_text()
    assert 'href="../readme.html' not in (site / "index.html").read_text(encoding="utf-8")
