"""The formulas behind ``ghoststream plan``: memory, disk and arithmetic of each stage.

``U`` is the largest of one decoder layer, the embedding and the head at compute dtype; ``L`` layers, hidden size
``C``, MLP width ``I``, ``S`` sequences of ``T`` tokens, micro-batch ``B``, ``b`` bytes an element.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ghoststream.stages.machine import Rates, free_device_memory, free_disk, free_host_memory

_BLOCK_TOKENS = 2048
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a checkpoint; bytes of parts are at compute dtype ``dtype``, ``checkpoint_bytes`` as stored."""

    root: Path
    model_type: str
    dtype: str
    n_layers: int
    hidden: int
    intermediate: int
    layer_bytes: int
    layer_elements: int
    stored_layer_bytes: int
    embedding_bytes: int
    head_bytes: int
    tied: bool
    unit_bytes: int
    checkpoint_bytes: int


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: the amount of text, what is stored, and how."""

    n_remove: int
    sequences: int
    length: int
    micro_batch: int
    operator: str
    store_dtype: str
    n_stored: int
    host_memory: int | None = None
    features: str = "hidden"

    @property
    def is_linear(self) -> bool:
        """Whether the operator is a matrix, which takes Gram and cross-moment."""
        return self.operator in ("ghost", "least-squares")

    def width(self, hidden: int) -> int:
        """Number of features p that the operator reads."""
        return 2 * hidden if self.features == "hidden+normed" else hidden

    @property
    def n_tokens(self) -> int:
        """Tokens of the calibration text, padding included."""
        return self.sequences * self.length


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that something takes, how they add up, and how many are free (``None``: not known)."""

    n_bytes: int
    formula: str
    available: int | None = None

    @property
    def fits(self) -> bool:
        """Whether it fits, as far as is known."""
        return self.available is None or self.n_bytes <= self.available


@dataclass(frozen=True, slots=True)
class StageCost:
    """Work of one stage; ``seconds`` and ``limited_by`` (``disk`` or ``compute``) where rates were measured."""

    name: str
    read_bytes: int
    write_bytes: int
    flops: float
    seconds: float | None = None
    limited_by: str | None = None


def all_needs(
    sizes: ModelSizes, request: Request, device: torch.device, store: Path | None, out: Path
) -> dict[str, Need]:
    """Return what memory and disk the run takes, against what is free here.

    Args:
        sizes: The checkpoint.
        request: What is asked.
        device: Where the layers run.
        store: Local place of the store; ``None`` if it is remote.
        out: Where the export goes.
    """
    itemsize = _ITEMSIZE.get(sizes.dtype, 4)
    host, needs = free_host_memory(), dict[str, Need]()
    states = request.n_tokens * sizes.hidden * itemsize
    if request.host_memory is not None and states > request.host_memory:
        needs["disk, scratch"] = Need(states, "S T C b", free_disk(Path(tempfile.gettempdir())))
        states = 0
    working = request.micro_batch * request.length * (6 * sizes.hidden + 3 * sizes.intermediate) * itemsize
    pass_bytes = round(2.5 * sizes.unit_bytes) + working
    if device.type == "cuda":
        needs["device memory"] = Need(
            pass_bytes + states, "2.5 U + S T C b + B T (6C + 3I) b", free_device_memory(device)
        )
        needs["memory, capture"] = Need(2 * sizes.unit_bytes, "2 U: layers on their way to the device", host)
    else:
        needs["memory, capture"] = Need(pass_bytes + states, "2.5 U + S T C b + B T (6C + 3I) b", host)
    needs["memory, solve"] = Need(*_solve_memory(sizes, request), host)
    needs["memory, export"] = Need(sizes.unit_bytes, "one tensor: at most U", host)
    needs["disk, store"] = Need(
        _store_bytes(sizes, request),
        f"{request.n_stored} S T C b",
        None if store is None else free_disk(store),
    )
    needs["disk, export"] = Need(
        _export_bytes(sizes, request), "checkpoint - N layers + operator", free_disk(out)
    )
    return needs


def describe_problem(name: str, need: Need) -> str:
    """Say what does not fit, by how much, and what to do."""
    free = need.available or 0
    advice = {
        "device memory": "use a smaller --micro-batch or fewer --sequences, or a larger device",
        "memory, capture": "use --host-memory, fewer --sequences, a smaller --micro-batch or a smaller --dtype",
        "disk, scratch": "set TMPDIR to a larger disk, or use fewer --sequences",
        "memory, solve": "use --operator linear-patch-diagonal, or run it on a machine with more memory",
        "disk, store": "use fewer --sequences, a smaller --store-dtype, only the needed --layers, or another --store",
        "disk, export": "free some space or write --out to another disk",
    }.get(name, "use a machine with more memory")
    return f"{name} needs {need.n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; {advice}"


