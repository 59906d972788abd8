"""The formulas behind ``ghoststream plan``: memory, disk and arithmetic of each stage.

``U`` is the largest of one decoder layer, the embedding and the head at compute dtype; ``L`` layers, hidden size
``C``, widest matrix of a layer ``I``, ``S`` sequences of ``T`` tokens, micro-batch ``B``, ``b`` bytes an element.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ghoststream.machine import free_device_memory, free_disk, free_host_memory
from ghoststream.stages.planning.figures import STRUCTURED, ModelSizes, Need, Request, StageCost
from ghoststream.stages.planning.machine import Rates
from ghoststream.stages.planning.selection_costs import SelectionShape, SelectionWork, selection_work
from ghoststream.stages.planning.sweep_costs import SweepCost

_PASS_FORMULA = "2 U + max(U / 2, B T (4 I + 8 C) b)"
_ROTATED = "linear-patch-rotated"
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def all_needs(
    sizes: ModelSizes,
    request: Request,
    sweeps: Sequence[SweepCost],
    *,
    device: torch.device,
    store: Path | None,
    out: Path,
) -> dict[str, Need]:
    """Return what memory and disk the run takes, against what is free here.

    Args:
        sizes: The checkpoint.
        request: What is asked.
        sweeps: The sweeps over the store for moments.
        device: Where the layers run.
        store: Local place of the store; ``None`` if it is remote.
        out: Where the export goes.
    """
    host = free_host_memory()
    states = ("S T C b", request.n_tokens * sizes.hidden * _ITEMSIZE.get(sizes.dtype, 4))
    needs = pass_needs(sizes, request, device, states, store, stage="capture")
    selection = _selection_work(sizes, request)
    needs["memory, select"] = Need(*selection.memory, host)
    if selection.disk[0]:
        needs["disk, select"] = Need(*selection.disk, free_disk(out))
    needs["memory, solve"] = Need(*_solve_memory(sizes, request, sweeps), host)
    if request.reads_taps:
        needs["disk, taps"] = Need(
            _tap_bytes(sizes, request), "S T p b a boundary, while solving", free_disk(out)
        )
    needs["disk, store"] = Need(
        _store_bytes(sizes, request),
        f"{request.n_stored} S T C b",
        None if store is None else free_disk(store),
    )
    return needs | export_needs(sizes, request, out)


def pass_needs(
    sizes: ModelSizes,
    request: Request,
    device: torch.device,
    states: tuple[str, int],
    store: Path | None,
    *,
    stage: str = "search",
) -> dict[str, Need]:
    """Return what a pass takes, and where its hidden states lie: device, host or scratch, as fits.

    Args:
        sizes: The checkpoint.
        request: What is asked.
        device: Where the layers run.
        states: Formula and bytes of the states that wait between layers.
        store: Local place of the store, if one is made.
        stage: Which stage the pass is of.
    """
    host = f"memory, {stage}"
    work = max(sizes.unit_bytes // 2, request.micro_batch * request.length * sizes.work_bytes)
    limits = {host: _least(request.host_memory, free_host_memory())}
    parts = {host: (2 * sizes.unit_bytes + work, _PASS_FORMULA)}
    if device.type != "cpu":
        free = _least(request.device_memory, free_device_memory(device))
        limits = {"device memory": free, **limits}
        parts = {"device memory": parts[host], host: (2 * sizes.unit_bytes, "2 U")}
    needs = {name: Need(*part, limits[name]) for name, part in parts.items()}
    formula, n_bytes = states
    for name, need in needs.items():
        if need.available is None or need.n_bytes + n_bytes <= need.available:
            needs[name] = Need(need.n_bytes + n_bytes, f"{need.formula} + {formula}", need.available)
            return needs
    place = request.scratch or store or Path(tempfile.gettempdir())
    needs["disk, scratch"] = Need(n_bytes, formula, free_disk(place))
    return needs


def export_needs(sizes: ModelSizes, request: Request, out: Path) -> dict[str, Need]:
    """Return what writing the checkpoint takes."""
    return {
        "memory, export": Need(sizes.unit_bytes, "one tensor: at most U", free_host_memory()),
        "disk, export": Need(
            _export_bytes(sizes, request), "checkpoint - N layers + operator", free_disk(out)
        ),
    }


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def describe_problem(name: str, need: Need) -> str:
    """Say what does not fit, by how much, and what to do."""
    free = need.available or 0
    advice = {
        "device memory": "use a smaller --micro-batch, a shorter --length or a smaller --dtype, or a larger device",
        "memory, capture": "use a smaller --micro-batch, a shorter --length or a smaller --dtype",
        "disk, scratch": "set --scratch to a larger disk, or use fewer --sequences",
        "memory, search": "use a smaller --micro-batch, a shorter --length or a smaller --dtype",
        "memory, fit": "use --operator ghost or linear-patch-diagonal, or run it on a machine with more memory",
        "memory, select": "use --criterion streamline, or run it on a machine with more memory",
        "disk, select": "use --criterion residual-in-sample or streamline, or write --out to another disk",
        "memory, solve": "use --operator linear-patch-diagonal, or run it on a machine with more memory",
        "disk, taps": "use fewer --sequences, or write the operators to another disk",
        "disk, store": "use fewer --sequences, a smaller --store-dtype, only the needed --layers, or another --store",
        "disk, export": "free some space or write --out to another disk",
    }.get(name, "use a machine with more memory")
    return f"{name} needs {need.n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; {advice}"


def stage_costs(
    sizes: ModelSizes, request: Request, rates: Rates | None, sweeps: Sequence[SweepCost]
) -> tuple[StageCost, ...]:
    """Return the work of each stage, with times where rates are given.

    Where moments are reduced, hidden states are read as often as the sweeps say.

    FLOPs of the pass: 2 per weight and token, and ``4 T C`` per token and layer for attention (every expert of a
    mixture is counted, so mixtures come out too slow). Solving: ``p^2 + 2 p C`` per token and ``2 p^3 + p^2 C`` in
    float64 for p features, and ``40 p^3`` for all but ``ghost`` and ReplaceMe's (four eigendecompositions); ``80 p C`` per token
    for ReplaceMe's cosine, which goes over all tokens ten times, twice.
    """
    n_tokens, hidden = request.n_tokens, sizes.hidden
    store, position = _store_bytes(sizes, request), _store_bytes(sizes, request) // max(request.n_stored, 1)
    layer_flops = n_tokens * (2.0 * sizes.layer_elements + 4.0 * request.length * hidden)
    positions = {
        name: sum(c.positions_read for c in sweeps if c.stage == name) for name in ("select", "solve")
    }
    selection = _selection_work(sizes, request)
    return (
        cost_of("capture", sizes.checkpoint_bytes, store, layer_flops * sizes.n_layers, rates),
        cost_of(
            "select",
            positions["select"] * position or selection.read_bytes,
            selection.disk[0],
            selection.flops,
            rates,
            double=True,
        ),
        cost_of(
            "solve",
            positions["solve"] * position,
            operator_bytes(request, hidden),
            solve_flops(request, hidden),
            rates,
            double=True,
        ),
        export_cost(sizes, request, rates),
    )


def export_cost(sizes: ModelSizes, request: Request, rates: Rates | None) -> StageCost:
    """Return the work of writing the checkpoint."""
    n_bytes = _export_bytes(sizes, request)
    return cost_of("export", n_bytes, n_bytes, 0.0, rates)


def cost_of(
    name: str, read: int, write: int, flops: float, rates: Rates | None, *, double: bool = False
) -> StageCost:
    """Return the work of a stage, and its time where rates are given; ``double``: its arithmetic is in float64."""
    if rates is None:
        return StageCost(name, read, write, flops)
    disk, compute = max(rates.disk, 1.0), max(rates.float64 if double else rates.compute, 1.0)
    # Reading and computing overlap; writes are taken to be as fast as reads.
    on_disk, computing = (read + write) / disk, flops / compute
    seconds = max(read / disk, computing) + write / disk
    return StageCost(name, read, write, flops, seconds, "disk" if on_disk >= computing else "compute")


def _selection_work(sizes: ModelSizes, request: Request) -> SelectionWork:
    shape = SelectionShape(
        n_layers=sizes.n_layers,
        hidden=sizes.hidden,
        n_remove=request.n_remove,
        n_tokens=request.n_tokens,
        length=request.length,
        store_bytes=_store_bytes(sizes, request),
        layer_bytes=sizes.stored_layer_bytes,
        layer_elements=sizes.layer_elements,
    )
    return selection_work(request.criterion, shape)


def _solve_memory(sizes: ModelSizes, request: Request, sweeps: Sequence[SweepCost]) -> tuple[int, str]:
    """Return the larger of what a fit takes and what a task of one worker takes, as the engine counts it."""
    fitting, formula = fit_memory(sizes.hidden, request)
    task = max((cost.task_bytes for cost in sweeps if cost.stage == "solve"), default=0)
    return max(fitting, task), f"max({formula} to fit, {task:,} to reduce with one worker)"


def fit_memory(c: int, request: Request) -> tuple[int, str]:
    """Return bytes and formula of fitting one boundary from its moments, hidden size ``c``."""
    if request.operator == "ghost":
        return 56 * c**2, "56 C^2"
    if request.operator in STRUCTURED:
        return 104 * c**2, "104 C^2"
    if request.operator == _ROTATED:
        return 24 * c**2, "24 C^2"
    if not request.is_linear:
        return 8 * c, "8 C"
    p = request.width(c)
    if request.solver in ("sketch-features", "sketch-range"):
        of_gram = 24 if request.solver == "sketch-range" else 0
        return of_gram * p**2 + 16 * p * c, f"{of_gram} p^2 + 16 p C, as p = {p:,}"
    # Folds choose the ridge of least squares.
    of_gram = 24 if request.is_replace_me else 48
    return of_gram * p**2 + 32 * p * c, f"{of_gram} p^2 + 32 p C, as p = {p:,}"


def _store_bytes(sizes: ModelSizes, request: Request) -> int:
    # Per token: 4 bytes of id, 1 of mask; per sequence 4 of length.
    tokens = 5 * request.n_tokens + 4 * request.sequences
    return request.n_stored * request.n_tokens * sizes.hidden * _ITEMSIZE.get(request.store_dtype, 4) + tokens


def _tap_bytes(sizes: ModelSizes, request: Request) -> int:
    return request.n_tokens * request.width(sizes.hidden) * _ITEMSIZE.get(sizes.dtype, 4)


def _export_bytes(sizes: ModelSizes, request: Request) -> int:
    operator = 0 if request.reads_taps else operator_bytes(request, sizes.hidden)
    if request.features == "hidden+mlp":
        operator = 4 * sizes.hidden**2  # the rest is absorbed
    return sizes.checkpoint_bytes - request.n_remove * sizes.stored_layer_bytes + operator


def operator_bytes(request: Request, hidden: int) -> int:
    """Return the bytes of an operator of one boundary."""
    if request.is_linear or request.operator == _ROTATED:
        return 4 * hidden * request.width(hidden)
    return 0 if request.operator == "none" else 4 * hidden


def solve_flops(request: Request, hidden: int) -> float:
    """Return the arithmetic of fitting one boundary."""
    if request.is_linear:
        p = float(request.width(hidden))
        choosing = 0.0 if request.operator == "ghost" or request.is_replace_me else 40.0 * p**3
        if request.operator.startswith("replace-me-cosine"):
            choosing = 80.0 * request.n_tokens * p * hidden
        return request.n_tokens * (p**2 + 2 * p * hidden) + 2 * p**3 + p**2 * hidden + choosing
    return 0.0 if request.operator == "none" else request.n_tokens * 4.0 * hidden
