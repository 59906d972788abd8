"""Evaluate: perplexities of several models on one text, in as few passes over weights as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from ghoststream.errors import ArtifactError, OutputExistsError, RequestError
from ghoststream.evaluation import (
    EvaluationReport,
    EvaluationRow,
    LossAccumulator,
    LossSummary,
    default_logit_tokens,
)
from ghoststream.files import atomic_write_json, differences, file_digest, read_json, require_writable
from ghoststream.operators import OperatorSet
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos, EvaluateRecipe, TextPart, library_versions
from ghoststream.recovery import load_recovered
from ghoststream.spans import PruningPlan
from ghoststream.stages.lanes import operator_lane
from ghoststream.stages.session import (
    ModelOptions,
    ModelSession,
    TextOptions,
    default_micro_batch,
    dtype_name,
)
from ghoststream.streaming import Lane, PassOptions, StatesFactory, StreamedPass, make_batches


@dataclass(frozen=True)
class _Member:
    """One model to measure: its place in the request, its identity, and its operators if it is a lane."""

    position: int
    name: str
    fingerprint: str
    operators: OperatorSet | None


@dataclass
class _Pass:
    """Models that share one read of the weights: a base and what was recovered from it."""

    session: ModelSession
    members: list[_Member] = field(default_factory=list)


def evaluate(
    models: Sequence[str | Path],
    *,
    text: str,
    length: int,
    sequences: int | None = None,
    json_path: Path | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    micro_batch: int | None = None,
    pack: bool = True,
    bos: Bos = "auto",
    part: TextPart = "heldout",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    host_memory: int | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure perplexities on non-overlapping windows of a text, streamed.

    A recovered folder or an operator file that is given together with its base becomes a lane of the base's pass
    (known by the base's fingerprint); any other model is a pass of its own, and the report's notes say so.

    Args:
        models: Local folders, hub ids or operator files, in the order in which rows are wanted.
        text: Text specification.
        length: Tokens of a window.
        sequences: How many windows; all that the text gives if ``None``.
        json_path: Where to write the rows as JSON; may hold the rows of just this request.
        dtype: Compute dtype; each checkpoint's own if ``None``.
        attention: Attention implementation.
        micro_batch: Sequences in one forward; what works in half a U, at most 2,048 tokens, if ``None``.
        pack: Whether documents are joined before they are cut into windows.
        bos: When the beginning-of-sequence token is put in front.
        part: Which part of a text that has a standard split.
        revision: Revision of hub models.
        trust_remote_code: Whether models' own code may run.
        device: Where layers are computed.
        host_memory: Bytes of hidden states kept in memory between layers; ``None`` is no limit.
        progress: Who is told how far it is.

    Raises:
        RequestError: If no model is given, an operator file without its base, or ``json_path`` cannot be written.
        OutputExistsError: If ``json_path`` holds anything else.
        GhoststreamError: What opening models or the text raises.

    Memory: that of one :class:`~ghoststream.streaming.StreamedPass` at a time.
    """
    if not models:
        msg = "no model to evaluate; give at least one folder or hub id"
        raise RequestError(msg)
    options = ModelOptions(dtype, attention, revision, trust_remote_code, device)
    passes = _plan_passes([_open(model, options) for model in models])
    wanted = TextOptions(text, sequences, length, pack, bos, part)
    measurements = [_Measurement(one, wanted, micro_batch, host_memory) for one in passes]
    if json_path is not None:
        _require_free_or_same(json_path, [asked for one in measurements for asked in one.requests()])
    rows: dict[int, EvaluationRow] = {}
    for number, measurement in enumerate(measurements):
        for member, losses, recipe in measurement.run(progress or SilentProgress()):
            rows[member.position] = EvaluationRow(
                member.name, losses, recipe, number, member.fingerprint, library_versions()
            )
    report = EvaluationReport(tuple(rows[position] for position in sorted(rows)), _notes(passes))
    if json_path is not None:
        atomic_write_json(json_path, report.to_json())
    return report


@dataclass(frozen=True)
class _Opened:
    """One thing to measure: a model, and the operators and base that make it a lane, where it has them."""

    name: str
    digest: str
    session: ModelSession | None
    operators: OperatorSet | None
    base: str | None


