"""A headless Chromium, spoken to by its DevTools protocol, for tests that look at a page."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tornado.websocket import WebSocketClientConnection, websocket_connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip
_SECONDS = 60.0
PROGRAM = next(filter(None, map(shutil.which, _NAMES)), None)
"""Path of a browser, if this machine has one."""


@contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """Run Chromium (:data:`PROGRAM`) with an empty profile; yields its address. Skips where it fails."""
    assert PROGRAM is not None
    command = [PROGRAM, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield _address(folder / "profile" / "DevToolsActivePort", process)
    finally:
        process.kill()
        process.wait()


def _address(file: Path, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until and process.poll() is None:
        lines = file.read_text().split() if file.is_file() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    pytest.skip("Chromium does not start on this machine")


class Tab:
    """A tab: commands are sent one after the other, and events kept.

    Attributes:
        events: Names and parameters of everything that was told meanwhile.
    """

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self._connection, self._number, self._session = connection, 0, ""
        self.events: list[tuple[str, dict[str, Any]]] = []

    @classmethod
    async def open(cls, address: str) -> Tab:
        """Open a tab, with everything told that goes wrong or asks the network."""
        tab = cls(await websocket_connect(address, max_message_size=2**28))
        target = await tab.send("Target.createTarget", url="about:blank")
        session = await tab.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.send(f"{domain}.enable")
        return tab

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        await self._connection.write_message(
            json.dumps(message | ({"sessionId": self._session} if self._session else {}))
        )
        while True:
            answer = await self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    async def visit(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        await self.send("Page.navigate", url=url)
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            await self._read()

    async def evaluate(self, script: str) -> Any:
        """Return the value of an expression."""
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def _read(self) -> dict[str, Any]:
        text = await asyncio.wait_for(self._connection.read_message(), _SECONDS)
        assert text is not None, "Chromium closed the connection"
        answer: dict[str, Any] = json.loads(text)
        if "method" in answer:
            self.events.append((answer["method"], answer["params"]))
        return answer
