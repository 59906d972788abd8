"""``ghoststream.json``: where a recovered checkpoint comes from, and the way back to its operators."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.reader import TensorReader
from ghoststream.errors import ArtifactError, CheckpointError, OutputExistsError, PlanError, RequestError
from ghoststream.files import verify_sums
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.operators.joint import joined
from ghoststream.recovery.absorbing import Absorption, standing_operator
from ghoststream.recovery.layout import LayerNames, leaf_names, operator_entry
from ghoststream.recovery.names import PROVENANCE_NAME, has_provenance
from ghoststream.recovery.sidecars import require_sound_sidecars
from ghoststream.spans import PruningPlan, Span
from ghoststream.statistics.features import HIDDEN_AND_MLP, MLP

_KIND = "recovered checkpoint"
_VERSION = 3


@dataclass(frozen=True)
class RecoveredInfo:
    """What a recovered folder knows of its making.

    Attributes:
        folder: The recovered checkpoint.
        plan: Which layers of the base were removed.
        base: Fingerprint of the base checkpoint, and ``tensors``, digests of its tensors.
        base_model_type: The base's ``model_type``.
        kind: Name of the operator kind.
        tensors: For every tensor the digest of its bytes and, if it was copied, its name in the base.
        recorded: What is written of the operators.
        rounds: What the base was made of, where it is a recovered checkpoint itself; see
            :func:`earlier_rounds`.
        versions: Libraries that it was made with.
    """

    folder: Path
    plan: PruningPlan
    base: Mapping[str, Any]
    base_model_type: str
    kind: str
    tensors: Mapping[str, Mapping[str, str | None]]
    recorded: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_round(self) -> dict[str, Any]:
        """Return what a checkpoint that is made of this one keeps of it."""
        return {
            "plan": self.plan.to_json(),
            "base": dict(self.base),
            "base_model_type": self.base_model_type,
            "operators": dict(self.recorded),
            "versions": dict(self.versions),
        }

    @property
    def digests(self) -> dict[str, str]:
        """Digest of the bytes of every tensor, as it was written."""
        return {name: str(entry["digest"]) for name, entry in self.tensors.items()}

    @cached_property
    def operators(self) -> OperatorSet:
        """The operators as they are in the checkpoint (rounded to its dtype, here in float32).

        Raises:
            RequestError: If some are absorbed into weights: they can be told from these with the base only.
            ArtifactError: If ``ghoststream.json`` is damaged.
            CheckpointError: If an operator's tensor is missing or damaged.

        Memory: The operators in float32.
        """
        return self._read(None)

    def operators_over(self, base: Path) -> OperatorSet:
        """Return the operators, the absorbed ones as what was added to the weights of the base.

        Args:
            base: Folder of the base checkpoint.

        Raises:
            ArtifactError: If ``ghoststream.json`` is damaged.
            CheckpointError: If a tensor is missing or damaged.

        Memory: The operators in float32, and two weights that one is absorbed into.
        """
        return self._read(base)

    def _read(self, base: Path | None) -> OperatorSet:
        try:
            boundaries = tuple(self._boundary(entry, base) for entry in self.recorded["boundaries"])
            return OperatorSet(
                plan=self.plan,
                kind=self.kind,
                boundaries=boundaries,
                hidden=int(self.recorded["hidden"]),
                metadata=dict(self.recorded["metadata"]),
                replaced=_read_replaced(self),
            )
        except (KeyError, TypeError) as error:
            raise _damaged(self.folder / PROVENANCE_NAME, error) from error

    def _boundary(self, entry: Mapping[str, Any], base: Path | None) -> BoundaryOperator:
        if "absorbed" not in entry:
            return _read_boundary(self, entry)
        if base is None:
            msg = (
                f"the operator of {Span(*entry['span'])} is absorbed into the weights of {self.folder}; "
                "give the base checkpoint too, from which it can be told"
            )
            raise RequestError(msg)
        absorbed = _absorbed_operator(self, base, entry)
        if entry["features"] != HIDDEN_AND_MLP.name:
            return absorbed
        own = {leaf: name for leaf, name in entry["tensors"].items() if leaf.startswith("linear.")}
        return joined(_read_boundary(self, {**entry, "features": "hidden", "tensors": own}), absorbed)


def describe_repair(
    operators: OperatorSet, names: LayerNames, absorptions: Mapping[Span, Absorption]
) -> dict[str, Any]:
    """Return the plan, and the operators with where each of them went, as ``ghoststream.json`` has them."""
    boundaries = [
        {
            **operator_entry(operator, operators.plan, names),
            **_place(operator, operators.plan, names, absorptions.get(operator.span)),
            "diagnostics": dict(operator.diagnostics),
        }
        for operator in operators.boundaries
    ]
    return {
        "plan": operators.plan.to_json(),
        "operators": {
            "kind": operators.kind,
            "hidden": operators.hidden,
            "metadata": dict(operators.metadata),
            "boundaries": boundaries,
            "replaced": {name: names.renumbered(name, operators.plan) for name in operators.replaced},
        },
    }


def describe_recovered(
    repair: Mapping[str, Any],
    *,
    base: Mapping[str, Any],
    base_model_type: str,
    tensors: Mapping[str, Mapping[str, str | None]],
    versions: Mapping[str, str],
    request: Mapping[str, Any],
    files: Mapping[str, str],
    rounds: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the content of ``ghoststream.json``.

    ``repair`` is what :func:`describe_repair` returns, ``request`` what decides every bit of the folder;
    ``files`` has the digests of the files beside the weights; for ``rounds`` see :func:`earlier_rounds`.
    """
    return {
        "artifact": _KIND,
        "version": _VERSION,
        "versions": dict(versions),
        "request": dict(request),
        "files": dict(files),
        **repair,
        "base": dict(base),
        "base_model_type": base_model_type,
        "tensors": {name: dict(entry) for name, entry in tensors.items()},
        **({"rounds": [dict(one) for one in rounds]} if rounds else {}),
    }


