"""A Dask cluster that is asked to reduce: reaching it, checking its workers, explaining failures."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.errors import BudgetError, GhoststreamError, MismatchError, RequestError
from ghoststream.progress import Progress
from ghoststream.statistics.devices import require_device

if TYPE_CHECKING:
    from ghoststream.activations import StoreRef

_CONNECT_SECONDS = 30
_SHOWN = 3
_OWN = "ghoststream"
_LIBRARIES = (_OWN, "numpy", "scipy", "torch", "zarr")


@dataclass(frozen=True)
class Needs:
    """What range tasks need of every worker.

    Attributes:
        store: The store as this process sees it.
        folder: Where partial states are kept, or None.
        task_bytes: Peak memory of one task.
        device: The device that they compute on, or None.
    """

    store: StoreRef
    folder: Path | None
    task_bytes: int
    device: str | None = None


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

    Each runs this version of ghoststream; opens the store itself, and must find what this process finds; sees
    a file that is made in the folder for this moment; has memory for one task a thread, and the device if one
    is asked for.

    Raises:
        BudgetError: If a worker has too little memory.
        RequestError: If a worker runs another ghoststream, does not see the store or the folder, or lacks the
            device.
    """
    require_versions(client, progress)
    with _mark(needs.folder) as mark:
        found = client.run(_look, needs, mark, on_error="return")
    if not found:
        progress.log(f"the cluster at {client.scheduler.address} has no workers yet; waiting for the first")
    problems = {address: _said(answer) for address, answer in found.items() if answer is not None}
    if not problems:
        return
    msg = f"{len(problems)} of {len(found)} workers cannot reduce this store: {_listed(problems)}"
    raise (BudgetError if any(isinstance(found[name], _Memory) for name in problems) else RequestError)(msg)


def require_versions(client: Any, progress: Progress) -> None:
    """Compare the libraries of the workers that are there now with those of this process.

    Other numpy, scipy, torch or zarr are told as a warning: bits of the result may differ.

    Raises:
        RequestError: If a worker runs another version of ghoststream, whose sums may be other sums.
    """
    found = client.get_versions(packages=_LIBRARIES)
    here = found["client"]["packages"]
    others: dict[str, str] = {}
    libraries: dict[str, str] = {}
    for address, answer in found["workers"].items():
        there = answer["packages"]
        if there[_OWN] != here[_OWN]:
            others[address] = str(there[_OWN])
        differing = [name for name in _LIBRARIES if name != _OWN and there.get(name) != here.get(name)]
        if differing:
            libraries[address] = ", ".join(
                f"{name} {there.get(name)} (here {here[name]})" for name in differing
            )
    if others:
        msg = (
            f"{len(others)} of {len(found['workers'])} workers run another ghoststream than this process "
            f"({here[_OWN]}): {_listed(others)}; install one version everywhere, as sums of two versions "
            "must not be mixed"
        )
        raise RequestError(msg)
    if libraries:
        progress.log(
            f"warning: {len(libraries)} of {len(found['workers'])} workers have other libraries than this "
            "process, the result may differ from that of this machine in its last bits: "
            f"{_listed(libraries)}"
        )


def _listed(lines: Mapping[str, str]) -> str:
    shown = "; ".join(f"{address}: {text}" for address, text in sorted(lines.items())[:_SHOWN])
    return shown if len(lines) <= _SHOWN else f"{shown}; and {len(lines) - _SHOWN} more"


@contextmanager
def explained(what: str, remedy: str, again: str) -> Iterator[None]:
    """Say what a lost scheduler or a task that costs one worker after the other means.

    Args:
        what: A task, for messages.
        remedy: What to do then.
        again: How the work goes on.

    Raises:
        BudgetError: If a task ended several workers.
        RequestError: If the scheduler is gone.
    """
    from concurrent.futures import CancelledError

    from distributed.scheduler import KilledWorker

    try:
        yield
    except KilledWorker as error:
        msg = (
            f"{what} ended the workers that ran it ({error.task}), most often for lack of memory; {remedy}, "
            f"and {again}"
        )
        raise BudgetError(msg) from error
    except CancelledError as error:
        msg = (
            "the scheduler was lost, or the work was cancelled there; start it again if it is gone, and "
            f"{again}"
        )
        raise RequestError(msg) from error


class _Memory(str):
    """A problem of memory."""

    __slots__ = ()


async def _look(needs: Needs, mark: Path | None, dask_worker: Any) -> str | None:
    # Opening a store takes a while: on a thread, for the worker's event loop has to go on.
    seen = await asyncio.to_thread(_problem_of, needs, mark)
    if seen is not None:
        return seen
    limit, threads = dask_worker.memory_manager.memory_limit, dask_worker.state.nthreads
    if limit is None or threads * needs.task_bytes <= limit:
        return None
    return _Memory(
        f"{limit:,} bytes of memory for {threads} threads, each of which takes {needs.task_bytes:,} for a "
        "range; start workers with more memory or fewer threads"
    )


def _problem_of(needs: Needs, mark: Path | None) -> str | None:
    try:
        needs.store.open()
    except MismatchError:
        return f"has another store at {needs.store.uri}; give a path or URL that is the same for all workers"
    except (GhoststreamError, OSError) as error:
        return f"cannot open the store ({error}); give a path or URL that all workers see"
    if mark is not None and not mark.is_file():
        return f"does not see {mark.parent}; choose an output folder that all workers share"
    if needs.device is not None:
        try:
            require_device(needs.device)
        except RequestError as error:
            return str(error)
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