def stage_costs(sizes: ModelSizes, request: Request, rates: Rates | None) -> tuple[StageCost, ...]:
    """Return the work of each stage, with times where rates are given.

    FLOPs of the pass: 2 per weight and token, and ``4 T C`` per token and layer for attention (every expert of a
    mixture is counted, so mixtures come out too slow). Solving: ``p^2 + 2 p C`` per token and ``2 p^3 + p^2 C`` in
    float64 for p features, and ``40 p^3`` where folds choose the ridge (four eigendecompositions).
    """
    n_tokens, hidden = request.n_tokens, sizes.hidden
    store, position = _store_bytes(sizes, request), _store_bytes(sizes, request) // max(request.n_stored, 1)
    layer_flops = n_tokens * (2.0 * sizes.layer_elements + 4.0 * request.length * hidden)
    solve_flops = _solve_flops(request, hidden)
    export = _export_bytes(sizes, request)
    compute, float64 = (rates.compute, rates.float64) if rates is not None else (None, None)
    disk = rates.disk if rates is not None else None
    return (
        _cost("capture", sizes.checkpoint_bytes, store, layer_flops * sizes.n_layers, disk, compute),
        _cost("select", store, 0, 6.0 * n_tokens * hidden * sizes.n_layers, disk, float64),
        _cost("solve", 2 * position, _operator_bytes(request, hidden), solve_flops, disk, float64),
        _cost("export", export, export, 0.0, disk, compute),
    )


def _cost(
    name: str, read: int, write: int, flops: float, disk: float | None, compute: float | None
) -> StageCost:
    if disk is None or compute is None:
        return StageCost(name, read, write, flops)
    # Reading and computing overlap; writes are taken to be as fast as reads.
    on_disk, computing = (read + write) / max(disk, 1.0), flops / max(compute, 1.0)
    seconds = max(read / max(disk, 1.0), computing) + write / max(disk, 1.0)
    return StageCost(name, read, write, flops, seconds, "disk" if on_disk >= computing else "compute")


def _solve_memory(sizes: ModelSizes, request: Request) -> tuple[int, str]:
    c = sizes.hidden
    if request.operator == "ghost":
        reducing = 16 * c**2 + 4 * _BLOCK_TOKENS * 8 * c
        return max(56 * c**2, reducing), "max(56 C^2, (16 C^2 + 65,536 C) for one worker)"
    if request.is_linear:
        # Folds choose the ridge: 48 p^2 + 32 p C.
        of_gram, of_solve, p = (16, 80, "C") if request.width(c) == c else (48, 256, "2 C")
        reducing = of_gram * c**2 + 8 * _BLOCK_TOKENS * 8 * c
        formula = f"max({of_solve} C^2, ({of_gram} C^2 + 131,072 C) for one worker), as p = {p}"
        return max(of_solve * c**2, reducing), formula
    return 4 * _BLOCK_TOKENS * 8 * c, "65,536 C for one worker: blocks of 2,048 tokens in float64"


def _store_bytes(sizes: ModelSizes, request: Request) -> int:
    # Per token: 4 bytes of id, 1 of mask; per sequence 4 of length.
    tokens = 5 * request.n_tokens + 4 * request.sequences
    return request.n_stored * request.n_tokens * sizes.hidden * _ITEMSIZE.get(request.store_dtype, 4) + tokens


def _export_bytes(sizes: ModelSizes, request: Request) -> int:
    operator = _operator_bytes(request, sizes.hidden)
    return sizes.checkpoint_bytes - request.n_remove * sizes.stored_layer_bytes + operator


def _operator_bytes(request: Request, hidden: int) -> int:
    if request.is_linear:
        return 4 * hidden * request.width(hidden)
    return 0 if request.operator == "none" else 4 * hidden


def _solve_flops(request: Request, hidden: int) -> float:
    if request.is_linear:
        p = float(request.width(hidden))
        choosing = 40.0 * p**3 if request.operator == "least-squares" else 0.0
        return request.n_tokens * (p**2 + 2 * p * hidden) + 2 * p**3 + p**2 * hidden + choosing
    return 0.0 if request.operator == "none" else request.n_tokens * 4.0 * hidden
