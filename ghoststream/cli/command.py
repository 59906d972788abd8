"""What every command is: a help with sections, a short help of the usual options, and an example."""

from __future__ import annotations

import re
from typing import Any

import click

from ghoststream.cli.options import ALL_KEY, SectionOption


class Command(click.Command):
    """A command whose options stand in sections and whose help ends with an example, kept as it was written.

    Args:
        *args: What ``click.Command`` takes.
        example: One command line.
        is_short: Whether ``--help`` shows the usual options only, and ``--help-all`` all of them.
        **kwargs: What ``click.Command`` takes.
    """

    def __init__(self, *args: Any, example: str, is_short: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example, self.is_short = example, is_short
        if is_short:
            show = click.Option(
                ["--help-all"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=self._show_all,
                help="Show all options.",
            )
            self.params.append(show)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options: the command's own first, then each group under its title."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument):
                continue
            section = param.section if isinstance(param, SectionOption) else "Options"
            record = param.get_help_record(ctx)
            hidden = self.is_short and isinstance(param, SectionOption) and not param.usual
            if record is not None and not (hidden and not ctx.meta.get(ALL_KEY)):
                sections.setdefault(section, []).append(record)
        # The text comes first: it is what has to be given.
        for title in sorted(sections, key=lambda name: (name != "Text", name != "Options")):
            if sections[title]:
                with formatter.section(title):
                    formatter.write_dl(sections[title], col_max=26)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example; a long one is continued with backslashes, so that it can be copied."""
        del ctx
        with formatter.section("Example"):
            formatter.write(_continued(self.example, formatter.width))

    def _show_all(self, ctx: click.Context, param: click.Parameter, value: Any) -> None:
        del param
        if value:
            ctx.meta[ALL_KEY] = True
            click.echo(self.get_help(ctx))
            ctx.exit()


def _continued(line: str, width: int) -> str:
    rows = [""]
    # An option stays together with its value.
    for word in re.findall(r"--\S+ [^-\s]\S*|\S+", line):
        if rows[-1].strip() and len(rows[-1]) + len(word) > width - 6:
            rows.append("   ")
        rows[-1] = f"{rows[-1]} {word}" if rows[-1] else word
    return " \\\n".join(f"  {row}" for row in rows) + "\n"
