"""What choosing the layers takes, for each criterion: reads, arithmetic, memory and disk."""

from __future__ import annotations

from dataclasses import dataclass

_BLOCK_TOKENS = 2048
_PAIR_TOKENS = 1024
_RANGES_A_FOLD = 4
_HELD_OUT_FOLDS = 4


@dataclass(frozen=True, slots=True)
class SelectionShape:
    """Sizes that the work depends on; ``store_bytes`` of all stored hidden states, the layer's as stored."""

    n_layers: int
    hidden: int
    n_remove: int
    n_tokens: int
    length: int
    store_bytes: int
    layer_bytes: int
    layer_elements: int


@dataclass(frozen=True, slots=True)
class SelectionWork:
    """Bytes read, FLOPs in float64, and what is held: bytes and how they add up; ``disk`` is (0, "") for none."""

    read_bytes: int
    flops: float
    memory: tuple[int, str]
    disk: tuple[int, str] = (0, "")


def selection_work(criterion: str, shape: SelectionShape) -> SelectionWork:
    """Return the work of a criterion, for one worker; criteria of the user count as ``shortgpt``."""
    layers, c, n_tokens = shape.n_layers, shape.hidden, shape.n_tokens
    candidates = max(1, layers - shape.n_remove - 1)
    if criterion.startswith("reverse"):
        return SelectionWork(0, 0.0, (0, "nothing"))
    if criterion.startswith("magnitude"):
        block = shape.layer_bytes
        return SelectionWork(
            layers * block, 2.0 * layers * shape.layer_elements, (block, "at most one layer")
        )
    if criterion.startswith("residual"):
        return _residual_work(criterion, shape, candidates)
    if criterion == "lorp":
        held = 4 * layers * shape.length * c
        return SelectionWork(
            shape.store_bytes, 2.0 * layers**2 * c * n_tokens, (held, "4 L T C for one worker")
        )
    live = 3 if criterion in ("shortgpt", "shortgpt-published") else shape.n_remove + 2
    spans = ("streamline", "streamline-published", "uidl", "uidl-all")
    pairs = candidates if criterion in spans else layers
    # Cosines of channels are taken sequence by sequence.
    rows = shape.length if criterion.endswith("-published") else max(_PAIR_TOKENS, shape.length)
    formula = f"4 C ({live} x {rows:,}) for one worker"
    return SelectionWork(shape.store_bytes, 6.0 * pairs * c * n_tokens, (4 * live * rows * c, formula))


def _residual_work(criterion: str, shape: SelectionShape, candidates: int) -> SelectionWork:
    c = shape.hidden
    folds = _HELD_OUT_FOLDS if criterion == "residual" else 1
    solves = folds + 1 if folds > 1 else 1
    flops = candidates * (3.0 * c**2 * shape.n_tokens + solves * 7.0 / 3.0 * c**3)
    least = max(56 * c**2, 16 * c**2 + 8 * max(_BLOCK_TOKENS, shape.length) * 8 * c)
    formula = "max(56 C^2, 16 C^2 + 131,072 C) at least, for one worker and one candidate at a time"
    # One state a fold when it is finished, and while it is at work one of every level of its tree.
    states = folds * (_RANGES_A_FOLD.bit_length() + 1)
    disk = states * candidates * 16 * c**2, f"{states} x 16 C^2 for each of {candidates} candidates"
    return SelectionWork(shape.store_bytes, flops, (least, formula), disk)
