"""What ``recover`` and ``run`` do with the recovery that they were given."""

from __future__ import annotations

from pathlib import Path

from ghoststream.cli.output import next_command, print_json, print_next, print_text
from ghoststream.cli.page import page_at_the_end
from ghoststream.cli.progress import show_progress
from ghoststream.options import Recovery, Resume


def do_recovery(recovery: Recovery, out: Path, *, resume: Resume, page: Path | None, as_json: bool) -> None:
    """Do what a recovery says, and print what came of it and what comes next.

    Args:
        recovery: What to do.
        out: Folder of the recovered checkpoint.
        resume: What to do with what is there already.
        page: The page to write at the end, or None.
        as_json: Whether the report is printed as JSON, and nothing else.
    """
    from ghoststream.stages.recover import run

    with page_at_the_end(out, page):
        with show_progress() as progress:
            report = run(recovery, out, resume=resume, measure=page is not None, progress=progress)
        if as_json:
            print_json(report.to_json())
        else:
            print_text(report.to_text())
            print_next(recovery.form, out, next_command("evaluate", recovery.model, out, "--text", "SPEC"))
