"""Searching for the layers to remove by running the model: candidates are measured, not judged by similarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from ghoststream.errors import RequestError
from ghoststream.files import atomic_write_json, require_writable
from ghoststream.operators import OperatorOptions
from ghoststream.options import dtype_name
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.repair.auto import AUTO, LATER_METHODS, SCREEN, named_method
from ghoststream.stages.repair.measured import divide
from ghoststream.stages.repair.methods import FitMethod, Repair
from ghoststream.stages.searching.growth import Width, fewest_spans, finalists, grow, partitions
from ghoststream.stages.searching.result import SearchResult
from ghoststream.stages.searching.steps import MeasuredSteps, Row, Trial
from ghoststream.stages.searching.taylor import taylor_scores
from ghoststream.stages.session import ComputeRequest, ModelOptions, ModelSession, TextOptions
from ghoststream.statistics import DEFAULT_FOLDS, UNIFORM, Ranges
from ghoststream.text import TokenSet

SEARCH_CRITERIA = ("measured", "prune-and-repair", "sleb", "perplexity", "taylor", "taylor-plus")
"""Criteria that run the model."""

UNFITTED = ("sleb", "perplexity", "taylor", "taylor-plus")
"""Those of them that repair nothing."""

REFINED = 4
"""Plans for which ``auto`` chooses how to repair."""

MAX_SPANS = 2
"""Spans that ``measured`` removes at most, by default."""

CANDIDATES = 8
"""Plans of each partition that ``measured`` measures in each step after the first, by default."""

_KEPT_FIRST, _KEPT_LAST = 4, 2


def search(
    model: str | Path,
    n_remove: int,
    *,
    calibration: str,
    criterion: str = "measured",
    sequences: int = 128,
    length: int = 512,
    held_out: int | None = None,
    max_spans: int | None = None,
    beam: int = 1,
    candidates: int | None = None,
    lanes: int | None = None,
    operator: str = AUTO,
    weights: str = UNIFORM,
    options: OperatorOptions | None = None,
    folds: int = DEFAULT_FOLDS,
    pack: bool = True,
    bos: Bos = "auto",
    out: str | Path | None = None,
    progress: Progress | None = None,
    **compute: Unpack[ComputeRequest],
) -> SearchResult:
    """Choose the layers to remove by running the model without them.

    Criteria:

    - ``measured``: every candidate is repaired and measured on held-out windows; those of one step share passes over the
      weights (see :func:`~ghoststream.stages.repair.measured.measure_repairs` for memory and arithmetic). Plans of one span, of two
      and so on up to ``max_spans`` are made side by side, with spans of equal lengths and with one twice as long as the others
      (:func:`~ghoststream.stages.searching.growth.partitions`): spans are added one at a time to the ``beam`` best so far; after the first step those are measured whose spans cost least alone. That is one pass for each of
      ``max_spans`` steps. Fewer spans are preferred where they are not
      worse by more than the standard error of the best plan's loss above the dense model's.
    - ``prune-and-repair``: the same, layer by layer (neighbours make one span).
    - ``sleb``: layer by layer, unrepaired: SLEB (arXiv 2402.09025), with the loss on the whole text as its measure.
    - ``perplexity``: each layer is left out alone, and those whose absence costs least are removed: Shortened LLaMA's PPL
      (arXiv 2402.02834). One pass.
    - ``taylor``, ``taylor-plus``: the layers of least first-order effect on the loss, the latter keeping the first four and
      the last two: Shortened LLaMA's Taylor+; see :func:`~ghoststream.stages.searching.taylor.taylor_scores`. One pass forward and one
      backward.

    All but ``taylor`` and ``taylor-plus`` keep the first and the last layer. A killed search repeats the pass that it was in.

    Args:
        model: Local folder or hub id.
        n_remove: How many layers to remove.
        calibration: Text specification; nothing else is looked at.
        criterion: One of :data:`SEARCH_CRITERIA`.
        sequences: Windows of it, to fit and to measure on.
        length: Tokens of a window.
        held_out: How many windows, the last ones, are measured on; a quarter if ``None``. Rounded so that both parts are
            whole micro-batches. Where nothing is repaired, all are measured on.
        max_spans: How many spans ``measured`` removes at most, each with an operator of its own; two if ``None``. The first
            and the last layer are always kept.
        beam: How many plans of each partition are kept from step to step.
        candidates: How many plans of each partition ``measured`` measures in a step after the first; eight if ``None``.
        lanes: Most candidates in one pass; ``None`` is all of a step.
        operator: Operator family that repairs, or ``auto``: candidates are compared with
            :data:`~ghoststream.stages.repair.auto.SCREEN`, and four of the best plans, the best of each number of spans
            among them, with every one of :data:`~ghoststream.stages.repair.auto.METHODS` at the first boundary and of
            :data:`~ghoststream.stages.repair.auto.LATER_METHODS` at others, one pass more for each span.
        weights: Token weights of the fit; ``auto`` has its own.
        options: Options of the operator; ``auto`` has its own.
        folds: Folds of the sequences that serve to fit, for ridges that folds choose.
        pack: Whether documents are joined before they are cut into windows.
        bos: When the beginning-of-sequence token is put in front.
        out: Plan file (JSON) to write.
        progress: Who is told how far it is.
        **compute: See :class:`~ghoststream.stages.session.ComputeRequest`.

    Raises:
        RequestError: If the numbers do not fit the model or the text, or an option is unknown.
        OutputExistsError: If ``out`` holds something else.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        NumericsError: If a state or a solution is not finite.
        GhoststreamError: What opening the model or the text raises.
    """
    out = None if out is None else Path(out)
    wanted = _Wanted.make(criterion, operator, weights, options)
    session = ModelSession(model, ModelOptions(**compute))
    tried = wanted.partitions(n_remove, max_spans, session.skeleton.n_layers)
    if any(number is not None and number < 1 for number in (beam, candidates, lanes)):
        msg = f"beam {beam}, candidates {candidates} and lanes {lanes} must be at least 1"
        raise RequestError(msg)
    width = wanted.width(beam, candidates)
    text = TextOptions(calibration, sequences, length, pack, bos, part="fit")
    tokens = session.tokens(text)
    micro_batch, ranges = wanted.division(session, tokens, held_out, folds)
    recipe = {
        "model": session.fingerprint["digest"],
        "text": text.recipe().to_json(),
        "tokens": tokens.digest,
        "fit_sequences": 0 if ranges is None else ranges.n_sequences,
        "folds": 1 if ranges is None else ranges.n_folds,
        "dtype": dtype_name(session.skeleton.dtype),
        "attention": session.skeleton.attention,
        "micro_batch": micro_batch,
        "spans": tried,
        **asdict(width),
        **wanted.to_json(),
    }
    if out is not None:
        found = SearchResult.existing(out, recipe)
        if found is not None:
            return found
        require_writable(out)
    trial = Trial(session, tokens, ranges, micro_batch, progress or SilentProgress())
    steps = MeasuredSteps(trial, recipe, out, lanes)
    result = _run(wanted, trial, steps, tried, width, recipe)
    if out is not None:
        atomic_write_json(out, result.to_json())
        steps.forget()
    return result


@dataclass(frozen=True)
class _Wanted:
    """How candidates are judged, and how they are repaired for it; ``None`` is auto."""

    criterion: str
    method: FitMethod | None

    @classmethod
    def make(cls, criterion: str, operator: str, weights: str, options: OperatorOptions | None) -> _Wanted:
        if criterion not in SEARCH_CRITERIA:
            msg = f"there is no criterion {criterion!r} that runs the model; choose from {', '.join(SEARCH_CRITERIA)}"
            raise RequestError(msg)
        if criterion in UNFITTED:
            return cls(criterion, FitMethod("none"))
        return cls(criterion, named_method(operator, weights, options))

    def partitions(self, n_remove: int, max_spans: int | None, n_layers: int) -> list[list[int]]:
        """Return the sizes of the spans that are added one after the other, for each way that is tried."""
        if max_spans is not None and self.criterion != "measured":
            msg = f"{self.criterion} removes single layers; leave the number of spans out, or use measured"
            raise RequestError(msg)
        most = min(MAX_SPANS, n_remove) if max_spans is None else max_spans
        if not 1 <= most <= n_remove or not 1 <= n_remove <= n_layers - 2:
            msg = (
                f"cannot remove {n_remove} of {n_layers} layers in {most} spans: the first and the last layer are kept, and a"
                " span has at least one layer"
            )
            raise RequestError(msg)
        if self.criterion == "taylor-plus" and n_remove > n_layers - _KEPT_FIRST - _KEPT_LAST:
            msg = (
                f"cannot remove {n_remove} of {n_layers} layers by taylor-plus, which keeps the first {_KEPT_FIRST} and the"
                f" last {_KEPT_LAST}; use taylor, or another criterion"
            )
            raise RequestError(msg)
        if self.criterion != "measured":
            return [[1] * n_remove]
        return partitions(n_remove, most)

    def width(self, beam: int, candidates: int | None) -> Width:
        """Return how much is measured in a step; greedy methods of others measure all."""
        return Width(beam, candidates or (CANDIDATES if self.criterion == "measured" else None))

    def division(
        self, session: ModelSession, tokens: TokenSet, held_out: int | None, folds: int
    ) -> tuple[int, Ranges | None]:
        """Return the micro-batch, and how the sequences to fit on are divided; None if nothing is fitted."""
        if self.criterion in UNFITTED:
            chosen = session.memory(tokens.length).choose_micro_batch()
            return session.options.micro_batch or chosen, None
        micro_batch, n_fit = divide(session, tokens, held_out)
        return micro_batch, Ranges.make(n_fit, folds=folds)

    def to_json(self) -> dict[str, Any]:
        """Return what decides the figures."""
        if self.method is not None:
            return {"criterion": self.criterion, **self.method.to_json()}
        tried = {"screen": SCREEN.to_json(), "methods": [method.to_json() for method in LATER_METHODS]}
        return {"criterion": self.criterion, "operator": AUTO, **tried, "refined": REFINED}


def _run(
    wanted: _Wanted,
    trial: Trial,
    steps: MeasuredSteps,
    tried: Sequence[Sequence[int]],
    width: Width,
    recipe: Mapping[str, Any],
) -> SearchResult:
    n_layers, n_remove = trial.session.skeleton.n_layers, sum(tried[0])
    if wanted.criterion in ("perplexity", "taylor", "taylor-plus"):
        rows = _one_by_one(wanted, trial, steps)
        plan = PruningPlan(n_layers, tuple(_span(row) for row in rows[:n_remove]))
        measured = wanted.criterion == "perplexity"
        passes = steps.passes if measured else 2
        dense = steps.dense_loss if measured else None
        return SearchResult(plan, (), wanted.criterion, tuple(rows), dense, recipe, passes)
    ranked = grow(steps, n_layers, tried, width, wanted.method or SCREEN)
    rows = [row for _, row in ranked]
    if wanted.method is None:
        ranked = steps.refine(finalists(ranked, REFINED))
        rows = [row for row in steps.rows() if PruningPlan.from_json(row["plan"]).n_removed == n_remove]
    best = fewest_spans(ranked) if wanted.criterion == "measured" else ranked[0][0]
    methods = () if wanted.criterion in UNFITTED else tuple(method.to_json() for method in best.methods)
    return SearchResult(
        best.plan, methods, wanted.criterion, tuple(rows), steps.dense_loss, recipe, steps.passes
    )


def _one_by_one(wanted: _Wanted, trial: Trial, steps: MeasuredSteps) -> list[Row]:
    """Return every single layer that may go with what its absence costs, least first."""
    n_layers = trial.session.skeleton.n_layers
    first, last = (_KEPT_FIRST, _KEPT_LAST) if wanted.criterion == "taylor-plus" else (0, 0)
    if wanted.criterion == "perplexity":
        plans = [PruningPlan(n_layers, (Span(layer, layer + 1),)) for layer in range(1, n_layers - 1)]
        return [row for _, row in steps.rank([Repair.alike(plan, FitMethod("none")) for plan in plans])]
    scores = taylor_scores(
        trial.session, trial.tokens, micro_batch=trial.micro_batch, progress=trial.progress
    )
    rows = [
        {"plan": PruningPlan(n_layers, (Span(layer, layer + 1),)).to_json(), "score": scores[layer]}
        for layer in range(first, n_layers - last)
    ]
    return sorted(rows, key=lambda row: row["score"])


def _span(row: Row) -> Span:
    (span,) = PruningPlan.from_json(row["plan"]).spans
    return span
