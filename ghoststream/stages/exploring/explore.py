"""Explore: the best plan of every number of layers, what it costs, and where it breaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.sizes import ModelSizes
from ghoststream.options import (
    AUTO,
    Compute,
    Exploration,
    Method,
    Search,
    Text,
    TextLike,
)
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import library_versions
from ghoststream.recovery.layout import prevailing_dtype
from ghoststream.selection import plan_name
from ghoststream.spans import Span
from ghoststream.stages.choosing.auto import without_too_large
from ghoststream.stages.choosing.checks import named_method
from ghoststream.stages.choosing.kept_ranking import Ranking
from ghoststream.stages.choosing.material import Material
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.trial import Row, Trial
from ghoststream.stages.choosing.ways import EVERY, Ways
from ghoststream.stages.exploring.files import beside, digests, names_of, write_missing
from ghoststream.stages.exploring.maps import heat_maps
from ghoststream.stages.exploring.numbers import USED, Numbers, writable_numbers
from ghoststream.stages.exploring.predicted import predict
from ghoststream.stages.exploring.report import NAME, DenseFigures, ExplorationReport, Point, Spent
from ghoststream.stages.exploring.rounds import STAGES, run_rounds
from ghoststream.stages.output import Output, not_of_this_request
from ghoststream.stages.refusals import check_model
from ghoststream.stages.session import ModelSession
from ghoststream.stages.sharing import on_first_device, scratch_beside
from ghoststream.stages.workers import Shared, workers_of
from ghoststream.streaming import Runs

_CONFIDENCE = 0.95


def explore(
    model: str | Path,
    *,
    calibration: TextLike,
    out: str | Path | None = None,
    exploration: Exploration | None = None,
    search: Search | None = None,
    method: Method | None = None,
    compute: Compute | None = None,
    scheduler: Any = None,
    progress: Progress | None = None,
) -> ExplorationReport:
    """Find the best plan of every number of layers, and measure all of them on the same held-out windows.

    It takes four passes over the weights, whatever the numbers are, and about as much arithmetic as two
    searches for one number (:mod:`ghoststream.stages.exploring.rounds`). Nothing is exported: ``recover`` and
    ``fit`` take the plan files.

    Args:
        model: Local folder or hub id.
        calibration: Text to calibrate on, or its specification, or those of several.
        out: Folder for the report (``explore.json``), the curve (``curve.csv``) and the plans. The same
            request again returns what is there; a killed one goes on behind the last pass that it finished.
        exploration: The numbers of layers, and what counts as cheap and as broken.
        search: Of it ``max_spans``, ``held_out``, ``lanes`` and ``folds`` are read.
        method: How boundaries are repaired; by default ``auto``.
        compute: How the model is opened and run. Several devices of this machine (``cuda:0,cuda:1``) share
            the candidates of a round; the first one ranks. Each runs the dense model too, which ``spent``
            counts. No other figure depends on their number.
        scheduler: Address of a Dask scheduler, or its client, whose workers share them in the same way. They
            have to see the model.
        progress: Who is told how far it is, one line a stage.

    Raises:
        RequestError: If numbers do not fit the model or the text, or an option is given that is not read.
        OutputExistsError: If ``out`` holds something else.
        ArtifactError: If it holds a damaged report.
        BusyError: If another process is writing it.
        NumericsError: If a state or a solution is not finite.
        BudgetError, DiskFullError: If memory or disk does not suffice.
        MismatchError: If a worker finds another model.

    Memory: that of :func:`~ghoststream.stages.choosing.measured.measure_repairs` for some six candidates a
    number of layers; ``lanes`` bounds it.
    """
    exploration, search, method = exploration or Exploration(), search or Search(), method or Method()
    compute, progress = compute or Compute(), progress or SilentProgress()
    search.refuse(set(Search.model_fields).difference(USED), "an exploration ranks and measures by itself")
    if not method.is_named:
        method.refuse(("refit",), f"an exploration with the operator {AUTO} refits nothing")
    shared = Shared.asked(compute, scheduler)
    session = ModelSession(model, scratch_beside(on_first_device(compute), out, scheduler))
    sizes = session.sizes
    asked, named = Numbers.of(exploration, search, sizes.n_layers), named_method(method)
    numbers, example = writable_numbers(session.skeleton, asked, exploration)
    check_model(session, named, (Span(1, 2),), example)
    without = [str(count) for count in asked.counts if count not in numbers.counts]
    if without:
        progress.log(
            f"explore: {', '.join(without)} layers are left out, as no plan of so many can be written"
        )
    text = Text.of(calibration).to_calibrate()
    material = Material.read(session, text, search, progress)
    request = {
        "stage": "explore",
        "exploration": {**exploration.to_json(), "counts": list(numbers.counts)},
        "max_spans": numbers.max_spans,
        **material.to_json(),
    }

    def place(ways: Ways) -> Output | None:
        recipe = {**request, **_repairing(named, ways)}
        return None if out is None else Output(Path(out) / NAME, recipe, "explore")

    ways = EVERY
    if named is None:
        ways = without_too_large(
            ways,
            material,
            place=place,
            load=ExplorationReport.load,
            races=True,
            shared=shared,
        )
    recipe = {**request, **_repairing(named, ways)}
    work = _Exploration(material, sizes, numbers, exploration, search.lanes, named, ways, shared)
    return work.run(None, recipe) if out is None else _kept(Path(out), work, recipe)


def _repairing(method: Method | None, ways: Ways) -> dict[str, Any]:
    if method is not None:
        return {"method": method.to_json()}
    return {"method": AUTO, "screen": ways.screen.to_json(), **ways.recorded()}


def _kept(folder: Path, work: _Exploration, recipe: dict[str, Any]) -> ExplorationReport:
    """Return what the folder holds of this request, or explore and write it."""
    output = Output(folder / NAME, recipe, "explore")
    with output.claimed(ExplorationReport.load) as found:
        if found is not None:
            write_missing(output.path.parent, beside(found))
            return found
        if not any(output.work.iterdir()):
            # Whatever is there in the place of a file is not ours: nothing of this request was begun.
            _require_free(output.path.parent, names_of(work.numbers.counts))
        report = work.run(output, recipe)
        files = beside(report)
        report = replace(report, files=digests(files))
        write_missing(output.path.parent, files)
        report.save(output.path)
    return report


def _require_free(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (folder / name).exists() or (folder / name).is_symlink():
            raise not_of_this_request(folder / name)


@dataclass(frozen=True)
class _Exploration:
    """One exploration, with everything open but the workers, who come when there is work."""

    material: Material
    sizes: ModelSizes
    numbers: Numbers
    exploration: Exploration
    lanes: int | None
    method: Method | None
    ways: Ways
    shared: Shared | None

    def run(self, output: Output | None, recipe: dict[str, Any]) -> ExplorationReport:
        """Explore; figures are kept beside the output meanwhile."""
        with workers_of(self.shared, self.material.progress) as crew:
            trial = Trial(
                self.material, lanes=self.lanes, output=output, residuals=True, crew=crew, ways=self.ways
            )
            return self._explored(trial, recipe)

    def _explored(self, trial: Trial, recipe: dict[str, Any]) -> ExplorationReport:
        session, progress, numbers = self.material.session, self.material.progress, self.numbers
        ranking = Ranking.make(trial, numbers.sizes, f"explore: stage 1 of {STAGES}, ranking spans")
        found = run_rounds(trial, ranking.spans, numbers, self.method)
        assert trial.dense_loss is not None
        report = ExplorationReport(
            model=session.name,
            n_layers=session.skeleton.n_layers,
            points=tuple(self._point(*found.best[count]) for count in numbers.counts),
            dense=DenseFigures(trial.dense_loss, math.exp(trial.dense_loss), self.sizes.checkpoint_bytes),
            maps=heat_maps(ranking.spans, found.alone),
            norms=ranking.norms,
            spent=self._spent(trial.passes + 1, trial.runs + ranking.runs),
            cheap=self.exploration.cheap,
            broken=self.exploration.broken,
            candidates=tuple(found.rows),
            recipe=recipe,
            base=session.base(None, progress),
            versions=library_versions(),
        )
        progress.log(f"explore: done in {report.spent.passes} passes: {report.verdict}")
        return report

    def _spent(self, passes: int, runs: Runs) -> Spent:
        layers = sum(layer.acting for layer in self.sizes.layers)
        head = self.sizes.vocabulary * self.sizes.hidden
        done = runs.layers * layers / self.sizes.n_layers + runs.heads * head
        length, n_sequences = self.material.tokens.length, self.material.tokens.n_sequences
        dense = (layers + head) * length * n_sequences
        return Spent(passes, runs.layers // length, runs.heads / length, done / dense)

    def _point(self, repair: Repair, row: Row) -> Point:
        itemsize = prevailing_dtype(self.material.session.skeleton.index).itemsize
        low, high = interval(row["gap"], row["gap_standard_error"], len(row["window_gaps"]))
        return Point(
            removed=repair.plan.n_removed,
            spans=tuple((span.start, span.stop) for span in repair.plan.spans),
            methods=repair.methods,
            repair=tuple(repair.labels),
            loss=row["loss"],
            perplexity=math.exp(min(row["loss"], 700.0)),
            gap=row["gap"],
            gap_standard_error=row["gap_standard_error"],
            gap_low=low,
            gap_high=high,
            window_gaps=tuple(row["window_gaps"]),
            **asdict(predict(self.sizes, repair.plan, repair.methods, itemsize)),
            plan=plan_name(repair.plan.n_removed),
        )


def interval(mean: float, error: float | None, n_windows: int) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a mean over windows, by Student's distribution; None with one window.

    Args:
        mean: The mean.
        error: Its standard error.
        n_windows: How many windows it is of.
    """
    if error is None or n_windows < 2:
        return None, None
    from scipy.special import stdtrit

    reach = float(stdtrit(n_windows - 1, (1.0 + _CONFIDENCE) / 2.0)) * error
    return mean - reach, mean + reach
