"""Evaluate: perplexities of several models on one text, in as few passes over weights as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Unpack

from ghoststream.activations import ActivationStore
from ghoststream.errors import ArtifactError, OutputExistsError, RequestError
from ghoststream.evaluation import EvaluationReport, EvaluationRow
from ghoststream.files import atomic_write_json, differences, file_digest, read_json, require_writable
from ghoststream.operators import OperatorSet
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos, TextPart, library_versions
from ghoststream.recovery import RecoveredInfo, load_recovered
from ghoststream.stages.measurement import Measurement, Member, SharedPass
from ghoststream.stages.session import ComputeRequest, ModelOptions, ModelSession, TextOptions


def evaluate(
    models: Sequence[str | Path],
    *,
    text: str | None = None,
    length: int = 512,
    sequences: int | None = None,
    store: str | Path | None = None,
    json_path: Path | None = None,
    pack: bool = True,
    bos: Bos = "auto",
    part: TextPart = "heldout",
    progress: Progress | None = None,
    **compute: Unpack[ComputeRequest],
) -> EvaluationReport:
    """Measure perplexities on non-overlapping windows of a text, streamed.

    A recovered folder or an operator file that is given together with its base becomes a lane of the base's pass
    (known by the base's fingerprint); any other model is a pass of its own, and the report's notes say so.

    Args:
        models: Local folders, hub ids or operator files, in the order in which rows are wanted.
        text: Text specification; or give ``store``.
        length: Tokens of a window.
        sequences: How many windows; all that the text gives if ``None``.
        store: Activation store of the models' base, whose text is measured on: the pass starts from the last stored
            states that all models share, and the layers before are not computed again. ``length``, ``sequences`` and
            the text's options are the store's.
        json_path: Where to write the rows as JSON; may hold the rows of just this request.
        pack: Whether documents are joined before they are cut into windows.
        bos: When the beginning-of-sequence token is put in front.
        part: Which part of a text that has a standard split.
        progress: Who is told how far it is.
        **compute: See :class:`~ghoststream.stages.session.ComputeRequest`.

    Raises:
        RequestError: If no model is given, an operator file without its base, both or neither of ``text`` and ``store``,
            or ``json_path`` cannot be written.
        MismatchError: If the store is not of the models' base, or was computed in another way.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        OutputExistsError: If ``json_path`` holds anything else.
        GhoststreamError: What opening models, the text or the store raises.

    Memory: that of one :class:`~ghoststream.streaming.StreamedPass` at a time.
    """
    if not models:
        msg = "no model to evaluate; give at least one folder or hub id"
        raise RequestError(msg)
    wanted = _wanted_text(text, store, TextOptions(text or "", sequences, length, pack, bos, part))
    options = ModelOptions(**compute)
    passes = _plan_passes([_open(model, options) for model in models])
    measurements = [Measurement(one, wanted) for one in passes]
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


def _wanted_text(
    text: str | None, store: str | Path | None, options: TextOptions
) -> TextOptions | ActivationStore:
    if (text is None) == (store is None):
        msg = "give either a text to measure on, or a store whose text and states are taken"
        raise RequestError(msg)
    return options if store is None else ActivationStore.open(str(store))


@dataclass(frozen=True)
class _Opened:
    """One thing to measure: a model, and the operators and base that make it a lane, where it has them."""

    name: str
    digest: str
    session: ModelSession | None
    operators: OperatorSet | RecoveredInfo | None
    base: str | None

    def over(self, base: ModelSession) -> OperatorSet | None:
        """Return the operators, those that are folded into weights told from the base's."""
        if isinstance(self.operators, RecoveredInfo):
            return self.operators.operators_over(base.root)
        return self.operators


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
    return _Opened(session.name, digest, session, info, str(info.base["digest"]))


def _plan_passes(models: Sequence[_Opened]) -> list[SharedPass]:
    bases = {
        one.digest: SharedPass(one.session) for one in reversed(models) if one.base is None and one.session
    }
    passes = list(reversed(bases.values()))
    for position, one in enumerate(models):
        home = bases.get(one.base or one.digest)
        operators = one.over(home.session) if home is not None else None
        if home is None:
            if one.session is None:
                msg = f"{one.name} holds operators for the checkpoint {one.base}; give that model too, before or after it"
                raise RequestError(msg)
            home = SharedPass(one.session)
            passes.append(home)
        home.members.append(Member(position, one.name, one.digest, operators))
    return passes


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


def _notes(passes: Sequence[SharedPass]) -> tuple[str, ...]:
    notes = []
    for one in passes:
        names = ", ".join(member.name for member in one.members)
        if len(one.members) > 1:
            notes.append(f"one pass over the weights of {one.session.name} measured {names}")
        elif len(passes) > 1:
            notes.append(f"{names} needed a pass of its own")
    return tuple(notes)
