"""Which plans leave a model whose configuration can be written."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from ghoststream.errors import UnsupportedModelError
from ghoststream.recovery.config_surgery import prune_config
from ghoststream.spans import PruningPlan
from ghoststream.stages.session import ModelSession


def why_not_writable(session: ModelSession, plan: PruningPlan) -> str:
    """Say why what is left of a model has no configuration; empty if it has one.

    Some models tell the kinds of their layers by a period, which not every plan keeps (Jamba).
    """
    try:
        prune_config(session.skeleton.config, plan)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def writable(
    session: ModelSession, plans: Iterable[PruningPlan], most: int | None = None
) -> list[PruningPlan]:
    """Return those plans whose model can be written, in their order; the first ``most`` of them."""
    return list(islice((plan for plan in plans if not why_not_writable(session, plan)), most))
