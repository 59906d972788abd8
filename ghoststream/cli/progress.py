"""Progress on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ghoststream.cli.output import human_bytes
from ghoststream.progress import human_seconds
from ghoststream.redaction import without_secrets

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from ghoststream.progress import Progress

_SECONDS_BETWEEN_LINES = 10.0
_SHARE_BETWEEN_LINES = 0.1


class LineProgress:
    """Writes a line when a task starts and ends, and in between.

    A line in between comes every 10 %, at most every second, and at least every 10 s.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._task: str | None = None

    def start(self, task: str, total: int, unit: str) -> None:
        """Begin a task."""
        self.finish()
        self._task, self._total, self._unit, self._done = task, total, unit, 0
        self._begun = self._line_at = self._clock()
        self._line_done = 0
        self._write(f"{task}: {self._amount(total)}" if total else task)

    def advance(self, amount: int) -> None:
        """Count, and write a line when it is time for one."""
        if self._task is None:
            return
        self._done += amount
        now = self._clock()
        waited = now - self._line_at
        due = self._total and self._done - self._line_done >= self._total * _SHARE_BETWEEN_LINES
        if self._done < self._total and (waited >= _SECONDS_BETWEEN_LINES or (due and waited >= 1.0)):
            self._line_at, self._line_done = now, self._done
            self._write(self._describe(now))

    def finish(self) -> None:
        """End the task with a line that says how long it took."""
        if self._task is not None:
            seconds = self._clock() - self._begun
            self._write(
                f"{self._task}: {self._amount(self._done)} in {human_seconds(seconds)}{self._rate(seconds)}"
            )
        self._task = None

    def log(self, message: str) -> None:
        """Write the message as a line."""
        self._write(message)

    def _describe(self, now: float) -> str:
        seconds = now - self._begun
        text = f"{self._task}: {self._amount(self._done)}"
        if self._total:
            text += f" of {self._amount(self._total)} ({self._done / self._total:.0%})"
        text += self._rate(seconds)
        if self._total and self._done:
            text += f", {human_seconds(seconds * (self._total - self._done) / self._done)} left"
        return text

    def _amount(self, amount: int) -> str:
        return human_bytes(amount) if self._unit == "B" else f"{amount:,} {self._unit}"

    def _rate(self, seconds: float) -> str:
        if seconds <= 0 or not self._done:
            return ""
        rate = self._done / seconds
        text = human_bytes(int(rate)) if self._unit == "B" else f"{rate:,.3g} {self._unit}"
        return f", {text}/s"

    def _write(self, line: str) -> None:
        print(without_secrets(line), file=self._stream, flush=True)


class BarProgress:
    """Live bars of rich: amount, rate and time left."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def start(self, task: str, total: int, unit: str) -> None:
        """Begin a task with its own bar; the bars of ended tasks stay visible."""
        self.finish()
        self._unit, self._total, self._begun, self._done = unit, total, time.monotonic(), 0
        self._task = self._bars.add_task(task, total=total or None, amount="", rate="")

    def advance(self, amount: int) -> None:
        """Move the bar."""
        if self._task is None:
            return
        self._done += amount
        rate = self._done / max(time.monotonic() - self._begun, 1e-9)
        of = f"/{self._text(self._total)}" if self._total else ""
        self._bars.update(
            self._task,
            advance=amount,
            amount=f"{self._text(self._done)}{of} {'' if self._unit == 'B' else self._unit}".rstrip(),
            rate=f"{self._text(rate)}/s",
        )

    def finish(self) -> None:
        """Stop the bar's clock."""
        if self._task is not None:
            self._bars.stop_task(self._task)
        self._task = None

    def log(self, message: str) -> None:
        """Print the message above the bars."""
        self._bars.console.print(without_secrets(message), highlight=False, markup=False)

    def _text(self, amount: float) -> str:
        if self._unit == "B":
            return human_bytes(int(amount))
        return f"{amount:,}" if isinstance(amount, int) else f"{amount:,.3g}"


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Yield the progress that fits the stream (default stderr): bars on a terminal, lines elsewhere."""
    target = stream if stream is not None else sys.stderr
    if not target.isatty():
        lines = LineProgress(target)
        try:
            yield lines
        finally:
            lines.finish()
        return
    from rich.console import Console

    with _bars(Console(file=target)) as bars:
        live = BarProgress(bars)
        try:
            yield live
        finally:
            live.finish()


def _bars(console: Console) -> RichProgress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
