"""The formulas behind ``ghoststream plan`` for what is chosen in passes over the model: memory, disk and arithmetic.

Letters as in :mod:`ghoststream.stages.planning.costs`; ``K`` candidates, of which a share of the sequences is held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ghoststream.machine import free_host_memory
from ghoststream.stages.planning.costs import (
    cost_of,
    export_cost,
    export_needs,
    fit_memory,
    operator_bytes,
    pass_needs,
    solve_flops,
)
from ghoststream.stages.planning.figures import ModelSizes, Need, Request, StageCost
from ghoststream.stages.planning.machine import Rates
from ghoststream.stages.repair.auto import AUTO, LATER_METHODS, METHODS
from ghoststream.stages.searching.growth import partitions
from ghoststream.stages.searching.search import CANDIDATES, MAX_SPANS, REFINED, SEARCH_CRITERIA, UNFITTED
from ghoststream.statistics import taps_of

HELD_OUT = 0.25
"""Share of the sequences that candidates are measured on, by default."""


@dataclass(frozen=True, slots=True)
class PassLoad:
    """One pass over the model.

    Attributes:
        name: Stage that it belongs to.
        states: Elements of a token that wait between layers, at most.
        lanes: Work of its lanes, in dense passes over all sequences.
        fits: How many boundaries are fitted.
        backward: Whether it goes back too.
    """

    name: str
    states: float
    lanes: float
    fits: int
    backward: bool = False


def in_passes(request: Request) -> bool:
    """Say whether layers are chosen by running the model."""
    return request.criterion in SEARCH_CRITERIA


def pass_loads(sizes: ModelSizes, request: Request) -> tuple[PassLoad, ...]:
    """Return the passes of ``recover`` where layers are chosen by running the model, or the operator is ``auto``."""
    n_layers, removed, hidden = sizes.n_layers, request.n_remove, sizes.hidden
    loads: list[PassLoad] = []
    if request.criterion == "measured":
        loads += _growing(n_layers, removed, hidden, _most_spans(request))
    elif in_passes(request):
        loads += _choosing(n_layers, removed, hidden, request)
    if request.operator == AUTO and (not in_passes(request) or request.criterion not in UNFITTED):
        loads += _refining(n_layers, removed, hidden, request)
    loads.append(PassLoad("fit", _kept(request, hidden), (n_layers + 1) / (2 * n_layers), 1))
    return tuple(loads)


def _most_spans(request: Request) -> int:
    if request.criterion != "measured":
        return 1
    return min(request.max_spans or MAX_SPANS, request.n_remove)


def _growing(n_layers: int, removed: int, hidden: int, most: int) -> list[PassLoad]:
    """Return a pass for each span that is added; plans of all partitions grow in the same passes."""
    loads = []
    for step in range(most):
        lanes, states, fits = 1.0, float(hidden), 0
        for sizes in (sizes for sizes in partitions(removed, most) if step < len(sizes)):
            size = sizes[step]
            if step == 0:
                candidates = max(1, n_layers - 1 - size)
                # They stop one layer after the other: their tails make a triangle.
                lanes += HELD_OUT * candidates * (candidates + 1) / (2 * n_layers)
                states += hidden * (min(size, candidates) + HELD_OUT * candidates)
            else:
                standing = sum(sizes[:step])
                candidates = max(1, min(CANDIDATES, n_layers - 1 - size - standing - step * (size - 1)))
                stretch = max(0.0, n_layers - size - standing) / (step + 2) / n_layers
                # All sequences between the first and the last span, the held-out ones behind that.
                lanes += candidates * stretch * (step + HELD_OUT)
                states += hidden * candidates * (1 + HELD_OUT)
            fits += candidates * (step + 1)
        loads.append(PassLoad("search", states, lanes, fits))
    return loads


def _choosing(n_layers: int, removed: int, hidden: int, request: Request) -> list[PassLoad]:
    if request.criterion.startswith("taylor"):
        return [PassLoad("search", float(hidden) * (n_layers + 3), 4.0, 0, backward=True)]
    share = 1.0 if request.criterion in UNFITTED else HELD_OUT
    candidates = max(1, n_layers - 2)
    lanes = 1.0 + share * candidates * (candidates + 1) / (2 * n_layers)
    states = hidden * (2 + share * candidates)
    fits = 0 if request.criterion in UNFITTED else candidates
    passes = 1 if request.criterion == "perplexity" else removed
    return [PassLoad("search", states, lanes, fits)] * passes


def _refining(n_layers: int, removed: int, hidden: int, request: Request) -> list[PassLoad]:
    """Return a pass for each boundary at which ways to repair are compared."""
    spans, plans = _most_spans(request), REFINED if in_passes(request) else 1
    stretch = (n_layers - removed) / (spans + 1) / n_layers
    loads = []
    for decided in range(spans):
        later = spans - 1 - decided
        tried = LATER_METHODS if decided else METHODS
        repairs = plans * len(tried)
        tapped = sum(bool(taps_of(method.features)) for method in tried)
        lanes = 1.0 + stretch * (plans * decided + repairs * (later + HELD_OUT))
        states = hidden * (1 + plans + repairs * (1.0 if later else HELD_OUT))
        states += plans * tapped * (hidden + request.intermediate)
        if decided:
            # What fits on dense states waits at the boundary too, once with taps and once without.
            states += plans * (2 * hidden + request.intermediate)
        loads.append(
            PassLoad("search" if in_passes(request) else "fit", states, lanes, repairs * (later + 1))
        )
    return loads


def _kept(request: Request, hidden: int) -> float:
    taps = request.intermediate if request.reads_taps or request.operator == AUTO else 0
    return 3.0 * hidden + taps


def pass_route_needs(sizes: ModelSizes, request: Request, device: torch.device, out: Path) -> dict[str, Need]:
    """Return what memory and disk the passes and the export take, against what is free here."""
    loads = pass_loads(sizes, request)
    largest = max(loads, key=lambda load: load.states)
    needs = pass_needs(
        sizes,
        request,
        device,
        (f"S T {largest.states / sizes.hidden:.1f} C b", round(request.n_tokens * largest.states)),
        None,
    )
    fitted = stored_request(request)
    needs["memory, fit"] = Need(*fit_memory(sizes.hidden, fitted), free_host_memory())
    return needs | export_needs(sizes, fitted, out)


def pass_route_stages(sizes: ModelSizes, request: Request, rates: Rates | None) -> tuple[StageCost, ...]:
    """Return the work of the passes and of the export; times where rates are given."""
    dense = (
        request.n_tokens * (2.0 * sizes.layer_elements + 4.0 * request.length * sizes.hidden) * sizes.n_layers
    )
    fitted = stored_request(request)
    stages = []
    for name in ("search", "fit"):
        loads = [load for load in pass_loads(sizes, request) if load.name == name]
        if not loads:
            continue
        read = sum((2 if load.backward else 1) * sizes.checkpoint_bytes for load in loads)
        flops = sum(load.lanes * dense + load.fits * solve_flops(fitted, sizes.hidden) for load in loads)
        write = operator_bytes(fitted, sizes.hidden) if name == "fit" else 0
        stages.append(cost_of(name, read, write, flops, rates))
    return (*stages, export_cost(sizes, fitted, rates))


def fitted_by_passes(
    sizes: ModelSizes,
    request: Request,
    needs: Mapping[str, Need],
    stages: Sequence[StageCost],
    rates: Rates | None,
) -> tuple[dict[str, Need], tuple[StageCost, ...]]:
    """Return the needs and the work where layers are chosen from a store, and ``auto`` fits in passes over the model."""
    fitting = Need(*fit_memory(sizes.hidden, stored_request(request)), free_host_memory())
    kept = {name: need for name, need in needs.items() if name != "memory, solve"}
    passes = pass_route_stages(sizes, request, rates)
    *before, last = (stage for stage in stages if stage.name != "solve")
    return {**kept, "memory, fit": fitting}, (*before, *passes[:-1], last)


def stored_request(request: Request) -> Request:
    """Return the request with that of what ``auto`` tries which takes most, in its place."""
    if request.operator != AUTO:
        return request
    widest = "hidden+mlp" if request.intermediate else "hidden"
    return replace(request, operator="least-squares", features=widest)
