"""The page of a run that a command writes at its end, with ``--report``."""

from __future__ import annotations

from pathlib import Path

from ghoststream.errors import GhoststreamError


def require_page(page: Path) -> None:
    """Check before any work that a page can be drawn and written; see ``require_place`` of the stage."""
    from ghoststream.stages.reporting.report import require_place

    require_place(page)


def write_page(out: Path, page: Path) -> None:
    """Write the page of a run.

    Args:
        out: Folder of its result, which is there whatever happens here.
        page: The page.

    Raises:
        GhoststreamError: If it cannot be written; it says that the result is there.
    """
    from ghoststream.stages.reporting.report import write_report
    from ghoststream.stages.run_record import NAME
    from ghoststream.stages.steps import work_folder

    work = work_folder(out)
    try:
        # A result in another form says less of itself than what is kept beside it.
        write_report([work if (work / NAME).is_file() else out], page)
    except GhoststreamError as error:
        msg = f"{out} is finished, but its page is not written: {error.args[0]}"
        raise type(error)(msg) from error
