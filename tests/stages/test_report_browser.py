"""A page in a real browser: it complains of nothing, asks for nothing, fits the screen, and can be read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from ghoststream.stages.reporting.report import write_report
from tests.helpers.browser import PROGRAM, Tab, chromium
from tests.helpers.reported import write_everything

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine"),
]
_LEAST_CONTRAST = 4.5
_OPEN = "document.querySelectorAll('details').forEach(one => one.open = true)"
# Contrast of every text that is shown, by the formula of WCAG 2 (relative luminance).
_CONTRASTS = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if ((parts(colour)[3] ?? 1) > 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), own = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(own), light(ground(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text.slice(0, 40), own]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()
"""


async def _look(address: str, page: Path) -> tuple[list[Any], dict[str, Any]]:
    tab = await Tab.open(address)
    await tab.visit(page.as_uri())
    await tab.evaluate(_OPEN)
    found: dict[str, Any] = {}
    for width in (400, 1600):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await tab.send("Emulation.setDeviceMetricsOverride", **size)
        found[f"width at {width}"] = await tab.evaluate("document.documentElement.scrollWidth")
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            await tab.send("Emulation.setEmulatedMedia", features=[feature])
            found[f"{scheme} at {width}"] = await tab.evaluate(_CONTRASTS)
            ground = "getComputedStyle(document.body).backgroundColor"
            found[f"ground, {scheme}"] = await tab.evaluate(ground)
    return tab.events, found


def test_a_page_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report(
        write_everything(tmp_path, "a <run> with a name that is as long as names of runs can be"), page
    )
    with chromium(tmp_path) as address:
        events, found = asyncio.run(_look(address, page))
    names = [name for name, _ in events]
    assert "Page.loadEventFired" in names
    assert not {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"} & set(names)
    asked = [told["request"]["url"] for name, told in events if name == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert found["ground, light"] != found["ground, dark"]
    for width in (400, 1600):
        assert found[f"width at {width}"] <= width
        for scheme in ("light", "dark"):
            contrasts = found[f"{scheme} at {width}"]
            assert len(contrasts) > 200
            assert contrasts[0][0] >= _LEAST_CONTRAST, contrasts[:5]
