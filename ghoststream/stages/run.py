"""A pipeline: capture, selection, solving, export and evaluation, written down in one YAML file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.evaluation import EvaluationReport
from ghoststream.files import disk_errors
from ghoststream.operators import OperatorSet
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos, StoreDtype, TextPart
from ghoststream.spans import PruningPlan


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(_Part):
    """Which model, and how it is computed; the fields are the options of the same names."""

    path: str | None = None
    revision: str | None = None
    dtype: StoreDtype | None = None
    attention: str | None = None
    micro_batch: int | None = Field(default=None, ge=1)


class CapturePart(_Part):
    """What goes into the store."""

    calibration: str
    sequences: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=2)
    layers: tuple[int, ...] | None = None
    store_dtype: StoreDtype | None = None
    pack: bool = True
    bos: Bos = "auto"


class SelectPart(_Part):
    """Which layers go: so many by a criterion, or spans given by hand (``"13:19"``)."""

    remove: int | None = Field(default=None, ge=1)
    criterion: Literal[
        "streamline",
        "shortgpt",
        "uidl",
        "uidl-all",
        "lorp",
        "residual",
        "residual-in-sample",
        "magnitude",
        "magnitude-plus",
        "magnitude-l2",
        "reverse",
        "reverse-last",
    ] = "streamline"
    spans: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.remove is None) == (self.spans is None):
            msg = "give either `remove` (how many layers) or `spans` (which, for example 13:19)"
            raise ValueError(msg)
        return self


class SolvePart(_Part):
    """What is fitted."""

    operator: Literal[
        "ghost",
        "least-squares",
        "linear-patch-diagonal",
        "replace-me-ls",
        "replace-me-cosine",
        "replace-me-cosine-whole",
        "none",
    ] = "ghost"
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] | None = None
    features: Literal["hidden", "normed", "hidden+normed", "mlp", "mlp_output"] = "hidden"
    intercept: bool = False
    rank: int | None = Field(default=None, ge=1)
    solver: Literal["gram", "tsqr"] = "gram"
    precision: Literal["float64", "float32-blocked"] = "float64"
    weights: Literal["uniform", "drop_sinks", "relative"] = "uniform"


class EvaluatePart(_Part):
    """What the base and the recovered model are measured on."""

    text: str
    length: int = Field(default=512, ge=2)
    sequences: int | None = Field(default=None, ge=1)
    part: TextPart = "all"
    pack: bool = True
    bos: Bos = "auto"


class Pipeline(_Part):
    """A whole run. Unknown fields are refused; ``solve`` has defaults, ``evaluate`` may be left out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: ModelPart = ModelPart()
    capture: CapturePart
    select: SelectPart
    solve: SolvePart = SolvePart()
    evaluate: EvaluatePart | None = None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a pipeline file.

        Raises:
            InputNotFoundError: If there is no such file.
            RequestError: If it is not YAML, or a field is missing, unknown or out of range.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, IsADirectoryError) as error:
            msg = f"there is no pipeline file {path}; check the path"
            raise InputNotFoundError(msg) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            msg = f"{path} is not YAML: {' '.join(str(error).split())}"
            raise RequestError(msg) from error
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}" for item in error.errors()
            )
            msg = f"{path} is not a pipeline: {problems}"
            raise RequestError(msg) from error


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """Where the results of a pipeline are, and its figures if it evaluates."""

    name: str
    plan: PruningPlan
    store: str
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
    run.capture()
    plan = run.select()
    operators = run.solve(plan)
    run.export(operators)
    return PipelineReport(
        name=pipeline.name,
        plan=plan,
        store=str(workdir / "store"),
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
        from ghoststream.stages.capture import capture

        wanted = self._pipeline.capture.model_dump()
        capture(self._root, store=str(self._workdir / "store"), **wanted, **self._model_options())

    def select(self) -> PruningPlan:
        from ghoststream.activations import ActivationStore
        from ghoststream.stages.select import read_plan, select

        wanted, store = self._pipeline.select, self._workdir / "store"
        if wanted.remove is None:
            return read_plan(str(wanted.spans), ActivationStore.open(str(store)).n_layers)
        return select(
            store,
            wanted.remove,
            criterion=wanted.criterion,
            model=self._root,
            trust_remote_code=self._options.trust_remote_code,
            out=self._workdir / "plan.json",
            scheduler=self._options.scheduler,
            progress=self._progress,
        ).plan

    def solve(self, plan: PruningPlan) -> OperatorSet:
        from ghoststream.stages.solve import solve

        return solve(
            self._workdir / "store",
            plan,
            out=self._workdir / "operators.safetensors",
            model=self._root,
            scheduler=self._options.scheduler,
            progress=self._progress,
            **self._pipeline.solve.model_dump(),
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
