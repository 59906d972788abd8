"""Evaluation: losses and perplexities of lanes, and the reports made of them."""

from __future__ import annotations

from ghoststream.evaluation.losses import LossAccumulator, LossSummary, default_logit_tokens
from ghoststream.evaluation.report import EvaluationReport, EvaluationRow

__all__ = ["EvaluationReport", "EvaluationRow", "LossAccumulator", "LossSummary", "default_logit_tokens"]
