"""What commands print: tables on a terminal, plain lines elsewhere, JSON when asked."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ghoststream.redaction import without_secrets

_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def human_bytes(n_bytes: float) -> str:
    """Write an amount of bytes in binary units, three digits."""
    if abs(n_bytes) < 1024:
        return f"{n_bytes:.0f} B"
    value = float(n_bytes)
    for unit in _BINARY_UNITS:
        value /= 1024
        if abs(value) < 1000 or unit == _BINARY_UNITS[-1]:
            break
    return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"


def print_text(text: str) -> None:
    """Print lines for a reader, without what is secret in URLs."""
    click.echo(without_secrets(text))


def print_json(data: Any) -> None:
    """Print machine-readable results; non-finite numbers become null, as JSON has none; URLs as in text."""
    click.echo(json.dumps(_printable(data), indent=2, sort_keys=True, allow_nan=False, default=str))


def _printable(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _printable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_printable(value) for value in data]
    return without_secrets(data) if isinstance(data, str) else data


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "") -> None:
    """Print a table; numbers are aligned to the right."""
    cells = [[format_cell(value) for value in row] for row in rows]
    right = [
        all(isinstance(row[column], (int, float)) or row[column] is None for row in rows)
        for column in range(len(headers))
    ]
    if sys.stdout.isatty():
        _print_rich(headers, cells, right, title)
    else:
        _print_plain(headers, cells, right, title)


def format_cell(value: Any) -> str:
    """Write one value of a table: floats with five digits; a dash for None and what is no number."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else "-"
    return without_secrets(str(value))


def print_facts(facts: Mapping[str, Any], *, title: str = "") -> None:
    """Print names and values, one a line."""
    if title:
        print_text(title)
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        click.echo(f"  {name:<{width}}  {format_cell(value)}")


def _print_plain(
    headers: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], title: str
) -> None:
    if title:
        print_text(title)
    widths = [max(len(row[column]) for row in [headers, *cells]) for column in range(len(headers))]
    for row in [headers, *cells]:
        parts = [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ]
        click.echo("  ".join(parts).rstrip())


def _print_rich(
    headers: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], title: str
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) if title else None, title_justify="left")
    for name, to_right in zip(headers, right, strict=True):
        table.add_column(escape(name), justify="right" if to_right else "left")
    for row in cells:
        table.add_row(*[escape(text) for text in row])
    Console().print(table)


def next_command(*words: object) -> str:
    """Say which command comes next, quoted for the shell."""
    return f"next: {shlex.join(['ghoststream', *map(str, words)])}"


def print_next(form: str, out: Path, command: str) -> None:
    """Say what comes next once a recovered model was written.

    Args:
        form: Its form.
        out: Where it is.
        command: What comes next where ghoststream itself loads it, from :func:`next_command`.
    """
    from ghoststream.recovery.forms import find_form

    runs = find_form(form).runs(out)
    print_text(command if runs is None else f"next: {runs}")
