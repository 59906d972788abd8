"""Which models share a pass: a base, and what was recovered from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ghoststream.checkpoint.fingerprint import require_undamaged
from ghoststream.checkpoint.hub import MODEL
from ghoststream.errors import RequestError
from ghoststream.files import file_digest, require_path
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute
from ghoststream.recovery import RecoveredInfo, load_recovered
from ghoststream.recovery.names import PROVENANCE_NAME, is_adapter
from ghoststream.spans import PruningPlan
from ghoststream.stages.lanes import operator_lane
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import Batch, Lane, LogitsObserver


@dataclass(frozen=True)
class MeasuredModel:
    """One model to measure.

    Attributes:
        position: Its place in the request.
        name: What a reader calls it.
        fingerprint: Digest of its folder, or of its operator file.
        operators: What makes it a lane of the group's base; ``None`` if it is the base.
    """

    position: int
    name: str
    fingerprint: str
    operators: OperatorSet | None

    def lane(
        self,
        session: ModelSession,
        logits: LogitsObserver,
        scored: Callable[[Batch], torch.Tensor] | None = None,
    ) -> Lane:
        """Return its lane in a pass over its base.

        For ``scored`` see :class:`~ghoststream.streaming.Lane`.
        """
        if self.operators is None:
            return Lane(self.name, PruningPlan(session.skeleton.n_layers), logits=logits, scored=scored)
        return operator_lane(self.name, self.operators, session.skeleton, logits, scored)


@dataclass
class ModelGroup:
    """Models that are measured in one pass over the weights: a base, and what was recovered from it.

    Attributes:
        session: The base.
        models: The models, in the order of the request.
    """

    session: ModelSession
    models: list[MeasuredModel] = field(default_factory=list)


def group_models(
    models: Sequence[str | Path], compute: Compute, opened: Sequence[ModelSession] = ()
) -> list[ModelGroup]:
    """Open models and find out which are lanes of which.

    A recovered folder or an operator file that is given together with its base becomes a lane of the base's
    pass (known by the base's fingerprint); any other model is a group of its own.

    Args:
        models: Local folders, hub ids or operator files.
        compute: How models are opened.
        opened: Models that are open already; they come first.

    Raises:
        RequestError: If no model is given, or an operator file without its base.
        CheckpointError: If a base changed since something else was made of it.
        GhoststreamError: What opening a model raises.
    """
    if not models and not opened:
        msg = "no model to evaluate; give at least one folder or hub id"
        raise RequestError(msg)
    everything = [*map(_of_session, opened), *(_open(model, compute) for model in models)]
    given = {one.digest: one for one in everything if one.session}
    wanted = {one.base for one in everything if one.session is None}
    bases = {
        one.digest: ModelGroup(one.session)
        for one in reversed(everything)
        if one.session and _is_base(one, given, wanted)
    }
    groups = list(reversed(bases.values()))
    for position, one in enumerate(everything):
        if one.base not in given:
            _require_none_damaged(one, given.values())
        group = bases.get(one.digest)
        if group is not None:
            if one.session is not None and one.session.root != group.session.root:
                group = ModelGroup(one.session)  # a copy, whose bytes may have changed where no sample is
                groups.append(group)
            group.models.append(MeasuredModel(position, one.name, one.digest, None))
            continue
        group = bases.get(str(one.base))
        operators = one.over(group.session) if group is not None else None
        if group is None:
            if one.session is None:
                msg = (
                    f"{one.name} holds operators for the checkpoint {one.base}; give that model too, before "
                    "or after it"
                )
                raise RequestError(msg)
            group = ModelGroup(one.session)
            groups.append(group)
        group.models.append(MeasuredModel(position, one.name, one.digest, operators))
    return groups


def group_notes(groups: Sequence[ModelGroup]) -> tuple[str, ...]:
    """Say which models were measured together, and which needed a pass of their own."""
    notes = []
    for group in groups:
        names = ", ".join(model.name for model in group.models)
        if len(group.models) > 1:
            notes.append(f"one pass over the weights of {group.session.name} measured {names}")
        elif len(groups) > 1:
            notes.append(f"{names} needed a pass of its own")
    return tuple(notes)


@dataclass(frozen=True)
class _Opened:
    """One thing to measure: a model, and the operators and base that make it a lane, where it has them."""

    name: str
    digest: str
    session: ModelSession | None
    operators: OperatorSet | RecoveredInfo | None
    noted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """Digest of the fingerprint of its base."""
        return str(self.noted["digest"]) if "digest" in self.noted else None

    def over(self, base: ModelSession) -> OperatorSet | None:
        """Return the operators, those that are absorbed into weights told from the base's."""
        if isinstance(self.operators, RecoveredInfo):
            base.expect(self.operators.base, f"{self.name} was made of it")
            return self.operators.operators_over(base.root)
        if self.operators is not None:
            base.expect(self.operators.metadata.get("base") or {}, f"{self.name} was made of it")
        return self.operators


def _require_none_damaged(one: _Opened, given: Iterable[_Opened]) -> None:
    """Check that no model that is given is the base of another in which some bytes have changed."""
    for other in given:
        if other is not one and other.session is not None:
            index, since = other.session.skeleton.index, f"{one.name} was made of it"
            require_undamaged(one.noted, other.session.fingerprint, index, since)


def _is_base(one: _Opened, given: Mapping[str, _Opened], wanted: Collection[str | None]) -> bool:
    """Say whether a model is run by itself: it is no lane of one that is, or operators are given for it."""
    others = {digest: other for digest, other in given.items() if digest != one.digest}
    above = others.get(str(one.base))
    return above is None or one.digest in wanted or not _is_base(above, others, wanted)


def _open(model: str | Path, compute: Compute) -> _Opened:
    require_path(model, MODEL)
    path = Path(model)
    if path.is_file() and path.suffix == ".safetensors":
        operators = OperatorSet.load(path)
        noted = {"digest": None, **(operators.metadata.get("base") or {})}
        return _Opened(str(model), file_digest(path), None, operators, noted)
    if is_adapter(path):
        info = load_recovered(path)
        assert info is not None
        return _Opened(str(model), file_digest(path / PROVENANCE_NAME), None, info, info.base)
    return _of_session(ModelSession(model, compute))


def _of_session(session: ModelSession) -> _Opened:
    digest = str(session.fingerprint["digest"])
    info = load_recovered(session.root)
    if info is None:
        return _Opened(session.name, digest, session, None)
    session.expect({"tensors": info.digests}, "it was exported", what="the recovered checkpoint")
    return _Opened(session.name, digest, session, info, info.base)
