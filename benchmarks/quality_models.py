"""The models of the quality tables: layers removed by which criterion, repaired how, fitted on which text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ghoststream.options import Method

PAPER = "ghost"
DEFAULT = "auto"
JOINT = "hidden+mlp, sinks dropped"
SEQUENTIAL = f"{JOINT}, sequential"
PUBLISHED = "streamline-published"
"""Criterion of the paper's published code; with :data:`PAPER` the published method, the rival everywhere."""

STREAMLINE, MEASURED = "streamline", "measured"

_DROP = "drop_sinks"
_LS = "least-squares"


def _least_squares(**options: str | int | bool) -> Method:
    """Return least squares with sinks dropped, and more options."""
    return Method.make({"operator": _LS, "token_weights": _DROP, **options})


REPAIRS: dict[str, Method] = {
    "pruned": Method(operator="none"),
    PAPER: Method(operator="ghost"),
    "ghost, svd": Method(operator="ghost", solver="svd"),
    "ghost, per layer": Method(operator="ghost", per_layer=True),
    "ghost, sinks dropped": Method(operator="ghost", token_weights=_DROP),
    "ghost, relative": Method(operator="ghost", token_weights="relative"),
    "least squares": Method(operator=_LS),
    "least squares, sinks dropped": _least_squares(),
    "least squares, sinks dropped, intercept": _least_squares(intercept=True),
    "least squares, sinks dropped, towards zero": _least_squares(shrink="zero"),
    "least squares, sinks dropped, rank 144": _least_squares(rank=144),
    "normed, sinks dropped": _least_squares(features="normed"),
    "hidden+normed, sinks dropped": _least_squares(features="hidden+normed"),
    "mlp, sinks dropped": _least_squares(features="mlp"),
    "mlp_output, sinks dropped": _least_squares(features="mlp_output"),
    JOINT: _least_squares(features="hidden+mlp"),
    SEQUENTIAL: _least_squares(features="hidden+mlp"),
    "diagonal": Method(operator="diagonal"),
    "scalar": Method(operator="scalar"),
    "symmetric": Method(operator="symmetric"),
    "orthogonal": Method(operator="orthogonal"),
    "LinearPatch, diagonal": Method(operator="linear-patch-diagonal"),
    "LinearPatch, rotated": Method(operator="linear-patch-rotated"),
    "Prune&Comp": Method(operator="prune-and-comp"),
    "ReplaceMe, least squares": Method(operator="replace-me-ls"),
    "ReplaceMe, least squares, sinks dropped": Method(operator="replace-me-ls", token_weights=_DROP),
    "ReplaceMe, cosine": Method(operator="replace-me-cosine"),
    DEFAULT: Method(operator="auto"),
}
"""Rows of the tables, in their order."""

IN_PASSES = (SEQUENTIAL, DEFAULT)
"""Repairs that are fitted in passes, on the stream repaired so far; the others are fitted from a store."""

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
"""Criteria of tier 2, beside those of tier 1."""

CHOSEN_WITH = {"perplexity": 32, "taylor-plus": 32, "sleb": 8, "prune-and-repair": 16}
"""Windows of the criteria that run the whole text through every candidate, or go layer by layer."""

STORED = 128
"""Windows of a store; operators of fewer or more are fitted in a pass."""

SIZES = (8, 16, 32, 64, 128, 256)
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class PrunedModel:
    """One model of the tables.

    Attributes:
        remove: Number of layers that are removed.
        criterion: Chooses the layers.
        repair: Name of one of :data:`REPAIRS`.
        calibration: Name of a calibration text.
        sequences: Windows of it.
        seed: Order of its documents.
        ridge: Relative ridge of least squares, in the place of the repair's.
        selected_with: Windows to choose layers with, where it is not ``sequences``.
    """

    remove: int
    criterion: str
    repair: str
    calibration: str = "c4"
    sequences: int = STORED
    seed: int = 0
    ridge: float | None = None
    selected_with: int | None = None

    @property
    def key(self) -> str:
        """Name of the model in the file of figures."""
        ridge = "" if self.ridge is None else f" ridge {self.ridge:g}"
        chosen = "" if self.selected_with is None else f" chosen with {self.selected_with}"
        fitted = f"{self.calibration} {self.sequences} seed {self.seed}{chosen}"
        return f"{self.remove} by {self.criterion}: {self.repair}{ridge} | {fitted}"

    @property
    def method(self) -> Method:
        """The options of its fit."""
        method = REPAIRS[self.repair]
        return method if self.ridge is None else method.model_copy(update={"ridge": self.ridge})


def published_method(model: PrunedModel) -> PrunedModel:
    """Return the rival of a model: the published method, for as many layers, fitted on the same text."""
    same = {name: getattr(model, name) for name in ("calibration", "sequences", "seed")}
    return PrunedModel(model.remove, PUBLISHED, PAPER, **same)


def tier_one() -> Iterator[PrunedModel]:
    """Every repair, at the spans of the published code, of the formula, and of the search that measures."""
    for remove in (9, 12, 6):
        for criterion in (PUBLISHED, STREAMLINE):
            yield PrunedModel(remove, criterion, "pruned")
            yield PrunedModel(remove, criterion, PAPER)
        yield PrunedModel(remove, MEASURED, PAPER)
        yield PrunedModel(remove, MEASURED, DEFAULT)
    for remove in (9, 12, 6):
        for repair in REPAIRS:
            for criterion in (PUBLISHED, STREAMLINE, MEASURED):
                yield PrunedModel(remove, criterion, repair)


def tier_two() -> Iterator[PrunedModel]:
    """Other criteria, 3 layers, another calibration text, and the curves."""
    rows = ("pruned", PAPER, DEFAULT)
    for criterion in CRITERIA:
        few = CHOSEN_WITH.get(criterion)
        yield from (PrunedModel(9, criterion, repair, selected_with=few) for repair in (*rows, SEQUENTIAL))
    yield from (PrunedModel(3, criterion, repair) for criterion in (PUBLISHED, MEASURED) for repair in rows)
    for remove in (6, 9, 12):
        for criterion, repair in ((PUBLISHED, "pruned"), (PUBLISHED, PAPER), (MEASURED, DEFAULT)):
            yield PrunedModel(remove, criterion, repair, calibration="wikitext")
    base = PrunedModel(9, MEASURED, "least squares, sinks dropped", selected_with=STORED)
    for size in SIZES:
        for repair in ("least squares, sinks dropped", "ghost, sinks dropped", JOINT):
            yield replace(base, repair=repair, sequences=size)
    yield from (replace(base, ridge=ridge) for ridge in RIDGES)


def tier_three() -> Iterator[PrunedModel]:
    """Models that the tasks are run on, over three orders of the calibration text."""
    for seed in SEEDS:
        for remove in (9, 6):
            yield PrunedModel(remove, PUBLISHED, "pruned", seed=seed)
            yield PrunedModel(remove, PUBLISHED, PAPER, seed=seed)
            yield PrunedModel(remove, MEASURED, DEFAULT, seed=seed)


TIERS = {1: tier_one, 2: tier_two, 3: tier_three}
