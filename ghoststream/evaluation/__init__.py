"""Evaluation: losses, perplexities and task scores of lanes, and the reports made of them."""

from __future__ import annotations

from ghoststream.costs import default_logit_tokens
from ghoststream.evaluation.bootstrap import PairedDifference, paired_bootstrap
from ghoststream.evaluation.induction import induction_tokens
from ghoststream.evaluation.losses import LossAccumulator, LossSummary, LossSums
from ghoststream.evaluation.positions import SampledPositions
from ghoststream.evaluation.report import EvaluationReport, EvaluationRow
from ghoststream.evaluation.requests import RequestBatches, RequestScores, ScoredWindow
from ghoststream.evaluation.tasks import (
    TaskMetric,
    TaskReport,
    TaskResult,
    TaskRow,
    compare_rows,
    require_trusted_tasks,
    task_results,
)

__all__ = [
    "EvaluationReport",
    "EvaluationRow",
    "LossAccumulator",
    "LossSummary",
    "LossSums",
    "PairedDifference",
    "RequestBatches",
    "RequestScores",
    "SampledPositions",
    "ScoredWindow",
    "TaskMetric",
    "TaskReport",
    "TaskResult",
    "TaskRow",
    "compare_rows",
    "default_logit_tokens",
    "induction_tokens",
    "paired_bootstrap",
    "require_trusted_tasks",
    "task_results",
]
