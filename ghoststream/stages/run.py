"""Running a pipeline: its stages one after the other, in one folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghoststream.errors import RequestError
from ghoststream.evaluation import EvaluationReport
from ghoststream.files import disk_errors
from ghoststream.operators import OperatorSet
from ghoststream.progress import Progress, SilentProgress
from ghoststream.spans import PruningPlan
from ghoststream.stages.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """Where the results of a pipeline are, and its figures if it evaluates."""

    name: str
    plan: PruningPlan
    store: str | None
    operators: str
    recovered: str
    evaluation: EvaluationReport | None

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        figures = None if self.evaluation is None else self.evaluation.to_json()
        return {
            "name": self.name,
            "plan": self.plan.to_json(),
            "store": self.store,
            "operators": self.operators,
            "recovered": self.recovered,
            "evaluation": figures,
        }


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What changes no bit of the result; the fields are the options of the same names."""

    device: str = "cpu"
    scheduler: str | None = None
    trust_remote_code: bool = False
    device_memory: int | None = None
    host_memory: int | None = None
    scratch: Path | None = None


def run_pipeline(
    pipeline: Pipeline,
    workdir: Path,
    *,
    model: str | Path | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> PipelineReport:
    """Run all stages of a pipeline; what is finished in ``workdir`` is taken as it is, after a check.

    Args:
        pipeline: What to do.
        workdir: Gets ``store``, ``plan.json``, ``operators.safetensors``, ``recovered`` and ``evaluation.json``.
        model: Takes the place of the pipeline's ``model.path``.
        options: Device, budgets, scheduler.
        progress: Who is told how far it is.

    Raises:
        RequestError: If no model is named, or ``workdir`` holds results of something else.
        GhoststreamError: What the stages raise.

    Memory: the largest of the stages'.
    """
    run = _Run(pipeline, workdir, model, options or RunOptions(), progress or SilentProgress())
    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    if pipeline.needs_store:
        run.capture()
    plan = run.select()
    operators = run.solve(plan)
    run.export(operators)
    return PipelineReport(
        name=pipeline.name,
        plan=plan,
        store=str(workdir / "store") if pipeline.needs_store else None,
        operators=str(workdir / "operators.safetensors"),
        recovered=str(workdir / "recovered"),
        evaluation=run.evaluate(),
    )


class _Run:
    """The stages of one pipeline in one folder."""

    def __init__(
        self,
        pipeline: Pipeline,
        workdir: Path,
        model: str | Path | None,
        options: RunOptions,
        progress: Progress,
    ) -> None:
        from ghoststream.checkpoint.hub import resolve_model

        name = model or pipeline.model.path
        if name is None:
            msg = f"the pipeline {pipeline.name} names no model; give one with --model"
            raise RequestError(msg)
        self._pipeline, self._workdir, self._options, self._progress = pipeline, workdir, options, progress
        self._root = resolve_model(name, revision=pipeline.model.revision).root

    def capture(self) -> None:
        from ghoststream.stages.capturing.capture import capture

        wanted = self._pipeline.capture.model_dump()
        capture(self._root, store=str(self._workdir / "store"), **wanted, **self._model_options())

    def select(self) -> PruningPlan:
        from ghoststream.stages.searching.search import SEARCH_CRITERIA, search
        from ghoststream.stages.select import read_plan, select
        from ghoststream.stages.session import ModelOptions, ModelSession

        wanted = self._pipeline.select
        if wanted.remove is None:
            options = ModelOptions(trust_remote_code=self._options.trust_remote_code)
            return read_plan(str(wanted.spans), ModelSession(self._root, options).skeleton.n_layers)
        if wanted.criterion in SEARCH_CRITERIA:
            solving = self._pipeline.solve
            return search(
                self._root,
                wanted.remove,
                criterion=wanted.criterion,
                max_spans=wanted.max_spans,
                held_out=wanted.held_out,
                operator=solving.operator,
                weights=solving.weights,
                options=solving.options,
                out=self._workdir / "plan.json",
                **self._text(),
                **self._model_options(),
            ).plan
        return select(
            self._workdir / "store",
            wanted.remove,
            criterion=wanted.criterion,
            model=self._root,
            trust_remote_code=self._options.trust_remote_code,
            out=self._workdir / "plan.json",
            scheduler=self._options.scheduler,
            progress=self._progress,
        ).plan

    def solve(self, plan: PruningPlan) -> OperatorSet:
        from ghoststream.stages.repair.auto import AUTO
        from ghoststream.stages.repair.fit import fit
        from ghoststream.stages.solve import solve

        out, found = self._workdir / "operators.safetensors", self._workdir / "plan.json"
        if self._pipeline.solve.operator == AUTO:
            source = found if found.is_file() else plan
            return fit(
                self._root,
                source,
                operator=AUTO,
                held_out=self._pipeline.select.held_out,
                out=out,
                **self._text(),
                **self._model_options(),
            )
        part = self._pipeline.solve
        return solve(
            self._workdir / "store",
            plan,
            operator=part.operator,
            options=part.options,
            weights=part.weights,
            out=out,
            model=self._root,
            precision=part.precision,
            scheduler=self._options.scheduler,
            progress=self._progress,
        )

    def export(self, operators: OperatorSet) -> None:
        from ghoststream.stages.export import export

        export(self._root, operators, self._workdir / "recovered", progress=self._progress)

    def evaluate(self) -> EvaluationReport | None:
        from ghoststream.stages.evaluate import evaluate

        if self._pipeline.evaluate is None:
            return None
        return evaluate(
            [self._root, self._workdir / "recovered"],
            json_path=self._workdir / "evaluation.json",
            **self._pipeline.evaluate.model_dump(),
            **self._model_options(),
        )

    def _text(self) -> dict[str, Any]:
        return self._pipeline.capture.model_dump(exclude={"layers", "store_dtype"})

    def _model_options(self) -> dict[str, Any]:
        model = self._pipeline.model
        runtime = {key: value for key, value in asdict(self._options).items() if key != "scheduler"}
        return {
            "dtype": model.dtype,
            "attention": model.attention,
            "micro_batch": model.micro_batch,
            "progress": self._progress,
            **runtime,
        }
