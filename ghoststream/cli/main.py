"""The command group, and the one place where errors become exit codes and lines on stderr."""

from __future__ import annotations

import errno
import importlib
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from ghoststream.cli.interrupts import interruptible, was_interrupted
from ghoststream.cli.options import debug_option, is_debug
from ghoststream.errors import GhoststreamError
from ghoststream.redaction import without_secrets

#: Order of the help page: the whole job, its stages, then what looks at their results.
COMMANDS = (
    "demo",
    "recover",
    "run",
    "estimate",
    "capture",
    "select",
    "fit",
    "distill",
    "export",
    "evaluate",
    "tasks",
    "inspect",
    "verify",
)

_FIRST_STEPS = (
    ("ghoststream demo", "all of it on a small model that comes along"),
    ("ghoststream estimate MODEL --remove 8", "memory, disk and time that your model takes"),
    ("ghoststream recover MODEL --remove 8 --calibration wikitext2:train --out DIR", "do it"),
    ("ghoststream inspect PATH", "explains what was written; verify checks it"),
)


def _version() -> str:
    try:
        return version("ghoststream")
    except PackageNotFoundError:
        return "unknown (not installed)"


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
        with interruptible():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see :func:`_report` for what happens to errors."""
        with interruptible():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
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
    """Print one line about an error (after its traceback with ``--debug``) and return the exit code."""
    if is_debug(ctx):
        click.echo(without_secrets("".join(traceback.format_exception(error)).rstrip()), err=True)
    if isinstance(error, GhoststreamError):
        click.echo(f"error: {_one_line(error)}", err=True)
        return error.exit_code
    line = f"error: unexpected {type(error).__name__}: {_one_line(error)}"
    if "out of memory" in str(error) or isinstance(error, MemoryError):
        line += "; try a smaller --micro-batch, and see what `ghoststream estimate` says"
    elif not is_debug(ctx):
        line += "; run it again with --debug for the traceback"
    click.echo(line, err=True)
    return 1


def _one_line(error: Exception) -> str:
    # str() of an OSError or KeyError with arguments is not its message.
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    return without_secrets(" ".join(text.split()))


@click.group(
    cls=GhoststreamGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(_version(), prog_name="ghoststream")
@debug_option
def main() -> None:
    """Prune layers from large language models and repair them, one decoder layer in memory at a time.

    Layers are numbered from 0; spans are half-open: [13,19) are the layers 13 to 18. A command that was
    stopped goes on when it is run again, and changes nothing once it has finished; evaluate and tasks begin
    anew.

    Exit codes: 0 done; 2 the request cannot be met; 3 data on disk is broken, or the disk is full; 130
    interrupted.
    """
