"""A model on a worker: the one that the process opened which hands out the shares, and what is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ghoststream.errors import MismatchError
from ghoststream.options import Compute
from ghoststream.progress import Progress
from ghoststream.stages.session import ModelSession

Found = TypeVar("Found")


@dataclass(frozen=True)
class Answer(Generic[Found]):
    """What a share gives.

    Attributes:
        found: What it was asked for.
        tensors: Digests of the tensors that its passes have read.
        lines: What it logged.
    """

    found: Found
    tensors: Mapping[str, str]
    lines: Sequence[str]


def open_shared(compute: Compute, model: str, digest: str) -> ModelSession:
    """Open the model of a share.

    Args:
        compute: How the worker runs it.
        model: What the other process called it.
        digest: Digest of the fingerprint that it found.

    Raises:
        MismatchError: If the model is another one.
        GhoststreamError: What opening it raises.
    """
    session = ModelSession(model, compute)
    if session.fingerprint["digest"] != digest:
        msg = f"a worker finds another model at {model} than this process; give a path that all workers share"
        raise MismatchError(msg)
    return session


def answer(found: Found, session: ModelSession, lines: Sequence[str]) -> Answer[Found]:
    """Return what a share found, with the digests of the tensors that its passes have read."""
    digests, names = session.skeleton.reader.digests, session.skeleton.sources()
    missing = set(digests.missing(names))
    return Answer(found, digests.of([name for name in names if name not in missing]), tuple(lines))


def accepted(
    answers: Sequence[Answer[Found]], session: ModelSession, since: str, progress: Progress
) -> list[Found]:
    """Return what all shares found, if they read the same weights.

    Args:
        answers: Of the shares, in order.
        session: The model, as this process has it.
        since: What a worker did, for messages.
        progress: Is told what the workers logged, each line once.

    Raises:
        CheckpointError: If a tensor is not what another worker, or this process, read.
    """
    for one in answers:
        session.expect({"tensors": one.tensors}, since)
    for line in dict.fromkeys(line for one in answers for line in one.lines):
        progress.log(line)
    return [one.found for one in answers]
