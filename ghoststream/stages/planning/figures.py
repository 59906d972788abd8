"""What ``ghoststream plan`` is asked, and what it finds: sizes of a model, a request, needs and costs of stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ghoststream.options import Solver
from ghoststream.statistics import taps_of

STRUCTURED = ("symmetric", "orthogonal")
"""Families that are least squares over some of the linear maps."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a checkpoint; bytes of parts are at compute dtype ``dtype``, ``checkpoint_bytes`` as stored.

    ``work_bytes`` is what a layer at work holds a token.
    """

    root: Path
    model_type: str
    dtype: str
    n_layers: int
    hidden: int
    work_bytes: int
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
    features: str = "hidden"
    criterion: str = "streamline"
    device_memory: int | None = None
    host_memory: int | None = None
    scratch: Path | None = None
    intermediate: int = 0
    """Width I of what enters ``down_proj``, where features read it."""
    solver: Solver = "gram"
    max_spans: int | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the operator is a matrix, which takes Gram and cross-moment."""
        return self.operator in ("ghost", "least-squares", *STRUCTURED) or self.is_replace_me

    @property
    def is_replace_me(self) -> bool:
        """Whether the operator is one of ReplaceMe's."""
        return self.operator.startswith("replace-me")

    @property
    def reads_taps(self) -> bool:
        """Whether the layer before a boundary is run again for its taps, and the operator absorbed into it, all or in part."""
        return self.is_replace_me or bool(taps_of(self.features))

    def width(self, hidden: int) -> int:
        """Number of features p that the operator reads."""
        widths = {
            "hidden+normed": 2 * hidden,
            "mlp": self.intermediate,
            "hidden+mlp": hidden + self.intermediate,
        }
        return widths.get(self.features, hidden)

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