def _open(model: str | Path, options: ModelOptions) -> _Opened:
    path = Path(model)
    if path.is_file() and path.suffix == ".safetensors":
        operators = OperatorSet.load(path)
        base = str(operators.metadata.get("base", {}).get("digest"))
        return _Opened(str(model), file_digest(path), None, operators, base)
    session = ModelSession(model, options)
    digest = str(session.fingerprint["digest"])
    info = load_recovered(session.root)
    if info is None:
        return _Opened(session.name, digest, session, None, None)
    return _Opened(session.name, digest, session, info.operators, str(info.base["digest"]))


def _plan_passes(models: Sequence[_Opened]) -> list[_Pass]:
    bases = {one.digest: _Pass(one.session) for one in reversed(models) if one.base is None and one.session}
    passes = list(reversed(bases.values()))
    for position, one in enumerate(models):
        home = bases.get(one.base or one.digest)
        operators = one.operators if home is not None else None
        if home is None:
            if one.session is None:
                msg = f"{one.name} holds operators for the checkpoint {one.base}; give that model too, before or after it"
                raise RequestError(msg)
            home = _Pass(one.session)
            passes.append(home)
        home.members.append(_Member(position, one.name, one.digest, operators))
    return passes


class _Measurement:
    """One pass: its tokens, its lanes, and the losses that come of it."""

    def __init__(
        self, one: _Pass, text: TextOptions, micro_batch: int | None, host_memory: int | None
    ) -> None:
        self._skeleton = one.session.skeleton
        self._members = one.members
        self._host_memory = host_memory
        tokens = one.session.tokens(text)
        self._recipe = EvaluateRecipe.model_validate(
            {
                "text": text.recipe(),
                "tokens_digest": tokens.digest,
                "dtype": dtype_name(self._skeleton.dtype),
                "attention": self._skeleton.attention,
                "micro_batch": micro_batch or default_micro_batch(self._skeleton, text.length),
                "loss_chunk_tokens": default_logit_tokens(
                    self._skeleton.vocab_size, self._skeleton.unit_bytes
                ),
            }
        )
        self._batches = make_batches(tokens.ids, tokens.mask, self._recipe.micro_batch)
        self._losses = [LossAccumulator(tokens.n_sequences) for _ in one.members]

    def requests(self) -> list[tuple[int, dict[str, Any]]]:
        """Return what decides the figures of each member, with its place in the request."""
        recipe = self._recipe.to_json()
        return [
            (member.position, {"fingerprint": member.fingerprint, "recipe": recipe})
            for member in self._members
        ]

    def run(self, progress: Progress) -> list[tuple[_Member, LossSummary, dict[str, Any]]]:
        """Run the pass; one result a member, in their order."""
        skeleton = self._skeleton
        lanes = [
            self._lane(member, losses) for member, losses in zip(self._members, self._losses, strict=True)
        ]
        factory = StatesFactory(
            self._batches,
            skeleton.hidden_size,
            skeleton.dtype,
            device=skeleton.device,
            budget_bytes=self._host_memory,
        )
        options = PassOptions(logit_tokens=self._recipe.loss_chunk_tokens, progress=progress)
        StreamedPass(skeleton, self._batches, lanes, factory, options).run()
        recipe = self._recipe.to_json()
        return [
            (member, losses.summary(), recipe)
            for member, losses in zip(self._members, self._losses, strict=True)
        ]

    def _lane(self, member: _Member, losses: LossAccumulator) -> Lane:
        if member.operators is None:
            return Lane(member.name, PruningPlan(self._skeleton.n_layers), logits=losses)
        return operator_lane(member.name, member.operators, self._skeleton, losses)


def _require_free_or_same(path: Path, asked: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Check before any pass that the figures can be written and that nothing else would be lost by it."""
    require_writable(path)
    if not path.exists():
        return
    try:
        rows = read_json(path)
        found = [{key: row[key] for key in ("fingerprint", "recipe")} for row in rows]
    except (ArtifactError, KeyError, TypeError):
        found = None
    if found is None or differences(found, [request for _, request in sorted(asked, key=itemgetter(0))]):
        msg = f"{path} exists and does not hold the figures of this request; choose another name, or move it away"
        raise OutputExistsError(msg)


def _notes(passes: Sequence[_Pass]) -> tuple[str, ...]:
    notes = []
    for one in passes:
        names = ", ".join(member.name for member in one.members)
        if len(one.members) > 1:
            notes.append(f"one pass over the weights of {one.session.name} measured {names}")
        elif len(passes) > 1:
            notes.append(f"{names} needed a pass of its own")
    return tuple(notes)
