"""The cells of the quality tables: what was removed by which rule, repaired how, fitted on what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ghoststream.options import Method

PAPER = "ghost"
DEFAULT = "auto"
JOINT = "hidden+mlp, sinks dropped"
SEQUENTIAL = f"{JOINT}, sequential"
PUBLISHED = "streamline-published"
"""What the paper's published code chooses layers by; with :data:`PAPER` the rival of every table."""

STREAMLINE, MEASURED = "streamline", "measured"

_DROP = "drop_sinks"
_LS = "least-squares"


@dataclass(frozen=True)
class Variant:
    """How boundaries are fitted; ``operator`` may be ``auto``.

    With ``sequential``, on the stream repaired so far in a pass of its own, not on the dense states of a store.
    """

    operator: str
    weights: str = "uniform"
    options: Method = field(default_factory=Method)
    sequential: bool = False


VARIANTS: dict[str, Variant] = {
    "pruned": Variant("none"),
    PAPER: Variant("ghost"),
    "ghost, svd": Variant("ghost", options=Method(solver="svd")),
    "ghost, per layer": Variant("ghost", options=Method(per_layer=True)),
    "ghost, sinks dropped": Variant("ghost", _DROP),
    "ghost, relative": Variant("ghost", "relative"),
    "least squares": Variant(_LS),
    "least squares, sinks dropped": Variant(_LS, _DROP),
    "least squares, sinks dropped, intercept": Variant(_LS, _DROP, Method(intercept=True)),
    "least squares, sinks dropped, towards zero": Variant(_LS, _DROP, Method(shrink="zero")),
    "least squares, sinks dropped, rank 144": Variant(_LS, _DROP, Method(rank=144)),
    "normed, sinks dropped": Variant(_LS, _DROP, Method(features="normed")),
    "hidden+normed, sinks dropped": Variant(_LS, _DROP, Method(features="hidden+normed")),
    "mlp, sinks dropped": Variant(_LS, _DROP, Method(features="mlp")),
    "mlp_output, sinks dropped": Variant(_LS, _DROP, Method(features="mlp_output")),
    JOINT: Variant(_LS, _DROP, Method(features="hidden+mlp")),
    SEQUENTIAL: Variant(_LS, _DROP, Method(features="hidden+mlp"), sequential=True),
    "diagonal": Variant("diagonal"),
    "scalar": Variant("scalar"),
    "symmetric": Variant("symmetric"),
    "orthogonal": Variant("orthogonal"),
    "LinearPatch, diagonal": Variant("linear-patch-diagonal"),
    "LinearPatch, rotated": Variant("linear-patch-rotated"),
    "Prune&Comp": Variant("prune-and-comp"),
    "ReplaceMe, least squares": Variant("replace-me-ls"),
    "ReplaceMe, least squares, sinks dropped": Variant("replace-me-ls", _DROP),
    "ReplaceMe, cosine": Variant("replace-me-cosine"),
    DEFAULT: Variant(DEFAULT),
}
"""Rows of the tables, in their order."""

CRITERIA = (
    STREAMLINE,
    "shortgpt",
    "shortgpt-published",
    "uidl",
    "uidl-all",
    "lorp",
    "residual",
    "magnitude-plus",
    "reverse",
    "perplexity",
    "taylor-plus",
    "sleb",
    "prune-and-repair",
)
"""Of tier 2, beside those of tier 1."""

CHOSEN_WITH = {"perplexity": 32, "taylor-plus": 32, "sleb": 8, "prune-and-repair": 16}
"""Windows that those criteria choose with that run the whole text through every candidate, or go layer by layer."""

STORED = 128
"""Windows of which a store is made; operators of fewer or more are fitted in a pass."""

SIZES = (8, 16, 32, 64, 128, 256)
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One model of the tables.

    Attributes:
        remove: How many layers are removed.
        selection: Name of a criterion.
        variant: Name of one of :data:`VARIANTS`.
        calibration: Name of a calibration text.
        sequences: Windows of it.
        seed: Which order its documents are in.
        ridge: Relative ridge of least squares, in the place of the variant's.
        selected_with: Windows that layers are chosen with, where it is not ``sequences``.
    """

    remove: int
    selection: str
    variant: str
    calibration: str = "c4"
    sequences: int = STORED
    seed: int = 0
    ridge: float | None = None
    selected_with: int | None = None

    @property
    def key(self) -> str:
        """What the cell is called in the file of figures."""
        ridge = "" if self.ridge is None else f" ridge {self.ridge:g}"
        chosen = "" if self.selected_with is None else f" chosen with {self.selected_with}"
        fitted = f"{self.calibration} {self.sequences} seed {self.seed}{chosen}"
        return f"{self.remove} by {self.selection}: {self.variant}{ridge} | {fitted}"


def tier_one() -> Iterator[Cell]:
    """Every operator, at the spans of the published code and of the formula, and at the one that is measured best."""
    for remove in (9, 12, 6):
        for selection in (PUBLISHED, STREAMLINE):
            yield Cell(remove, selection, "pruned")
            yield Cell(remove, selection, PAPER)
        yield Cell(remove, MEASURED, PAPER)
        yield Cell(remove, MEASURED, DEFAULT)
    for remove in (9, 12, 6):
        for variant in VARIANTS:
            for selection in (PUBLISHED, STREAMLINE, MEASURED):
                yield Cell(remove, selection, variant)


def tier_two() -> Iterator[Cell]:
    """Other criteria, 3 layers, another calibration text, and the curves."""
    rows = ("pruned", PAPER, DEFAULT)
    for criterion in CRITERIA:
        with_few = CHOSEN_WITH.get(criterion)
        yield from (Cell(9, criterion, variant, selected_with=with_few) for variant in (*rows, SEQUENTIAL))
    yield from (Cell(3, selection, variant) for selection in (PUBLISHED, MEASURED) for variant in rows)
    for remove in (6, 9, 12):
        for selection, variant in ((PUBLISHED, "pruned"), (PUBLISHED, PAPER), (MEASURED, DEFAULT)):
            yield Cell(remove, selection, variant, calibration="wikitext")
    base = Cell(9, MEASURED, "least squares, sinks dropped", selected_with=STORED)
    for size in SIZES:
        for variant in ("least squares, sinks dropped", "ghost, sinks dropped", JOINT):
            yield replace(base, variant=variant, sequences=size)
    yield from (replace(base, ridge=ridge) for ridge in RIDGES)


def tier_three() -> Iterator[Cell]:
    """What the tasks are run on, over three orders of the calibration text."""
    for seed in SEEDS:
        for remove in (9, 6):
            yield Cell(remove, PUBLISHED, "pruned", seed=seed)
            yield Cell(remove, PUBLISHED, PAPER, seed=seed)
            yield Cell(remove, MEASURED, DEFAULT, seed=seed)


TIERS = {1: tier_one, 2: tier_two, 3: tier_three}
