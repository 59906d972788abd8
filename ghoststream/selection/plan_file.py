"""The plan file: which layers go.

Where a criterion chose them, it also says what was seen and how they are to be repaired.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghoststream.errors import ArtifactError, InputNotFoundError, PlanError, RequestError
from ghoststream.files import atomic_write_json, json_digest, names_file, read_json, sealed, unseal
from ghoststream.files.kinds import JSON, require_kind
from ghoststream.options import Method
from ghoststream.spans import PruningPlan, Span, shortened

_ENCODING = {"encoding-type": "ghoststream-plan", "encoding-version": "3.0"}
_BY_HAND = frozenset({"n_layers", "spans"})
_ADVICE = "restore it from a copy, or select again"
# Spans, and lists of layers that may be meant for them.
_LIKE_SPANS = re.compile(r"[\s0-9:;,\[\]()-]*")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Selection:
    """The layers to remove, and how that came about.

    Attributes:
        plan: The layers to remove.
        criterion: What chose them; empty where a user did.
        meaning: What the figures of the candidates say.
        candidates: JSON data of every candidate, ``spans`` and whether it was ``chosen``. Where it was
            scored, in order of layers, its ``score``. Where it was measured, best first, its ``loss``,
            ``gap`` (loss above the dense model's), the ``gap_standard_error``, and how it was repaired.
        methods: How each boundary is to be repaired, as it was measured; empty where nothing was repaired.
        dense_loss: Loss of the dense model on the sequences that were measured on; None where nothing was
            measured.
        passes: Passes over the weights that it took.
        recipe: What decides all of it.
        details: What else the criterion saw, as JSON data.
        base: The model that it was chosen for: its fingerprint and, as ``tensors``, digests of its tensors.
    """

    plan: PruningPlan
    criterion: str = ""
    meaning: str = ""
    candidates: tuple[Row, ...] = ()
    methods: tuple[Method, ...] = ()
    dense_loss: float | None = None
    passes: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> tuple[tuple[Span, float], ...]:
        """Candidates of one span and their scores."""
        return tuple((Span(*row["spans"][0]), row["score"]) for row in self.candidates if "score" in row)

    @property
    def chosen(self) -> tuple[Span, ...]:
        """The spans of the candidates that the plan consists of; neighbours are one span of the plan."""
        return tuple(Span(*span) for row in self.candidates if row.get("chosen") for span in row["spans"])

    @property
    def digest(self) -> str:
        """Digest of the recipe."""
        return json_digest(dict(self.recipe))

    @property
    def is_not_lowest(self) -> bool:
        """Whether the first candidate was measured, has the lowest loss, and is not the plan."""
        best = self.candidates[0] if self.candidates else {}
        return "gap" in best and not best.get("chosen")

    @property
    def reason(self) -> str:
        """Why the plan is taken and not the first candidate, for a reader."""
        if len(self.candidates[0]["spans"]) > len(self.plan.spans):
            return "has fewer spans"
        return "keeps better what can be copied from the window"

    def to_json(self) -> dict[str, Any]:
        """Return the plan file's JSON data, with its digest.

        ``n_layers`` and ``spans`` are those of the plan.
        """
        data = {
            **_ENCODING,
            **self.plan.to_json(),
            "criterion": self.criterion,
            "meaning": self.meaning,
            "candidates": [dict(row) for row in self.candidates],
            "methods": [method.to_json() for method in self.methods],
            "dense_loss": self.dense_loss,
            "passes": self.passes,
            "recipe": dict(self.recipe),
            "details": dict(self.details),
            "base": dict(self.base),
        }
        return sealed(data)

    def save(self, path: Path) -> None:
        """Write the plan file, whole or not at all.

        Raises:
            DiskFullError: If no space is left.
        """
        atomic_write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Selection:
        """Read a plan file: what :meth:`save` wrote, or ``{"n_layers": 30, "spans": [[13, 19]]}`` of a user.

        A file that says anything but a plan must be whole: a part of it that is lost or changed would
        otherwise be another repair.

        Raises:
            InputNotFoundError: If there is no such file.
            RequestError: If it looks like something else.
            PlanError: If a user's file is no plan, or has other entries too.
            ArtifactError: If it is no JSON, or not all that a criterion wrote.
        """
        require_kind(path, JSON, "a plan file of `ghoststream select`")
        data = read_json(path)
        if not isinstance(data, dict):
            msg = f'{path} is not a pruning plan; it needs "n_layers" and "spans": [[start, stop], ...]'
            raise PlanError(msg)
        if data.keys() <= _BY_HAND:
            return cls(_plan_in(data, path))
        if not data.keys() & _WRITTEN:
            others = ", ".join(sorted(set(data) - _BY_HAND))
            msg = f'{path} is not a pruning plan: it says {others}; a plan by hand has "n_layers" and "spans"'
            raise PlanError(msg)
        whole = unseal(data, path, advice=_ADVICE)
        if data.get("encoding-type") != _ENCODING["encoding-type"]:
            msg = f"{path} is not a pruning plan but holds {data.get('encoding-type')}; check the path"
            raise PlanError(msg)
        try:
            selection = cls._from_json(whole)
        except (KeyError, TypeError, ValueError) as error:
            msg = (
                f"{path} lacks a part of what `ghoststream select` writes ({error!r}): another version wrote "
                "it; select again"
            )
            raise ArtifactError(msg) from error
        if selection.methods and len(selection.methods) != len(selection.plan.spans):
            msg = (
                f"{path} says how {len(selection.methods)} of {len(selection.plan.spans)} spans are "
                "repaired; select again"
            )
            raise ArtifactError(msg)
        return selection

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> Selection:
        return cls(
            plan=PruningPlan.from_json(data),
            criterion=str(data["criterion"]),
            meaning=str(data["meaning"]),
            candidates=tuple(dict(row) for row in data["candidates"]),
            methods=tuple(Method.make(method) for method in data["methods"]),
            dense_loss=None if data["dense_loss"] is None else float(data["dense_loss"]),
            passes=int(data["passes"]),
            recipe=dict(data["recipe"]),
            details=dict(data["details"]),
            base=dict(data["base"]),
        )


_WRITTEN = Selection(PruningPlan(1)).to_json().keys() - _BY_HAND


def scored_rows(scores: Sequence[tuple[Span, float]], chosen: Sequence[Span]) -> tuple[Row, ...]:
    """Return candidates of one span as a plan file has them."""
    return tuple(
        {"spans": [[span.start, span.stop]], "score": score, "chosen": span in chosen}
        for span, score in scores
    )


def candidate_table(candidates: Sequence[Row], recipe: Row) -> tuple[list[str], list[list[Any]]]:
    """Return headers and rows of what a criterion scored or measured, as a plan file has it.

    Args:
        candidates: JSON data of the candidates.
        recipe: What decided them; it names the texts where there are several.
    """
    texts = recipe["text"]["spec"] if any("gaps_by_text" in row for row in candidates) else []
    figures = {"loss": "loss", "gap": "above dense", "gap_standard_error": "standard error", "score": "score"}
    present = [name for name in figures if any(name in row for row in candidates)]
    is_repaired, is_chosen, has_rounds = (
        any(name in row for row in candidates) for name in ("repair", "chosen", "round")
    )
    shown = [
        *(["round"] if has_rounds else []),
        *(["repaired by"] if is_repaired else []),
        *(figures[name] for name in present),
        *texts,
    ]
    rows = [
        [
            " ".join(f"[{start},{stop})" for start, stop in row["spans"]),
            *([row.get("round")] if has_rounds else []),
            *(["; ".join(row["repair"])] if is_repaired else []),
            *(row.get(name) for name in present),
            *row.get("gaps_by_text", (None,) * len(texts)),
            *(["chosen" if row.get("chosen") else ""] if is_chosen else []),
        ]
        for row in candidates
    ]
    return ["removed", *shown, *([""] if is_chosen else [])], rows


def plan_name(removed: int | str) -> str:
    """Return the name of the plan of a number of layers, in the folder of an exploration."""
    return f"plans/remove-{removed}.json"


def read_plan(source: str | Path | PruningPlan, n_layers: int, *, or_number: bool = False) -> Selection:
    """Return what a plan file, spans such as ``13:19``, or a plan says, checked against the model.

    Args:
        source: What says which layers go.
        n_layers: Layers of the model.
        or_number: Whether a number of layers could have been given too, for messages.

    Raises:
        PlanError: If it is no plan, or one for another number of layers.
        InputNotFoundError: If it looks like a file, and there is none.
        ArtifactError: If the file is damaged.
    """
    if isinstance(source, PruningPlan):
        selection = Selection(source)
    elif names_file(source):
        selection = Selection.load(Path(source))
    else:
        text = str(source)
        if not _LIKE_SPANS.fullmatch(text):
            raise _no_plan(text, or_number=or_number)
        selection = Selection(PruningPlan.parse(n_layers, text))
    selection.plan.require_fits(n_layers)
    if not selection.plan.spans:
        msg = "the plan removes no layer; name at least one span, for example 13:19"
        raise PlanError(msg)
    return selection


def require_count_or_plan(remove: int | str | Path | PruningPlan) -> int | str | Path | PruningPlan:
    """Return how many layers are to go, as a number, or which, as they were given.

    Raises:
        RequestError: If it is a number below 1.
    """
    if isinstance(remove, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", remove):
        remove = int(remove)
    if isinstance(remove, int) and remove < 1:
        msg = (
            f"cannot remove {remove} layers; give a number of at least 1, a plan file, or spans such as 13:19"
        )
        raise RequestError(msg)
    return remove


def _no_plan(source: str, *, or_number: bool) -> PlanError | InputNotFoundError:
    """Return the error for a text that names no plan file, and does not look like spans."""
    plans: list[Path] = []
    with suppress(OSError):  # too long for a path
        plans = sorted(Path(source).glob(plan_name("*")), key=lambda plan: (len(plan.name), plan.name))
    if plans:
        msg = f"{source} is the folder of an exploration; name one of its plans, such as {plans[0]}"
        return PlanError(msg)
    if Path(source).suffix == ".json" or "/" in source:
        msg = f"there is no plan file {source}; check the path, or give spans such as 13:19"
        return InputNotFoundError(msg)
    file = "a plan file that is there"
    others = f"a number of layers, nor {file}," if or_number else file
    msg = f"{shortened(source)!r} is neither {others} nor spans such as 13:19"
    return PlanError(msg)


def _plan_in(data: Mapping[str, Any], path: Path) -> PruningPlan:
    try:
        return PruningPlan.from_json(data)
    except PlanError as error:
        msg = f"{path}: {error}"
        raise PlanError(msg) from error
