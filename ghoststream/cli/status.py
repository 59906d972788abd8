"""``ghoststream status``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, json_option
from ghoststream.cli.output import human_bytes, print_facts, print_json, print_table
from ghoststream.progress import human_seconds

if TYPE_CHECKING:
    from ghoststream.stages.run_record import RunRecord, Task


@click.command(
    "status",
    cls=Command,
    short_help="How far a recover or run is, or how it ended.",
    example="ghoststream status runs/llama",
)
@click.argument("run", type=click.Path(path_type=Path))
@json_option
@debug_option
def command(run: Path, *, as_json: bool) -> None:
    """Say how far RUN is, or how it ended. RUN is the --out of `ghoststream recover` or `ghoststream run`.

    It is read from a file beside it, `<out>.work/run.json`, from any machine that sees the folder.
    """
    from ghoststream.stages.run_record import RunRecord

    record = RunRecord.load(run)
    if as_json:
        print_json({**record.to_json(), "outcome": record.outcome})
        return
    _print(record)


def _print(record: RunRecord) -> None:
    facts: dict[str, Any] = {
        "state": _state(record),
        "attempt": f"{record.attempts}, begun {record.started}",
        "process": f"{record.pid} on {record.host}",
        "memory at most": human_bytes(record.peak_bytes),
    }
    if record.device_peak_bytes is not None:
        facts["accelerator at most"] = human_bytes(record.device_peak_bytes)
    if record.read_bytes is not None and record.written_bytes is not None:
        facts["disk"] = f"{human_bytes(record.read_bytes)} read, {human_bytes(record.written_bytes)} written"
    print_facts(facts, title=record.name)
    click.echo()
    print_table(["task", "done", "took", "left"], [_row(record, task) for task in record.tasks])


def _row(record: RunRecord, task: Task) -> list[str]:
    # The tasks before the last have ended, whatever they were thought to take.
    ended = task is not record.tasks[-1] or record.outcome == "done"
    left = task.seconds_left if record.outcome == "running" and not ended else None
    amount = _amount(task, 0 if ended else task.total)
    return [task.name, amount, human_seconds(task.seconds), human_seconds(left) if left else ""]


def _state(record: RunRecord) -> str:
    text = f"{record.outcome} after {human_seconds(record.seconds)}, told {record.updated}"
    if record.outcome in ("stopped", "killed"):
        return f"{text}; the same command goes on"
    return f"{text}: {record.error}" if record.error else text


def _amount(task: Task, total: int) -> str:
    def shown(amount: int) -> str:
        return human_bytes(amount) if task.unit == "B" else f"{amount:,}"

    of = f" of {shown(total)}" if total else ""
    return f"{shown(task.done)}{of}{'' if task.unit == 'B' else f' {task.unit}'}"
