"""Files of figures: one object a model, sealed, and written by one command at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from ghoststream.errors import RequestError
from ghoststream.files import differences, read_sealed_json, require_writable, write_sealed_json
from ghoststream.stages.output import claimed_place, not_of_this_request, read_result

Rows = Sequence[dict[str, Any]]
FiguresKind = Literal["evaluation", "tasks"]
Asked = Sequence[tuple[int, dict[str, Any]]]
"""``fingerprint`` and ``recipe`` of each model, with its place in the request."""

_VERSION = "1.0"


@contextmanager
def claimed_figures(
    out: str | Path | None, kind: FiguresKind, asked: Asked
) -> Iterator[Callable[[Rows], None]]:
    """Hold a file of figures from the look at what is there to the end of the block.

    Args:
        out: The file; nothing is written if ``None``.
        kind: What the figures are.
        asked: What decides them.

    Yields:
        A function that writes the rows, one object a model.

    Raises:
        OutputExistsError: If the file holds anything but the figures of this request.
        ArtifactError: If it holds figures, and is damaged.
        RequestError: If it cannot be written.
        BusyError: If another process is writing it.
    """
    if out is None:
        yield lambda rows: None
        return
    path = Path(out).absolute()
    require_writable(path)
    with claimed_place(path):
        if path.exists() or path.is_symlink():
            _require_same(path, kind, asked)
        yield lambda rows: write_figures(path, kind, rows)


def write_figures(path: Path, kind: FiguresKind, rows: Rows) -> None:
    """Write rows, whole or not at all.

    Raises:
        DiskFullError: If no space is left.
    """
    write_sealed_json(path, {**_encoding(kind), "models": list(rows)})


def read_figures(path: Path, kind: FiguresKind) -> list[dict[str, Any]]:
    """Read what :func:`write_figures` wrote.

    Raises:
        InputNotFoundError: If there is no such file.
        ArtifactError: If it is damaged.
        RequestError: If it holds something else.
    """
    data = read_sealed_json(path, advice="measure again")
    if {key: data.get(key) for key in _encoding(kind)} != _encoding(kind):
        msg = f"{path} does not hold figures of `ghoststream {kind}` in version {_VERSION}"
        raise RequestError(msg)
    return list(data["models"])


def _encoding(kind: FiguresKind) -> dict[str, str]:
    return {"encoding-type": f"ghoststream-{kind}", "encoding-version": _VERSION}


def _require_same(path: Path, kind: FiguresKind, asked: Asked) -> None:
    rows = read_result(path, lambda place: read_figures(place, kind))
    if rows is None:
        raise not_of_this_request(path)
    found = [{key: row.get(key) for key in ("fingerprint", "recipe")} for row in rows]
    if differences(found, [request for _, request in sorted(asked, key=itemgetter(0))]):
        raise not_of_this_request(path)
