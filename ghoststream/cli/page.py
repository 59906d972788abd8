"""The page of a run that a command writes at its end, with ``--report``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghoststream.errors import GhoststreamError


@contextmanager
def page_at_the_end(out: Path, page: Path | None) -> Iterator[None]:
    """Check that a page can be drawn and written, let the work be done, and write it.

    Args:
        out: Folder of the result, which is there whatever happens to the page.
        page: The page, or None where none is wanted.

    Raises:
        GhoststreamError: If it can be drawn or written nowhere, before any work (see ``require_place`` of the
            stage). If it cannot be written after all: the message says that the result is there.
    """
    if page is None:
        yield
        return
    from ghoststream.stages.reporting.report import require_place, write_report
    from ghoststream.stages.run_record import NAME, work_folder

    require_place(page)
    yield
    work = work_folder(out)
    try:
        # A result in another form says less of itself than what is kept beside it.
        write_report([work if (work / NAME).is_file() else out], page)
    except GhoststreamError as error:
        msg = f"{out} is finished, but its page is not written: {error.args[0]}"
        raise type(error)(msg) from error
