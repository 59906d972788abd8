"""The one table of artifact kinds: how each is explained and checked, and what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from ghoststream.stages.artifacts import bases, check, explain
from ghoststream.stages.artifacts.identify import Kind


class ArtifactKind(NamedTuple):
    """What is done with artifacts of one kind.

    Attributes:
        explain: Tells what one is, from headers and metadata.
        check: Reads one whole, and returns what is broken.
        checked: What ``check`` looks at.
        base: Says what model it was made of; None where it was made of none.
    """

    explain: Callable[[str], explain.Explanation]
    check: Callable[[str], list[str]]
    checked: str
    base: Callable[[str], bases.Base] | None = None


KINDS: Mapping[Kind, ArtifactKind] = MappingProxyType(
    {
        Kind.STORE: ArtifactKind(
            explain.explain_store,
            check.check_store,
            "manifest, metadata, shards, chunks, tokens",
            bases.base_of_store,
        ),
        Kind.CHECKPOINT: ArtifactKind(
            explain.explain_checkpoint,
            check.check_checkpoint,
            "index, headers, sizes, every tensor, checksums where there are any",
        ),
        Kind.RECOVERED: ArtifactKind(
            explain.explain_recovered,
            check.check_recovered,
            "checksums, index, headers, sizes, every tensor, provenance",
            bases.base_of_export,
        ),
        Kind.GGUF: ArtifactKind(
            explain.explain_gguf, check.check_gguf, "checksums, provenance", bases.base_of_export
        ),
        Kind.ADAPTER: ArtifactKind(
            explain.explain_adapter,
            check.check_adapter,
            "checksums, header, every tensor, provenance",
            bases.base_of_export,
        ),
        Kind.OPERATORS: ArtifactKind(
            explain.explain_operators,
            check.check_operators,
            "header, digests, values",
            bases.base_of_operators,
        ),
        Kind.TENSORS: ArtifactKind(explain.explain_tensors, check.check_tensors, "header and size"),
        Kind.PLAN: ArtifactKind(
            explain.explain_plan,
            check.check_plan,
            "digest, plan, candidates, methods",
            bases.base_of_plan,
        ),
        Kind.EXPLORATION: ArtifactKind(
            explain.explain_exploration,
            check.check_exploration,
            "digest, figures, every file beside the report",
            bases.base_of_exploration,
        ),
        Kind.ESTIMATE: ArtifactKind(explain.explain_estimate, check.check_json, "JSON"),
        Kind.EVALUATION: ArtifactKind(explain.explain_evaluation, check.check_figures, "JSON, digest"),
        Kind.TASKS: ArtifactKind(explain.explain_tasks, check.check_figures, "JSON, digest"),
        Kind.RUN: ArtifactKind(explain.explain_run, check.check_run, "every field"),
    }
)
