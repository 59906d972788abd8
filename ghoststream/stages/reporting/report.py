"""Report: one page that compares any number of runs, and a PNG file of each of its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ghoststream.errors import OutputExistsError
from ghoststream.files import atomic_write_bytes, disk_errors, open_input, require_writable
from ghoststream.stages.reporting.drawing import Drawing, png, require_matplotlib
from ghoststream.stages.reporting.figures import all_figures
from ghoststream.stages.reporting.page import GENERATOR, page
from ghoststream.stages.reporting.read_runs import read_runs
from ghoststream.stages.reporting.runs import Run

_HEAD_BYTES = 4096


def write_report(
    runs: Sequence[str | Path] | str | Path, out: str | Path, *, figures: str | Path | None = None
) -> tuple[Run, ...]:
    """Write a page that compares runs.

    The page is one file that asks for nothing else. The same runs give the same bytes.

    Args:
        runs: Recovered folders, the folders beside them, plan files, operators files, explorations, files of
            figures of `evaluate` and `tasks`, estimates.
        out: The page; a page that was written before is replaced.
        figures: Folder of the PNG files; by default ``<out without .html>.figures``.

    Returns:
        The runs, as they were read.

    Raises:
        RequestError: If the extra ``report`` is not installed, no run is given, one is something else, or the
            page cannot be written.
        OutputExistsError: If ``out`` is no page of this function.
        InputNotFoundError: If there is nothing at a place.
        ArtifactError, CheckpointError: If it is damaged.
        DiskFullError: If no space is left.

    Memory: what :func:`~ghoststream.stages.reporting.read_runs.read_runs` states, and the page.
    """
    out = Path(out)
    require_place(out)
    found = read_runs([runs] if isinstance(runs, str | Path) else runs)
    drawn = all_figures(found)
    folder = (
        Path(figures) if figures is not None else out.with_name(f"{out.name.removesuffix('.html')}.figures")
    )
    text = page(found, drawn).encode("utf-8")
    drawings = [one for one in drawn if isinstance(one, Drawing)]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for number, drawing in enumerate(drawings, start=1):
        atomic_write_bytes(folder / f"{number:02}-{drawing.name}.png", png(drawing))
    atomic_write_bytes(out, text)
    return found


def require_place(out: Path) -> None:
    """Check that a page can be drawn and written, before any work.

    Raises:
        RequestError: If the extra ``report`` is not installed, or the place cannot be written.
        OutputExistsError: If something else is there.
    """
    require_matplotlib()
    require_writable(out.absolute())
    if out.exists() or out.is_symlink():
        mark = f'<meta name="generator" content="{GENERATOR}">'.encode()
        if not out.is_file() or mark not in _head(out):
            msg = f"{out} exists and is no page of `ghoststream report`; choose another name, or move it away"
            raise OutputExistsError(msg)


def _head(path: Path) -> bytes:
    with open_input(path) as file:
        return file.read(_HEAD_BYTES)
