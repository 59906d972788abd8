"""A model on a worker: the one that the process opened which hands out the shares."""

from __future__ import annotations

from ghoststream.errors import MismatchError
from ghoststream.options import Compute
from ghoststream.stages.session import ModelSession


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


def tensors_read(session: ModelSession) -> dict[str, str]:
    """Return the digests of the tensors that the passes of a share have read."""
    digests, names = session.skeleton.reader.digests, session.skeleton.sources()
    missing = set(digests.missing(names))
    return digests.of([name for name in names if name not in missing])
