"""Write ``docs/options.md`` from the options as they are declared: ``python docs/make_options.py``."""

from __future__ import annotations

import functools
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from ghoststream import options
from ghoststream.cli import main
from ghoststream.cli.options import FieldOption
from ghoststream.option_types import Options, flag
from ghoststream.options import Recovery, Text

COLUMNS = 110
PAGE = Path(__file__).with_name("options.md")
GROUPS: tuple[type[Options], ...] = (
    Text,
    options.Exploration,
    options.Search,
    options.Method,
    options.Compute,
    options.Storage,
    options.Reduction,
    options.Training,
)
HEAD = """# Options

Every option is declared once, in `ghoststream/options/`. This page is made of that folder by
`python docs/make_options.py`.

A group is a class for Python, a part of a pipeline file and a section of the command line. A field has one
name in all three. The command line writes it with hyphens:

| command line | Python | pipeline file |
| --- | --- | --- |
| `--operator ghost` | `Method(operator="ghost")` | `method: {operator: ghost}` |

Unknown fields are refused, and so is an option that would not be used. [Settings](settings.md) says which
settings suit which purpose.
"""
JOB = """
## Pipeline file

Python: `ghoststream.Recovery`. `ghoststream run` reads one, and
`ghoststream recover` builds one.

| field | default | meaning |
| --- | --- | --- |
"""


def page() -> str:
    """Return the page."""
    return HEAD + "".join(map(_group, GROUPS)) + JOB + "\n".join(_job_rows()) + "\n"


def _group(group: type[Options]) -> str:
    lines = ["", f"## {group.title}", "", _places(group), ""]
    lines += ["| option | values | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in group.model_fields.items():
        written = "`--calibration`, `--text`" if (group, name) == (Text, "spec") else f"`{flag(name)}`"
        meaning = f"{_text(field)}{_exceptions(group, name)}"
        cells = (written, _values(field), _default(field), meaning)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _places(group: type[Options]) -> str:
    parts = [
        f"`{name}`" for name, field in Recovery.model_fields.items() if group in _members(field.annotation)
    ]
    first = (group.__doc__ or "").split("\n\n")[0].replace("``", "`")
    found = [" ".join(first.split()), "", f"- Python: `ghoststream.{group.__name__}`"]
    found += [f"- Pipeline file: {', '.join(parts)}"] if parts else []
    commands = f"- Commands: {', '.join(f'`{name}`' for name in _commands(group))}"
    return "\n".join([*found, *textwrap.wrap(commands, COLUMNS, subsequent_indent="  ")])


def _exceptions(group: type[Options], field: str) -> str:
    """Say which commands have an option and not its group, or the other way round."""
    every, having = _commands(group), _having(group, field)
    parts = [
        f"{word} of {', '.join(f'`{name}`' for name in names)}"
        for word, names in (
            ("not", [name for name in every if name not in having]),
            ("also", [name for name in having if name not in every]),
        )
        if names
    ]
    return f" {'; '.join(parts).capitalize()}." if parts else ""


def _having(group: type[Options], field: str) -> list[str]:
    """Return the commands that have an option of a group.

    Groups share some options: one of a command is of the group of which it has more.
    """
    if (group, field) == (Text, "spec"):  # the name is the parameter's
        return _commands(group)
    others = [one for one in GROUPS if one is not group and field in one.model_fields]
    elsewhere = {name for one in others for name in _commands(one)}
    return [
        name
        for name, fields in _fields(group).items()
        if field in fields and (len(fields) > 1 or name not in elsewhere)
    ]


def _commands(group: type[Options]) -> list[str]:
    """Return the commands that take at least two fields of a group."""
    return [name for name, fields in _fields(group).items() if len(fields) > 1]


@functools.cache
def _fields(group: type[Options]) -> dict[str, set[str]]:
    """Return the fields of a group that each command takes."""
    context, found = click.Context(main), {}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        options = [] if command is None else [one for one in command.params if isinstance(one, FieldOption)]
        found[name] = {str(one.name) for one in options if _is_of(group, one)}
    return found


def _is_of(group: type[Options], option: FieldOption) -> bool:
    field = group.model_fields.get(str(option.name))
    return field is not None and option.help == field.description


def _job_rows() -> Iterator[str]:
    for name, field in Recovery.model_fields.items():
        groups = [one for one in _members(field.annotation) if one in GROUPS]
        text = _text(field) or f"Options of [{groups[0].title}](#{_anchor(groups[0].title)})."
        default = "all defaults" if isinstance(field.default, Options) else _default(field)
        yield f"| `{name}` | {default} | {text} |"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _values(field: FieldInfo) -> str:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    members = [one for one in _members(field.annotation) if one is not type(None)]
    if len(members) == 1 and get_origin(members[0]) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(members[0]))
    if members == [bool]:
        return "yes or no"
    return f"{extra.get('metavar', 'a number' if int in members else 'text')}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default in (None, ""):
        return ""
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return f"`{field.default}`"


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