def earlier_rounds(root: Path) -> list[dict[str, Any]]:
    """Return what a recovered checkpoint was made of, the first removal first; nothing for any other one.

    Each entry has ``plan``, ``base``, ``base_model_type``, ``operators`` and ``versions`` as
    ``ghoststream.json`` has them.

    Raises:
        ArtifactError: If ``ghoststream.json`` is damaged or of a newer version.
    """
    found = load_recovered(root)
    return [] if found is None else [*map(dict, found.rounds), found.to_round()]


def _place(
    operator: BoundaryOperator, plan: PruningPlan, names: LayerNames, absorption: Absorption | None
) -> dict[str, Any]:
    """Say which tensors an operator is in, and for an absorbed one also which of the base they come from."""
    standing = standing_operator(operator)
    leaves = {} if standing is None else leaf_names(standing)
    own = {leaf: names.tensor(operator.span, plan, leaf) for leaf in leaves}
    if absorption is None:
        return {"tensors": own}
    sources = {
        "weight": absorption.weight,
        **({} if absorption.changed_bias is None else {"bias": absorption.changed_bias}),
    }
    changed = {leaf: names.renumbered(source, plan) for leaf, source in sources.items()}
    return {"tensors": {**own, **changed}, "absorbed": absorption.to_json()}


def is_finished(
    folder: Path,
    request: Mapping[str, Any],
    weights: Callable[[Path], Collection[str]] = lambda folder: CheckpointIndex.open(folder).shards,
) -> bool:
    """Say whether a folder is the finished recovered checkpoint of just this request.

    Headers and sizes are looked at, and every file is read and compared with its checksum.

    Args:
        folder: The folder; need not exist.
        request: What decides every bit of it, as :func:`describe_recovered` noted it.
        weights: Returns the names of the files of weights in a finished folder.

    Returns:
        Whether it is; False also where no recovered checkpoint is there.

    Raises:
        OutputExistsError: If it is the recovered checkpoint of another request.
        ArtifactError: If it is a recovered checkpoint that is damaged.
    """
    if not has_provenance(folder):
        return False
    advice = "move it away, or delete it, and run the same command again"
    try:
        found = require_sound_sidecars(folder)
        noted = found.get("request")
        parts = {**noted, **request} if isinstance(noted, Mapping) else request
        changed = [
            key for key in parts if not isinstance(noted, Mapping) or noted.get(key) != request.get(key)
        ]
        files = () if changed else weights(folder)
    except (ArtifactError, CheckpointError) as error:
        msg = f"the recovered checkpoint in {folder} is damaged ({error.args[0]}); {advice}"
        raise ArtifactError(msg) from error
    if changed:
        msg = (
            f"{folder} holds the recovered checkpoint of another request (not the same "
            f"{', '.join(sorted(changed))}); choose another place, or move it away"
        )
        raise OutputExistsError(msg)
    if problems := verify_sums(folder, required=(*files, *found["files"], PROVENANCE_NAME)):
        msg = f"the recovered checkpoint in {folder} is damaged ({'; '.join(problems[:3])}); {advice}"
        raise ArtifactError(msg)
    return True


