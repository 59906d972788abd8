"""What a report knows of a run: typed, from whatever files there are; None where a run did not record it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ghoststream.recovery.training import told_training
from ghoststream.spans import PruningPlan, Span

NORMAL_95 = 1.96
"""Standard errors on either side of a 95 % interval of a normal distribution."""


@dataclass(frozen=True)
class TextMeasured:
    """A text that perplexity was measured on. Figures are compared where all of it is equal.

    Attributes:
        name: The specification, and the windows.
        tokens_digest: Digest of its tokens.
    """

    name: str
    tokens_digest: str


@dataclass(frozen=True)
class Loss:
    """Loss of a model on a text, in nats a token.

    Attributes:
        text: The text.
        value: Mean over tokens.
        standard_error: Of the mean, over windows; None with one window.
        windows: Mean loss of each window.
        tokens: Predicted tokens.
    """

    text: TextMeasured
    value: float
    standard_error: float | None
    windows: tuple[float, ...]
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp`` of the loss; infinite where that overflows."""
        return _exp(self.value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the perplexity; None with one window."""
        if self.standard_error is None:
            return None
        half = NORMAL_95 * self.standard_error
        return _exp(self.value - half), _exp(self.value + half)


@dataclass(frozen=True)
class Score:
    """What a model scores on a task by one metric; see :class:`~ghoststream.evaluation.TaskMetric`."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    n_items: int
    items: tuple[float | None, ...]
    items_digest: str

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval; None where there is no standard error."""
        if self.standard_error is None:
            return None
        half = NORMAL_95 * self.standard_error
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Gap:
    """How much a model loses against its base on the same windows or items, with a paired 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spectrum:
    """Singular values of an operator, descending; or the reason why there are none."""

    values: tuple[float, ...] = ()
    absence: str = ""


@dataclass(frozen=True)
class Boundary:
    """An operator at a boundary.

    Attributes:
        span: The removed span.
        kind: Form and features.
        diagnostics: As they are in the operators file.
        spectrum: Singular values of its map.
    """

    span: Span
    kind: str
    diagnostics: Mapping[str, Any]
    spectrum: Spectrum

    @property
    def ridge_curve(self) -> tuple[tuple[float, float], ...]:
        """Relative ridges that were tried, and the relative residual out of sample of each."""
        return tuple((float(ridge), float(left)) for ridge, left in self.fit.get("ridge_curve") or ())

    @property
    def fit(self) -> Mapping[str, Any]:
        """The figures of its fit, also where it was trained afterwards."""
        fitted: Mapping[str, Any] = self.diagnostics.get("fitted") or self.diagnostics
        return fitted


@dataclass(frozen=True)
class StageTaken:
    """A stage: what it took, and what it was expected to take; None where that is not known."""

    name: str
    seconds: float | None = None
    peak_bytes: int | None = None
    expected_seconds: float | None = None
    expected_bytes: int | None = None


@dataclass(frozen=True)
class Norms:
    """Norms of the dense model's hidden states over depth; a list has an entry for each position.

    Attributes:
        position: ``l`` of ``h[l]``.
        mean: Mean norm of a token.
        median: Mean over windows of the median norm.
        largest: Largest norm of a token.
        massive: Tokens above 20 times the median norm of their window.
        tokens: Tokens that were looked at.
    """

    position: tuple[int, ...]
    mean: tuple[float, ...]
    median: tuple[float, ...]
    largest: tuple[float, ...]
    massive: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class HeatMap:
    """Figures of single spans: ``rows[i][j]`` is of the span of ``lengths[i]`` layers at ``starts[j]``."""

    name: str
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Measured:
    """A candidate that a search measured: the loss above the dense model's on held-out windows."""

    spans: tuple[Span, ...]
    gap: float
    standard_error: float | None
    windows: tuple[float, ...]
    repair: str
    round: int | None
    is_chosen: bool


@dataclass(frozen=True)
class CurvePoint:
    """The best plan of one number of layers, as an exploration found it."""

    plan: PruningPlan
    gap: float
    low: float | None
    high: float | None
    perplexity: float


@dataclass(frozen=True)
class Exploration:
    """The loss over the number of removed layers."""

    points: tuple[CurvePoint, ...]
    verdict: str
    knee: int | None
    cheap: float
    broken: float


@dataclass(frozen=True)
class Run:
    """One thing that is compared.

    Attributes:
        name: What the page calls it; no two runs have one name.
        place: Where it was read from.
        kind: What was read: ``recovered checkpoint``, ``pruning plan`` ...
        plan: The removed layers; None for a model that nothing is known of.
        digests: Fingerprints that figures of it carry.
        base_digest: Fingerprint of its dense model.
        chosen_by: Criterion.
        operator: Operator kind.
        bytes_before: Bytes of the base's weights.
        bytes_after: Bytes of its own.
        boundaries: Its operators.
        losses: Perplexities.
        scores: Results of tasks.
        measured: Candidates that its search measured.
        maps: Heat maps over single spans.
        norms: Norms over depth.
        stages: What its stages took.
        seconds: Seconds of all stages together.
        peak_bytes: Largest memory of its process.
        state: How its process ended; empty where that is not known.
        command: The command line that repeats it.
        recipe: All that decides it, as JSON data.
        exploration: The curve of an exploration.
    """

    name: str
    place: str
    kind: str
    plan: PruningPlan | None = None
    digests: frozenset[str] = frozenset()
    base_digest: str | None = None
    chosen_by: str = ""
    operator: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None
    boundaries: tuple[Boundary, ...] = ()
    losses: tuple[Loss, ...] = ()
    scores: tuple[Score, ...] = ()
    measured: tuple[Measured, ...] = ()
    maps: tuple[HeatMap, ...] = ()
    norms: Norms | None = None
    stages: tuple[StageTaken, ...] = ()
    seconds: float | None = None
    peak_bytes: int | None = None
    state: str = ""
    command: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    exploration: Exploration | None = None

    @property
    def removed(self) -> str:
        """The removed layers in words; empty where nothing is known."""
        if self.plan is None:
            return ""
        if not self.plan.spans:
            return "none"
        return f"{self.plan.n_removed} of {self.plan.n_layers}: {self.plan}"

    @property
    def trained(self) -> str:
        """How its operators were trained, in words; empty where they were only fitted."""
        figures = (one.diagnostics for one in self.boundaries if "step_losses" in one.diagnostics)
        return told_training(self.recipe, next(figures, None))

    def loss_on(self, text: TextMeasured) -> Loss | None:
        """Return its loss on a text."""
        return next((loss for loss in self.losses if loss.text == text), None)

    def score_of(self, task: str, metric: str) -> Score | None:
        """Return its score on a task by a metric."""
        return next((one for one in self.scores if (one.task, one.metric) == (task, metric)), None)


def dense_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the dense model of a run among all runs."""
    if run.base_digest is None:
        return None
    return next((one for one in runs if run.base_digest in one.digests and one is not run), None)


def texts_of(runs: Sequence[Run]) -> list[TextMeasured]:
    """Return the texts that any run was measured on, in order."""
    return list(dict.fromkeys(loss.text for run in runs for loss in run.losses))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
