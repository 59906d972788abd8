"""What a run tells while it works and afterwards: one small JSON file beside its result."""

from __future__ import annotations

import json
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import TypeAdapter

from ghoststream.errors import ArtifactError, GhoststreamError, InputNotFoundError, StoppedError
from ghoststream.files import parse_json, read_input
from ghoststream.files.atomic import temporary_name
from ghoststream.progress import Progress
from ghoststream.redaction import without_secrets

NAME = "run.json"
WORK = ".work"
"""What the folder beside the result ends with."""
_ENCODING = {"encoding-type": "ghoststream-run", "encoding-version": "1.0"}
_SECONDS_BETWEEN = 1.0

State = Literal["running", "done", "stopped", "failed"]
"""``stopped``: by SIGTERM or Ctrl-C, and goes on with the same command."""


def work_folder(out: Path) -> Path:
    """Return the folder of what is kept beside what a run makes, of ``.`` beside the folder that it is."""
    out = out if out.name else out.resolve()
    return out.parent / f"{out.name}{WORK}"


@dataclass
class Task:
    """One piece of work: ``done`` of ``total`` units (0: not known), and the seconds that it has taken."""

    name: str
    unit: str
    total: int
    done: int = 0
    seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the rate so far; None if that is not known."""
        if not (self.done and self.total):
            return None
        return self.seconds * max(0, self.total - self.done) / self.done


@dataclass
class StageRecord:
    """A stage of the work, by the name that an estimate gives it.

    Attributes:
        name: ``capture``, ``select``, ``search``, ``fit``, ``solve``, ``distill``, ``export`` or
            ``evaluate``.
        seconds: What it has taken, whatever is not told as a task included.
        peak_bytes: Largest resident memory of the process up to its end.
    """

    name: str
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class RunRecord:
    """What is known of a run.

    Attributes:
        name: What the run is called.
        state: How it stands.
        error: What it failed with.
        attempts: How often it was begun or went on.
        started: When the last attempt began, ISO 8601 in UTC.
        updated: When the file was written.
        seconds: Seconds of the last attempt.
        host: Host name.
        pid: Process number there.
        process_started: When that process began, seconds since the epoch: a number may be given again.
        tasks: What all attempts have done and are doing, in order.
        stages: The stages of all attempts, in order.
        request: What was asked for, as JSON data; None before it was read.
        command: The command line that does the same, without secrets; empty where it is not known.
        estimate: What it was expected to take: ``stages`` as `ghoststream estimate` has them.
        peak_bytes: Largest resident memory of the process.
        device_peak_bytes: Largest memory of accelerators together, where torch has one.
        read_bytes: Bytes read from disks.
        written_bytes: Bytes written to disks.
    """

    name: str
    state: State = "running"
    error: str | None = None
    attempts: int = 1
    started: str = ""
    updated: str = ""
    seconds: float = 0.0
    host: str = ""
    pid: int = 0
    process_started: float = 0.0
    tasks: list[Task] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    request: dict[str, Any] | None = None
    command: str = ""
    estimate: dict[str, Any] | None = None
    peak_bytes: int = 0
    device_peak_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None

    @property
    def is_alive(self) -> bool | None:
        """Whether its process is there; None where it ran on another host."""
        if self.host != socket.gethostname():
            return None
        try:
            return abs(psutil.Process(self.pid).create_time() - self.process_started) < 1.0
        except psutil.Error:
            return False

    @property
    def outcome(self) -> str:
        """The state; ``killed`` where the file says running, and the process is gone."""
        return "killed" if self.state == "running" and self.is_alive is False else self.state

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        tasks = [{**asdict(task), "seconds_left": task.seconds_left} for task in self.tasks]
        return {**_ENCODING, **asdict(self), "tasks": tasks}

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Read the record of a run.

        Args:
            path: The file, the folder of what the run makes, or the folder beside it.

        Raises:
            InputNotFoundError: If there is none.
            ArtifactError: If it is no such file.
        """
        places = (work_folder(path) / NAME, path / NAME, path)
        found = next((file for file in places if file.is_file()), None)
        if found is None:
            msg = f"there is no {NAME} beside or in {path}; name the --out of a recover or run"
            raise InputNotFoundError(msg)
        try:
            return TypeAdapter(cls).validate_python(parse_json(read_input(found)))
        except ValueError as error:
            msg = f"{found} is no record of a run ({' '.join(str(error).split())[:200]})"
            raise ArtifactError(msg) from error


