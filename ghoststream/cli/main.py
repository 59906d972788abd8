"""The command group, and the one place where errors become exit codes and lines on stderr."""

from __future__ import annotations

import errno
import importlib
import sys
import traceback
from io import TextIOWrapper
from typing import Any

import click

from ghoststream.cli.fault_report import fault_report, installed_version
from ghoststream.cli.interrupts import interruptible, stoppable, was_interrupted
from ghoststream.cli.options import debug_option, is_debug
from ghoststream.errors import GhoststreamError
from ghoststream.files.system_errors import system_error
from ghoststream.redaction import without_secrets

#: Order of the help page: the whole job, its stages, then what looks at their results.
COMMANDS = (
    "demo",
    "recover",
    "run",
    "estimate",
    "explore",
    "capture",
    "select",
    "fit",
    "distill",
    "export",
    "evaluate",
    "tasks",
    "report",
    "status",
    "inspect",
    "verify",
)

_FIRST_STEPS = (
    ("ghoststream demo", "all of it on a small model that comes along"),
    ("ghoststream estimate MODEL --remove 8", "memory, disk and time that your model takes"),
    ("ghoststream recover MODEL --remove 8 --calibration wikitext2:train --out DIR", "do it"),
    ("ghoststream inspect PATH", "explains what was written; verify checks it"),
)
_LONGEST_LINE = 4000
_ARGUMENTS = "ghoststream.arguments"


class GhoststreamGroup(click.Group):
    """Loads a command's module when it is asked for, and turns errors into lines and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the help page."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"ghoststream.cli.{cmd_name}").command
        if not isinstance(command, click.Command):
            msg = f"ghoststream.cli.{cmd_name} defines no command"
            raise TypeError(msg)
        return command

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what to run first."""
        del ctx
        with formatter.section("To begin with"):
            formatter.write_dl(_FIRST_STEPS)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options."""
        if isinstance(sys.stdout, TextIOWrapper):
            # Names in files need not be text that a terminal, or any encoding, can show.
            sys.stdout.reconfigure(errors="backslashreplace")
        with interruptible():
            return super().make_context(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what stands before the command, and remember all of it for the report of a fault."""
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see :func:`_report` for what happens to errors."""
        with interruptible(), stoppable():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            # Now, while a full disk can still be told of.
            sys.stdout.flush()
            return result
        except click.UsageError as error:
            where = (error.ctx or ctx).command_path
            said = without_secrets(error.format_message().rstrip("."))
            click.echo(f"error: {said}; see `{where} --help`", err=True)
            ctx.exit(error.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if was_interrupted(error) or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            ctx.exit(_report(ctx, error))


def _report(ctx: click.Context, error: Exception) -> int:
    """Print one line about an error (after its traceback with ``--debug``) and return the exit code.

    What the system refused is the machine's or the request's. What nobody foresaw is a fault of ours: a
    report that can be sent comes first.
    """
    if is_debug(ctx):
        click.echo(without_secrets("".join(traceback.format_exception(error)).rstrip()), err=True)
    said = error if isinstance(error, GhoststreamError) else system_error(error)
    if said is not None:
        click.echo(f"error: {_one_line(said)}", err=True)
        return said.exit_code
    click.echo(fault_report(error, ctx.meta.get(_ARGUMENTS, [])), err=True)
    line = f"{type(error).__name__}: {_one_line(error)}"
    click.echo(f"error: unexpected {line}; this is a fault of ghoststream: send the report above", err=True)
    return GhoststreamError.exit_code


def _one_line(error: Exception) -> str:
    # str() of an OSError or KeyError with arguments is not its message.
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    line = without_secrets(" ".join(text.split()))
    if len(line) <= _LONGEST_LINE:
        return line
    # A value that the line quotes may be as long as a file; what to do stands at the end.
    kept = _LONGEST_LINE // 2
    return f"{line[:kept]} ... {line[-kept:]}"


@click.group(
    cls=GhoststreamGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(installed_version("ghoststream"), prog_name="ghoststream")
@debug_option
def main() -> None:
    """Prune layers from large language models and repair them, one decoder layer in memory at a time.

    Layers are numbered from 0; spans are half-open: [13,19) are the layers 13 to 18. A command that was
    stopped goes on when it is run again, and changes nothing once it has finished; evaluate and tasks begin
    anew.

    Exit codes: 0 done; 2 the request cannot be met; 3 data on disk is broken, or the machine fails (a full
    disk, no memory, no connection); 1 a fault of ghoststream; 75 stopped as SIGTERM asked, run it again; 130
    interrupted.
    """
