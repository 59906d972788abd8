"""A Dask cluster that is asked to reduce: reaching it, looking whether its workers can, and what their failures mean."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststream.errors import BudgetError, GhoststreamError, RequestError
from ghoststream.progress import Progress
from ghoststream.statistics.source import open_source, store_digest

_CONNECT_SECONDS = 30
_SHOWN = 3


@dataclass(frozen=True)
class Needs:
    """What range tasks need of every worker.

    Attributes:
        store_uri: Path or URL of the store.
        folder: Where partial states are kept, or None.
        task_bytes: Peak memory of one task.
    """

    store_uri: str
    folder: Path | None
    task_bytes: int


@contextmanager
def connect(scheduler: Any) -> Iterator[Any]:
    """Give a client of a scheduler: of its address, or the ``distributed.Client`` that was given.

    Raises:
        RequestError: If no scheduler answers.
    """
    from distributed import Client

    if isinstance(scheduler, Client):
        with nullcontext(scheduler) as client:
            yield client
        return
    try:
        client = Client(str(scheduler), timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        msg = f"no Dask scheduler answers at {scheduler} ({error}); start one, or leave the scheduler out"
        raise RequestError(msg) from error
    with client:
        yield client


def require_able(client: Any, needs: Needs, progress: Progress) -> None:
    """Check the workers that are there now, before anything is computed.

    Each opens the store itself, and must find what this process finds; sees a file that is made in the folder for this
    moment; and has memory for one task a thread.

    Raises:
        BudgetError: If a worker has too little memory.
        RequestError: If a worker does not see the store or the folder.
    """
    digest = store_digest(open_source(needs.store_uri))
    with _mark(needs.folder) as mark:
        found = client.run(_look, needs, digest, mark, on_error="return")
    if not found:
        progress.log(f"the cluster at {client.scheduler.address} has no workers yet; waiting for the first")
    problems = {address: _said(answer) for address, answer in found.items() if answer is not None}
    if not problems:
        return
    listed = "; ".join(f"{address}: {text}" for address, text in sorted(problems.items())[:_SHOWN])
    more = "" if len(problems) <= _SHOWN else f"; and {len(problems) - _SHOWN} more"
    msg = f"{len(problems)} of {len(found)} workers cannot reduce this store: {listed}{more}"
    raise (BudgetError if any(isinstance(found[name], _Memory) for name in problems) else RequestError)(msg)


@contextmanager
def explained(needs: Needs) -> Iterator[None]:
    """Say what a lost scheduler or a range that costs one worker after the other means.

    Raises:
        BudgetError: If a task ended several workers.
        RequestError: If the scheduler is gone.
    """
    from concurrent.futures import CancelledError

    from distributed.scheduler import KilledWorker

    again = "run the same command again: what was finished is kept" if needs.folder else "run it again"
    try:
        yield
    except KilledWorker as error:
        msg = (
            f"{error.task} ended the workers that ran it, most often for lack of memory: a task takes "
            f"{needs.task_bytes:,} bytes besides the libraries; give the workers more memory or fewer threads, and {again}"
        )
        raise BudgetError(msg) from error
    except CancelledError as error:
        msg = f"the scheduler was lost, or the work was cancelled there; start it again if it is gone, and {again}"
        raise RequestError(msg) from error


class _Memory(str):
    """A problem of memory."""

    __slots__ = ()


async def _look(needs: Needs, digest: str, mark: Path | None, dask_worker: Any) -> str | None:
    # Opening a store takes a while: on a thread, for the worker's event loop has to go on.
    seen = await asyncio.to_thread(_problem_of, needs.store_uri, digest, mark)
    if seen is not None:
        return seen
    limit, threads = dask_worker.memory_manager.memory_limit, dask_worker.state.nthreads
    if limit is None or threads * needs.task_bytes <= limit:
        return None
    return _Memory(
        f"{limit:,} bytes of memory for {threads} threads, each of which takes {needs.task_bytes:,} for a range; "
        "start workers with more memory or fewer threads"
    )


def _problem_of(store_uri: str, digest: str, mark: Path | None) -> str | None:
    try:
        found = store_digest(open_source(store_uri))
    except (GhoststreamError, OSError) as error:
        return f"cannot open the store ({error}); give a path or URL that all workers see"
    if found != digest:
        return f"has another store at {store_uri}; give a path or URL that is the same for all workers"
    if mark is not None and not mark.is_file():
        return f"does not see {mark.parent}; choose an output folder that all workers share"
    return None


def _said(answer: str | BaseException) -> str:
    return answer if isinstance(answer, str) else f"does not answer ({answer!r})"


@contextmanager
def _mark(folder: Path | None) -> Iterator[Path | None]:
    if folder is None:
        yield None
        return
    path = folder / f".{uuid.uuid4().hex}.seen"
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
