"""Searching for the layers to remove by what their repair leaves: candidates are measured, not judged by similarity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ghoststream.errors import ArtifactError, OutputExistsError, PlanError, RequestError
from ghoststream.files import atomic_write_json, json_digest, read_json, require_writable
from ghoststream.operators import OperatorOptions
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.fitting import FitMethod
from ghoststream.stages.measured import measure_plans
from ghoststream.stages.session import ComputeRequest, ModelOptions, ModelSession, TextOptions, dtype_name
from ghoststream.statistics import DEFAULT_FOLDS, UNIFORM, RangePlan, candidate_spans
from ghoststream.text import TokenSet

_ENCODING = {"encoding-type": "ghoststream-measured-plan", "encoding-version": "1.0"}


@dataclass(frozen=True)
class SearchResult:
    """What a search chose, and what it saw.

    Attributes:
        plan: The plan whose repaired model has the lowest loss on the held-out sequences.
        candidates: JSON data of every plan that was measured: plan, loss, gap to the dense model, standard error of that;
            of the last step, best first.
        dense_loss: Loss of the dense model on the held-out sequences.
        recipe: What decides the figures.
        passes: How many passes over the weights it took.
    """

    plan: PruningPlan
    candidates: tuple[Mapping[str, Any], ...]
    dense_loss: float
    recipe: Mapping[str, Any]
    passes: int

    def to_json(self) -> dict[str, Any]:
        """Return the plan file's JSON data; ``n_layers`` and ``spans`` are those of the plan."""
        return {
            **_ENCODING,
            **self.plan.to_json(),
            "criterion": "measured",
            "dense_loss": self.dense_loss,
            "candidates": [dict(candidate) for candidate in self.candidates],
            "recipe": dict(self.recipe),
            "passes": self.passes,
        }

    @classmethod
    def load(cls, path: Path) -> SearchResult:
        """Read a plan file that a search wrote.

        Raises:
            InputNotFoundError: If there is no such file.
            ArtifactError: If it is no such plan.
        """
        data = read_json(path)
        try:
            return cls(
                PruningPlan.from_json(data),
                tuple(data["candidates"]),
                float(data["dense_loss"]),
                dict(data["recipe"]),
                int(data["passes"]),
            )
        except (KeyError, TypeError, ValueError, PlanError) as error:
            msg = f"{path} is not what a measured selection wrote ({error!r}); make it again"
            raise ArtifactError(msg) from error


