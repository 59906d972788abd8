"""What commands and their options are made of: a command with an example, types of values, options in groups."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


class ExampleCommand(click.Command):
    """A command whose help ends with an example, kept as it was written.

    Args:
        *args: What ``click.Command`` takes.
        example: One command line; ``; `` separates several.
        **kwargs: What ``click.Command`` takes.
    """

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example; long ones are continued with backslashes, so that they can be copied."""
        del ctx
        with formatter.section("Example"):
            for line in self.example.split("; "):
                formatter.write(_continued(line, formatter.width))


def _continued(line: str, width: int) -> str:
    rows = [""]
    # An option stays together with its value.
    for word in re.findall(r"--\S+ [^-\s]\S*|\S+", line):
        if rows[-1].strip() and len(rows[-1]) + len(word) > width - 6:
            rows.append("   ")
        rows[-1] = f"{rows[-1]} {word}" if rows[-1] else word
    return " \\\n".join(f"  {row}" for row in rows) + "\n"


class IndexList(click.ParamType[tuple[int, ...]]):
    """Numbers such as ``0,10:20,30``; ``A:B`` is half-open like every span."""

    name = "LIST"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers, ascending and without repetition."""
        if isinstance(value, tuple):
            return value
        numbers: set[int] = set()
        try:
            for part in str(value).split(","):
                start, colon, stop = part.partition(":")
                numbers.update(range(int(start), int(stop) if colon else int(start) + 1))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; write for example 0,10:20,30", param, ctx)
        if not numbers or min(numbers) < 0:
            self.fail(f"{value!r} names no layer; write for example 0,10:20,30", param, ctx)
        return tuple(sorted(numbers))


class Ridge(click.ParamType["float | str"]):
    """A ridge: a number that is not negative, ``auto`` or ``gcv``."""

    name = "RIDGE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Return the number, ``auto`` or ``gcv``."""
        if value in ("auto", "gcv"):
            return str(value)
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0.0 <= number < float("inf"):
            self.fail(
                f"{value!r} is no ridge; give a number of at least 0, for example 1e-6, auto or gcv",
                param,
                ctx,
            )
        return number


class ByteSize(click.ParamType[int]):
    """An amount of bytes such as ``8GiB``, ``500MB`` or ``1073741824``."""

    name = "SIZE"
    _units: ClassVar[dict[str, int]] = {"": 1, "B": 1} | {
        f"{letter}{ending}": base**power
        for power, letter in enumerate("KMGT", start=1)
        for ending, base in (("iB", 1024), ("B", 1000), ("", 1024))
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if match is None or match[2] not in self._units:
            self.fail(f"{value!r} is not an amount of bytes; write for example 8GiB or 500MB", param, ctx)
        return int(float(match[1]) * self._units[match[2]])


def combined(*decorators: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    """Return one decorator that applies several, so that they appear in this order in the help."""

    def apply(command: _Command) -> _Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply
