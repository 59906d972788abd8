"""Progress on stderr: one live line on a terminal, a plain line now and then elsewhere."""

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
        self._write(f"{task}: {_amount(total, unit)}" if total else task)

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
            self._write(_ended(self._task, self._done, self._clock() - self._begun, self._unit))
        self._task = None

    def log(self, message: str) -> None:
        """Write the message as a line."""
        self._write(message)

    def _describe(self, now: float) -> str:
        seconds = now - self._begun
        text = f"{self._task}: {_place(self._done, self._total, self._unit)}"
        text += _rate(self._done, seconds, self._unit)
        if self._total and self._done:
            text += f", {human_seconds(seconds * (self._total - self._done) / self._done)} left"
        return text

    def _write(self, line: str) -> None:
        print(without_secrets(line), file=self._stream, flush=True)


def _amount(amount: int, unit: str) -> str:
    return human_bytes(amount) if unit == "B" else f"{amount:,} {unit}"


def _place(done: int, total: int, unit: str) -> str:
    """Say how far a task is: ``layer 12 of 80``."""
    if not total:
        return _amount(done, unit)
    if unit == "B":
        return f"{human_bytes(done)} of {human_bytes(total)}"
    one = f"{unit[:-3]}y" if unit.endswith("ies") else unit.removesuffix("s")
    return f"{one} {done:,} of {total:,}"


def _rate(done: int, seconds: float, unit: str) -> str:
    if seconds <= 0 or not done:
        return ""
    rate = done / seconds
    return f", {human_bytes(int(rate)) if unit == 'B' else f'{rate:,.3g} {unit}'}/s"


def _ended(task: str, done: int, seconds: float, unit: str) -> str:
    return f"{task}: {_amount(done, unit)} in {human_seconds(seconds)}{_rate(done, seconds, unit)}"


class BarProgress:
    """One live line of rich that stays below everything else: ``layer 12 of 80, 41 s left``, and a bar.

    A task that has ended leaves a line above it.
    """

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def start(self, task: str, total: int, unit: str) -> None:
        """Begin a task with a bar of its own."""
        self.finish()
        self._name, self._unit, self._total, self._done = task, unit, total, 0
        self._begun = time.monotonic()
        self._task = self._bars.add_task(task, total=total or None, place=_place(0, total, unit), end=None)

    def advance(self, amount: int) -> None:
        """Move the bar."""
        if self._task is None:
            return
        self._done += amount
        now, end = time.monotonic(), None
        if self._total and self._done:
            end = now + (now - self._begun) * max(0, self._total - self._done) / self._done
        place = _place(self._done, self._total, self._unit)
        self._bars.update(self._task, advance=amount, place=place, end=end)

    def finish(self) -> None:
        """Leave a line that says how long it took in the place of the bar."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._bars.refresh()
            self.log(_ended(self._name, self._done, time.monotonic() - self._begun, self._unit))
        self._task = None

    def log(self, message: str) -> None:
        """Print the message above the bar."""
        self._bars.console.print(without_secrets(message), highlight=False, markup=False)


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Yield the progress that fits the stream (default stderr): a live line on a terminal, else lines."""
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
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Place(ProgressColumn):
        """Where a task is, and how long it still takes, told anew while nothing moves."""

        def render(self, task: Task) -> Text:
            end = task.fields["end"]
            left = "" if end is None else f", {human_seconds(max(1.0, end - time.monotonic()))} left"
            return Text(f"{task.fields['place']}{left}")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        Place(),
        console=console,
    )
