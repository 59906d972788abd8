"""Numbers, tables and progress as people read them."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from ghoststream.cli.output import human_bytes, print_facts, print_json, print_table
from ghoststream.cli.progress import BarProgress, LineProgress, _bars, show_progress
from ghoststream.progress import Progress, SilentProgress, human_seconds

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023 * 1024, "0.999 MiB"),
        (2**30, "1 GiB"),
    ],
)
def test_bytes(n_bytes: int, text: str) -> None:
    assert human_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.012 s"),
        (2.25, "2.2 s"),
        (42, "42 s"),
        (119.6, "2 min 0 s"),
        (3700, "1 h 1 min"),
        (200_000, "2 d 7 h"),
        (math.inf, "unknown"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_tables_are_plain_lines_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["model", "perplexity"], [["dense", 40.0], ["pruned [x]", None]], title="figures")
    assert capsys.readouterr().out.splitlines() == [
        "figures",
        "model       perplexity",
        "dense               40",
        "pruned [x]           -",
    ]


def test_facts(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts({"layers": 30, "tied": True}, title="model")
    assert capsys.readouterr().out == "model\n  layers  30\n  tied    yes\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": math.nan, "rows": ({"perplexity": math.inf}, 1.5)})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [{"perplexity": None}, 1.5]}


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_ten_percent_or_ten_seconds() -> None:
    stream, clock = io.StringIO(), _Clock()
    progress = LineProgress(stream, clock)
    progress.start("capture", 100, "layers")
    for _ in range(100):
        clock.now += 2.0
        progress.advance(1)
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "capture: 100 layers"
    assert lines[1] == "capture: layer 5 of 100, 0.5 layers/s, 3 min 10 s left"
    assert lines[-1] == "capture: 100 layers in 3 min 20 s, 0.5 layers/s"
    assert len(lines) == 1 + 19 + 1


def test_fast_tasks_write_few_lines() -> None:
    stream, clock = io.StringIO(), _Clock()
    progress = LineProgress(stream, clock)
    progress.start("read", 1000, "B")
    for _ in range(1000):
        clock.now += 0.001
        progress.advance(1)
    progress.log("a message")
    progress.start("next", 0, "files")
    progress.finish()
    progress.finish()
    assert len(stream.getvalue().splitlines()) == 5


def test_progress_without_a_task_is_harmless() -> None:
    progress = LineProgress(io.StringIO())
    progress.advance(3)
    progress.finish()


def test_the_stream_decides_between_lines_and_bars() -> None:
    with show_progress(io.StringIO()) as lines:
        assert isinstance(lines, LineProgress)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with show_progress(terminal) as bars:
        assert isinstance(bars, BarProgress)
        assert isinstance(bars, Progress)
        bars.start("capture", 4, "layers")
        bars.advance(4)
        bars.start("read", 0, "B")
        bars.advance(2048)
        bars.log("kept [this]")
        bars.finish()
    shown = terminal.getvalue()
    assert "kept [this]" in shown
    assert "capture: 4 layers in " in shown
    assert "read: 2 KiB in " in shown


def test_a_live_line_says_where_it_is_and_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr("ghoststream.cli.progress.time.monotonic", clock)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    bars = _bars(console)
    live = BarProgress(bars)
    live.start("streaming layers", 80, "layers")
    clock.now = 6.0
    live.advance(12)
    console.print(bars.get_renderable())
    clock.now += 24.0
    console.print(bars.get_renderable())
    live.start("reading [it]", 4096, "B")
    live.advance(1024)
    console.print(bars.get_renderable())
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
    assert lines[0].endswith("layer 12 of 80, 34 s left")
    assert lines[1].endswith("layer 12 of 80, 10 s left")
    assert lines[2] == "streaming layers: 12 layers in 30 s, 0.4 layers/s"
    assert lines[3].startswith("reading [it]")
    assert lines[3].endswith("1 KiB of 4 KiB, 1.0 s left")


def test_silence_is_a_progress() -> None:
    progress = SilentProgress()
    assert isinstance(progress, Progress)
    progress.start("x", 1, "B")
    progress.advance(1)
    progress.log("y")
    progress.finish()
