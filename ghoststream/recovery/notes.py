"""What a card tells of a recovery beside the plan and its operators: the pipeline file, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ghoststream.option_types import Options
from ghoststream.options import Recovery, Text
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from ghoststream.text.identity import without_folders

# What can change a bit of the result: device, memory and folders cannot, nor do they mean anything elsewhere.
_COMPUTE = ("dtype", "attention", "micro_batch", "revision", "trust_remote_code")


@dataclass(frozen=True)
class CardNotes:
    """What only the whole recovery knows.

    Attributes:
        recipe: The pipeline file that does the same, as YAML; empty where operators were exported by hand.
        dense_loss: Loss of the dense model on the held-out windows that the layers were chosen on, if the
            repaired model was measured there.
        loss: That of the repaired model, as the choice of layers measured it.
    """

    recipe: str = ""
    dense_loss: float | None = None
    loss: float | None = None

    @classmethod
    def of(cls, recovery: Recovery, selection: Selection, *, is_given: bool) -> CardNotes:
        """Return the notes of a recovery.

        Args:
            recovery: The request.
            selection: The layers that are removed.
            is_given: Whether the request says which, and not how many.
        """
        recipe = pipeline_yaml(recovery, selection if is_given else None)
        # Of a race the last round, which measures on all windows, comes first.
        measured = [row["loss"] for row in selection.candidates if row.get("chosen") and "loss" in row]
        # Without methods the criterion repairs nothing: its losses are of single layers, or unrepaired.
        if is_given or not selection.methods or selection.dense_loss is None or not measured:
            return cls(recipe)
        return cls(recipe, selection.dense_loss, float(measured[0]))


def pipeline_yaml(recovery: Recovery, given: Selection | None) -> str:
    """Write a recovery as a pipeline file; see :func:`request_of`."""
    data = request_of(recovery, given)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def request_of(recovery: Recovery, given: Selection | None) -> dict[str, Any]:
    """Return what was given of a recovery and can change a bit of its result, as a pipeline file has it.

    Files are named without their folders, and a model by ``--model``: where they are says nothing elsewhere.

    Args:
        recovery: The request.
        given: What a request that says which layers go comes to. A plan that repairs its spans in one way is
            written as these spans and that way, one that repairs them in several as its file.
    """
    data: dict[str, Any] = {}
    data["remove"] = int(str(recovery.remove)) if given is None else given.plan.text
    data["calibration"] = _text(recovery.calibration)
    data["search"] = _given(recovery.search)
    data["method"] = _given(recovery.method)
    if given is not None and given.methods and not recovery.method.is_named:
        # The plan's file said how its spans are repaired, which spans alone do not.
        if len({repr(method) for method in given.methods}) == 1:
            data["method"] = given.methods[0].to_json()
        else:
            data["remove"] = Path(str(recovery.remove)).name
    data["compute"] = {key: value for key, value in _given(recovery.compute).items() if key in _COMPUTE}
    data["storage"] = _given(recovery.storage)
    data["distill"] = None if recovery.distill is None else _given(recovery.distill) or True
    data["form"] = None if recovery.form == "custom" else recovery.form
    data["evaluate"] = None if recovery.evaluate is None else _text(recovery.evaluate)
    return {key: value for key, value in data.items() if value not in (None, {})}


def mergekit_yaml(plan: PruningPlan, *, model: str, dtype: str) -> str:
    """Write the pruning half of a recovery for mergekit: the layers that are left, without operators.

    Args:
        plan: The removed layers, of the first base.
        model: What mergekit calls the base.
        dtype: Dtype of the weights.
    """
    ends = [0, *(end for span in plan.spans for end in (span.start, span.stop)), plan.n_layers]
    ranges = [list(ends[at : at + 2]) for at in range(0, len(ends), 2) if ends[at] < ends[at + 1]]
    slices = [{"sources": [{"model": model, "layer_range": kept}]} for kept in ranges]
    data = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    return yaml.safe_dump(data, sort_keys=False)


def _text(text: Text) -> dict[str, Any]:
    return {"spec": without_folders(text), **_given(text, without=("spec",))}


def _given(group: Options, without: tuple[str, ...] = ()) -> dict[str, Any]:
    data: Mapping[str, Any] = group.to_json()
    return {name: data[name] for name in group.given() if name not in without}