class RecordedProgress:
    """A :class:`~ghoststream.progress.Progress` that hands on what it is told, and keeps a record of it.

    Nothing is written before :meth:`begin`: what is refused leaves no trace. Then the file is replaced at
    most every second, and whenever a task begins or ends. It goes on where an earlier attempt left it. That
    it cannot be written, as on a full disk, ends no run.

    Args:
        name: What the run is called.
        path: The file; its folder is there when the record begins.
        inner: Who is told too.
    """

    def __init__(
        self, name: str, path: Path, inner: Progress, clock: Callable[[], float] = time.monotonic
    ) -> None:
        process = psutil.Process()
        earlier = _earlier(path)
        self.record = RunRecord(
            name,
            attempts=earlier.attempts + 1 if earlier else 1,
            tasks=earlier.tasks if earlier else [],
            stages=earlier.stages if earlier else [],
            request=earlier.request if earlier else None,
            started=_now(),
            host=socket.gethostname(),
            pid=process.pid,
            process_started=process.create_time(),
        )
        self._process, self._path, self._inner, self._clock = process, path, inner, clock
        self._begun = self._task_begun = self._stage_begun = clock()
        self._stage: StageRecord | None = None
        self._written = float("-inf")
        self._running = self._is_written = False

    def begin(self) -> None:
        """Write from now on."""
        self._is_written = True
        self._write()

    def enter(self, stage: str) -> None:
        """Begin a stage; the one before it ends."""
        self._clock_stage()
        self._stage, self._stage_begun = StageRecord(stage), self._clock()
        self.record.stages.append(self._stage)
        self._write()

    def start(self, task: str, total: int, unit: str) -> None:
        """Begin a task."""
        self._end_task()
        self.record.tasks.append(Task(task, unit, total))
        self._task_begun, self._running = self._clock(), True
        self._write()
        self._inner.start(task, total, unit)

    def advance(self, amount: int) -> None:
        """Count."""
        if self._running:
            self.record.tasks[-1].done += amount
            if self._clock() - self._written >= _SECONDS_BETWEEN:
                self._write()
        self._inner.advance(amount)

    def finish(self) -> None:
        """End the task."""
        self._end_task()
        self._write()
        self._inner.finish()

    def log(self, message: str) -> None:
        """Hand the message on."""
        self._inner.log(message)

    def end(self, state: State, error: str | None = None) -> None:
        """Write how the run ended."""
        self._end_task()
        self.record.state, self.record.error = state, error
        self._write()

    def _end_task(self) -> None:
        if self._running:
            self._clock_task()
        self._running = False

    def _clock_task(self) -> None:
        self.record.tasks[-1].seconds = round(self._clock() - self._task_begun, 3)

    def _clock_stage(self) -> None:
        if self._stage is not None:
            self._stage.seconds = round(self._clock() - self._stage_begun, 3)
            self._stage.peak_bytes = _peak_bytes()

    def _write(self) -> None:
        if not self._is_written:
            return
        record, self._written = self.record, self._clock()
        if self._running:
            self._clock_task()
        self._clock_stage()
        record.updated, record.seconds = _now(), round(self._written - self._begun, 3)
        record.peak_bytes = _peak_bytes()
        record.device_peak_bytes = _device_peak()
        with suppress(psutil.Error, OSError, AttributeError):
            io = self._process.io_counters()
            record.read_bytes, record.written_bytes = io.read_bytes, io.write_bytes
        with suppress(OSError):
            self._replace(json.dumps(record.to_json(), indent=1))

    def _replace(self, text: str) -> None:
        # Not forced to disk: it tells of now, and the next second writes it again.
        temporary = temporary_name(self._path)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def recorded(name: str, path: Path, inner: Progress) -> Iterator[RecordedProgress]:
    """Record a run to its end, whichever it is."""
    progress = RecordedProgress(name, path, inner)
    try:
        yield progress
    except (StoppedError, KeyboardInterrupt):
        progress.end("stopped")
        raise
    except BaseException as error:
        said = str(error) if isinstance(error, GhoststreamError) else f"{type(error).__name__}: {error}"
        progress.end("failed", without_secrets(said))
        raise
    progress.end("done")


def _earlier(path: Path) -> RunRecord | None:
    try:
        return RunRecord.load(path)
    except GhoststreamError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _peak_bytes() -> int:
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_peak() -> int | None:
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