def search(
    model: str | Path,
    n_remove: int,
    *,
    calibration: str,
    sequences: int = 128,
    length: int = 512,
    held_out: int | None = None,
    spans: int = 1,
    beam: int = 1,
    lanes: int | None = None,
    operator: str = "ghost",
    weights: str = UNIFORM,
    options: OperatorOptions | None = None,
    folds: int = DEFAULT_FOLDS,
    pack: bool = True,
    bos: Bos = "auto",
    out: Path | None = None,
    progress: Progress | None = None,
    **compute: Unpack[ComputeRequest],
) -> SearchResult:
    """Choose the layers whose repaired model loses least on held-out sequences of the calibration text.

    Every candidate is fitted and measured; those of one step share passes over the weights (see
    :func:`~ghoststream.stages.measured.measure_plans` for memory and arithmetic). With one span that is one pass for all
    candidates. With more, spans of ``n_remove / spans`` layers are added one at a time, to the ``beam`` best plans so far:
    one pass a step. A killed search repeats the pass that it was in.

    Args:
        model: Local folder or hub id.
        n_remove: How many layers to remove.
        calibration: Text specification; nothing else is looked at.
        sequences: Windows of it, to fit and to measure on.
        length: Tokens of a window.
        held_out: How many windows, the last ones, are measured on; a quarter if ``None``. Rounded so that both parts are
            whole micro-batches.
        spans: How many spans to remove; the first and the last layer are always kept.
        beam: How many plans are kept from step to step.
        lanes: Most candidates in one pass; ``None`` is all of a step.
        operator: Operator family that repairs.
        weights: Token weights of the fit.
        options: Options of the operator.
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
    method = FitMethod(operator, options or OperatorOptions(), weights)
    session = ModelSession(model, ModelOptions(**compute))
    sizes = _span_sizes(n_remove, spans, session.skeleton.n_layers)
    if min(beam, 1 if lanes is None else lanes) < 1:
        msg = f"beam {beam} and lanes {lanes} must be at least 1"
        raise RequestError(msg)
    text = TextOptions(calibration, sequences, length, pack, bos, part="fit")
    tokens = session.tokens(text)
    micro_batch = session.options.micro_batch or session.memory(length).choose_micro_batch()
    ranges = RangePlan.make(_fit_sequences(tokens.n_sequences, held_out, micro_batch), folds=folds)
    recipe = {
        "model": session.fingerprint["digest"],
        "text": text.recipe().to_json(),
        "tokens": tokens.digest,
        "fit_sequences": ranges.n_sequences,
        "folds": ranges.n_folds,
        "dtype": dtype_name(session.skeleton.dtype),
        "attention": session.skeleton.attention,
        "micro_batch": micro_batch,
        "spans": sizes,
        "beam": beam,
        **method.to_json(),
    }
    if out is not None:
        found = _existing(out, recipe)
        if found is not None:
            return found
        require_writable(out)
    steps = _Steps(session, tokens, method, ranges, micro_batch, recipe, out, progress or SilentProgress())
    result = steps.run(sizes, beam, lanes)
    if out is not None:
        atomic_write_json(out, result.to_json())
        steps.forget()
    return result


class _Steps:
    """The passes of a search; what each found is kept beside the plan file until that is written."""

    def __init__(
        self,
        session: ModelSession,
        tokens: TokenSet,
        method: FitMethod,
        ranges: RangePlan,
        micro_batch: int,
        recipe: Mapping[str, Any],
        out: Path | None,
        progress: Progress,
    ) -> None:
        self._session, self._tokens, self._method, self._ranges = session, tokens, method, ranges
        self._micro_batch, self._recipe, self._progress = micro_batch, recipe, progress
        self._notes = None if out is None else out.with_name(f"{out.name}.partial")
        self._passes = 0
        self._done: dict[str, Any] = self._load()

    def run(self, sizes: Sequence[int], beam: int, lanes: int | None) -> SearchResult:
        n_layers = self._session.skeleton.n_layers
        best = [PruningPlan(n_layers)]
        ranked: list[Mapping[str, Any]] = []
        for size in sizes:
            plans = _extended(best, size, n_layers)
            ranked = sorted(self._measure(plans, lanes), key=lambda row: row["gap"])
            best = [PruningPlan.from_json(row["plan"]) for row in ranked[:beam]]
            self._progress.log(
                f"best so far: {best[0]}, loss {ranked[0]['gap']:+.4f} against the dense model"
            )
        return SearchResult(
            best[0], tuple(ranked), float(self._done["dense_loss"]), self._recipe, self._passes
        )

    def forget(self) -> None:
        """Remove the notes: the plan file is written."""
        if self._notes is not None:
            self._notes.unlink(missing_ok=True)

    def _measure(self, plans: Sequence[PruningPlan], lanes: int | None) -> Iterable[Mapping[str, Any]]:
        size = lanes or len(plans)
        self._passes += -(-len(plans) // size)
        measured: dict[str, Any] = self._done["candidates"]
        waiting = [plan for plan in plans if str(plan) not in measured]
        for first in range(0, len(waiting), size):
            self._pass(waiting[first : first + size])
        return [measured[str(plan)] for plan in plans]

    def _pass(self, plans: Sequence[PruningPlan]) -> None:
        self._progress.log(f"repairing and measuring {len(plans)} candidates in one pass")
        dense, candidates = measure_plans(
            self._session,
            self._tokens,
            plans,
            self._method,
            ranges=self._ranges,
            micro_batch=self._micro_batch,
            progress=self._progress,
        )
        self._done["dense_loss"] = dense.loss
        self._done["candidates"] |= {str(one.plan): one.to_json() for one in candidates}
        if self._notes is not None:
            atomic_write_json(self._notes, self._done)

    def _load(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {
            "recipe_digest": json_digest(dict(self._recipe)),
            "dense_loss": None,
            "candidates": {},
        }
        if self._notes is None or not self._notes.is_file():
            return fresh
        try:
            found = read_json(self._notes)
        except ArtifactError:
            return fresh
        same = isinstance(found, dict) and found.get("recipe_digest") == fresh["recipe_digest"]
        return found if same else fresh


def _span_sizes(n_remove: int, spans: int, n_layers: int) -> list[int]:
    if not 1 <= spans <= n_remove or not 1 <= n_remove <= n_layers - 2:
        msg = (
            f"cannot remove {n_remove} of {n_layers} layers in {spans} spans: the first and the last layer are kept, and a"
            " span has at least one layer"
        )
        raise RequestError(msg)
    return [n_remove // spans + (index < n_remove % spans) for index in range(spans)]


def _extended(plans: Iterable[PruningPlan], size: int, n_layers: int) -> list[PruningPlan]:
    """Return every plan with one more span of ``size`` layers, in order and each once."""
    longer = {
        PruningPlan(n_layers, (*plan.spans, span))
        for plan in plans
        for span in candidate_spans(n_layers, size)
        if not any(_overlap(span, other) for other in plan.spans)
    }
    return sorted(longer, key=lambda plan: plan.spans)


def _overlap(one: Span, other: Span) -> bool:
    return one.start < other.stop and other.start < one.stop


def _fit_sequences(n_sequences: int, held_out: int | None, micro_batch: int) -> int:
    wanted = n_sequences // 4 if held_out is None else held_out
    n_fit = (n_sequences - wanted) // micro_batch * micro_batch
    if wanted < 1 or n_fit < 1:
        msg = (
            f"{n_sequences} sequences in micro-batches of {micro_batch} cannot be parted into some to fit and"
            f" {wanted} to measure on; give more sequences, or a smaller micro-batch"
        )
        raise RequestError(msg)
    return n_fit


def _existing(out: Path, recipe: Mapping[str, Any]) -> SearchResult | None:
    if not out.exists():
        return None
    try:
        found = SearchResult.load(out)
    except ArtifactError:
        found = None
    if found is None or json_digest(dict(found.recipe)) != json_digest(dict(recipe)):
        msg = f"{out} exists and is not the plan of this request; choose another name, or move it away"
        raise OutputExistsError(msg)
    return found
