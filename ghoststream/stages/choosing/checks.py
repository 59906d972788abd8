"""What choosing and repairing refuse before a model is opened. Neither torch nor transformers is imported."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.errors import RequestError
from ghoststream.options import AUTO, Method, Search
from ghoststream.registry import unknown_name
from ghoststream.selection import criterion_names
from ghoststream.stages.choosing.criteria import (
    MEASURED,
    SearchCriterion,
    make_search_criterion,
    search_criterion_names,
)
from ghoststream.stages.choosing.repair import passing_method


def named_method(method: Method) -> Method | None:
    """Return how boundaries are fitted where an operator is named; None for ``auto``, which is the default.

    Raises:
        RequestError: If there is no such operator, it does not take the options, or ``auto`` is given any.
    """
    if not method.is_named:
        others = set(Method.model_fields) - {"operator", "refit"}
        method.refuse(others, f"it is for a named --operator, and {AUTO} chooses it at each boundary")
        return None
    return passing_method(method)


def require_shareable(method: Method, known: Sequence[Method] = ()) -> None:
    """Check that workers can share the sequences of a fit.

    Args:
        method: How boundaries are fitted.
        known: How the plan's file says that they are.

    Raises:
        RequestError: If layers are to be fitted anew.
    """
    if method.refit or (not method.given(("refit",)) and any(one.refit for one in known)):
        msg = (
            "--refit fits the layers behind a gap anew in one pass over all windows, which several devices "
            "or workers cannot share; name one --device and leave --scheduler out, or fit with --refit 0"
        )
        raise RequestError(msg)


def check_search(
    n_layers: int, remove: int, search: Search, method: Method
) -> tuple[SearchCriterion, Method | None]:
    """Find what a search cannot do before the text is read.

    Returns:
        The criterion, and how it repairs candidates; None for ``auto``.

    Raises:
        RequestError: If there is something.
    """
    rule = make_search_criterion(search.criterion or MEASURED)
    rule.check(n_layers, remove, search)
    return rule, named_method(method) if rule.repairs else None


def require_criterion(name: str, *, runs_model: bool) -> str:
    """Return the name of a criterion, checked against where hidden states come from.

    Raises:
        RequestError: If there is none of this name, or it needs the other source.
    """
    running, reading = search_criterion_names(), criterion_names()
    if name not in (*running, *reading):
        msg = unknown_name("criterion", name, sorted((*running, *reading)))
        raise RequestError(msg)
    if runs_model and name not in running:
        msg = (
            f"the criterion {name} reads a store; capture one and give --store in the place of --calibration"
        )
        raise RequestError(msg)
    if not runs_model and name not in reading:
        msg = f"the criterion {name} runs the model; give --calibration in the place of --store"
        raise RequestError(msg)
    return name