def load_recovered(folder: Path) -> RecoveredInfo | None:
    """Read a recovered folder's provenance; ``None`` if it is not a recovered folder.

    Raises:
        ArtifactError: If ``ghoststream.json`` is damaged or of another version, or a file beside the weights
            has changed.
    """
    if not has_provenance(folder):
        return None
    path = folder / PROVENANCE_NAME
    data = require_sound_sidecars(folder)
    if data.get("artifact") != _KIND or data.get("version") != _VERSION:
        msg = (
            f"{path} is not the provenance of a recovered checkpoint in format {_VERSION}; "
            "export the checkpoint again, or use the ghoststream that wrote it"
        )
        raise ArtifactError(msg)
    try:
        recorded = data["operators"]
        return RecoveredInfo(
            folder,
            PruningPlan.from_json(data["plan"]),
            data["base"],
            data["base_model_type"],
            str(recorded["kind"]),
            data["tensors"],
            recorded,
            tuple(data.get("rounds", ())),
            data["versions"],
        )
    except (KeyError, TypeError, PlanError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}); export the checkpoint again")


def _read_replaced(info: RecoveredInfo) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return the weights in the places of the base's, by their names in the base."""
    with TensorReader(CheckpointIndex.open(info.folder)) as reader:
        reader.digests.expect(info.digests, "it was exported", what="the recovered checkpoint")
        return {
            name: reader.read(new_name, torch.float32).numpy()
            for name, new_name in info.recorded["replaced"].items()
        }


def _read_boundary(info: RecoveredInfo, entry: Mapping[str, Any]) -> BoundaryOperator:
    with TensorReader(CheckpointIndex.open(info.folder)) as reader:
        reader.digests.expect(info.digests, "it was exported", what="the recovered checkpoint")
        # The identity has no arrays; leaving them out gives BoundaryOperator's own defaults.
        arrays: dict[str, Any] = {
            leaf.removeprefix("linear."): reader.read(name, torch.float32).numpy()
            for leaf, name in entry["tensors"].items()
        }
    return BoundaryOperator(
        span=Span(*entry["span"]),
        form=entry["form"],
        features=entry["features"],
        diagnostics=dict(entry["diagnostics"]),
        norm_epsilon=entry.get("norm_epsilon"),
        **arrays,
    )


def _absorbed_operator(info: RecoveredInfo, base: Path, entry: Mapping[str, Any]) -> BoundaryOperator:
    """Return what was absorbed as a map of the features ``mlp``.

    It is ``s`` times what was added to the base's weight and bias. It is what the checkpoint computes,
    roundings included, also where it was fitted on ``mlp_output``.

    Args:
        info: The recovered checkpoint.
        base: Its base.
        entry: What ``ghoststream.json`` says of the boundary.

    Memory: ``4 I C`` bytes for the operator, and twice as much while it is read.
    """
    place, tensors, folder = entry["absorbed"], entry["tensors"], info.folder
    with TensorReader(CheckpointIndex.open(folder)) as new, TensorReader(CheckpointIndex.open(base)) as old:
        new.digests.expect(info.digests, "it was exported", what="the recovered checkpoint")
        old.digests.expect(info.base.get("tensors") or {}, f"{folder} was recovered from it")

        def difference(leaf: str) -> np.ndarray[Any, np.dtype[np.float32]]:
            change = new.read(tensors[leaf], torch.float32) - old.read(place[leaf], torch.float32)
            added: np.ndarray[Any, np.dtype[np.float32]] = (change * place["scale"]).numpy()
            return added

        weight = difference("weight")
        return BoundaryOperator(
            Span(*entry["span"]),
            "linear",
            MLP.name,
            weight if place["transposed"] else np.ascontiguousarray(weight.T),
            difference("bias") if "bias" in tensors else None,
            dict(entry["diagnostics"]),
        )
