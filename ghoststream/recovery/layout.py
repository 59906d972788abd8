"""Which tensors a recovered checkpoint holds, under which names, and where they come from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from ghoststream.checkpoint.fingerprint import require_undamaged
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.reader import TensorReader
from ghoststream.checkpoint.writer import Shard, TensorSource, copied_tensor, stored_tensor
from ghoststream.errors import MismatchError, UnsupportedModelError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery.absorbing import Absorption, standing_operator
from ghoststream.recovery.features import FEATURES
from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming import Skeleton


@dataclass(frozen=True, slots=True)
class LayerNames:
    """How a checkpoint names its layers, which may or may not carry the prefix of the base model.

    Attributes:
        layers_path: Dotted path of the decoder layers in the ``...ForCausalLM`` class, ``transformer.h``.
        final_norm_path: Dotted path of the norm after the last layer.
        base_prefix: Attribute that holds the base model, ``transformer``.
        stored_prefix: What the checkpoint's names have in the place of the path of the module that owns the
            layers: the same, less (``""`` for ``"transformer."``) or another (``"backbone."``).
        ghosts: How many operators stand already in front of a layer of the pruned model.
    """

    layers_path: str
    final_norm_path: str
    base_prefix: str
    stored_prefix: str
    ghosts: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def find(
        cls, names: Mapping[str, str], *, layers_path: str, final_norm_path: str, base_prefix: str
    ) -> LayerNames:
        """Read the naming off the pairs of module tensor name and checkpoint tensor name."""
        owner = layers_path.rpartition(".")[0] + "."
        for name, source in names.items():
            rest = name.removeprefix(owner)
            if name.startswith(f"{layers_path}.") and source.endswith(rest):
                return cls(layers_path, final_norm_path, base_prefix, source.removesuffix(rest))
        return cls(layers_path, final_norm_path, base_prefix, owner)

    def renumbered(self, source: str, plan: PruningPlan) -> str | None:
        """Return the tensor's name after pruning; ``None`` if its layer is removed."""
        path = re.escape(self._stored(self.layers_path))
        match = re.fullmatch(rf"({path}\.)(\d+)(\..+)", source)
        if match is None:
            return source
        layer = int(match[2])
        return f"{match[1]}{plan.kept.index(layer)}{match[3]}" if layer in plan.kept else None

    def module(self, span: Span, plan: PruningPlan) -> str:
        """Return the path, inside the base model, of the layer or norm in front of which ``span`` was."""
        path = self.final_norm_path if span.stop == plan.n_layers else self._layer_path(span, plan)
        return path.removeprefix(f"{self.base_prefix}.")

    def tensor(self, span: Span, plan: PruningPlan, leaf: str) -> str:
        """Return the checkpoint name of an operator's tensor, in the checkpoint's own way of naming."""
        path = self.final_norm_path if span.stop == plan.n_layers else self._layer_path(span, plan)
        place = ".".join(["ghost", *["before"] * self.ghosts.get(plan.boundary_index(span), 0)])
        return f"{self._stored(path)}.{place}.{leaf}"

    def in_model(self, stored: str) -> str:
        """Return the path in the model of a name in the checkpoint, of a layer or of an operator."""
        return f"{self._owner}{stored.removeprefix(self.stored_prefix)}"

    @property
    def _owner(self) -> str:
        return self.layers_path.rpartition(".")[0] + "."

    def _stored(self, path: str) -> str:
        return f"{self.stored_prefix}{path.removeprefix(self._owner)}"

    def _layer_path(self, span: Span, plan: PruningPlan) -> str:
        return f"{self.layers_path}.{plan.boundary_index(span)}"


def leaf_names(operator: BoundaryOperator) -> dict[str, Any]:
    """Return ``{parameter name inside GhostOperator: array}`` of an operator."""
    if operator.form == "identity":
        return {}
    prefix = "linear." if operator.form == "linear" else ""
    arrays = {f"{prefix}weight": operator.weight, f"{prefix}bias": operator.bias}
    return {name: array for name, array in arrays.items() if array is not None}


def operator_entries(operators: OperatorSet, names: LayerNames) -> list[dict[str, Any]]:
    """Describe the operators that stand in the model as ``config.ghost_operators`` does.

    Absorbed ones are left out.
    """
    return [operator_entry(operator, operators.plan, names) for operator in standing_operators(operators)]


def standing_operators(operators: OperatorSet) -> tuple[BoundaryOperator, ...]:
    """Return the operators that stand as modules: all but identities, without what is absorbed."""
    found = (standing_operator(operator) for operator in operators.operators)
    return tuple(operator for operator in found if operator is not None)


def operator_entry(operator: BoundaryOperator, plan: PruningPlan, names: LayerNames) -> dict[str, Any]:
    """Describe one operator: its span in the base, and where it sits in the pruned model."""
    entry = {
        "span": [operator.span.start, operator.span.stop],
        "layer": plan.boundary_index(operator.span),
        "module": names.module(operator.span, plan),
        "form": operator.form,
        "features": operator.features,
        "bias": operator.bias is not None,
    }
    return entry if operator.norm_epsilon is None else {**entry, "norm_epsilon": operator.norm_epsilon}


def require_operators_fit(operators: OperatorSet, skeleton: Skeleton, fingerprint: Mapping[str, Any]) -> None:
    """Check that operators were made for this model and can be exported.

    Raises:
        PlanError: If the plan is for another number of layers.
        MismatchError: If a width differs, or the operators name another checkpoint as their base.
        CheckpointError: If the base changed since they were made.
        UnsupportedModelError: If an operator reads features that a recovered checkpoint cannot compute.
    """
    operators.plan.require_fits(skeleton.n_layers)
    if operators.hidden != skeleton.hidden_size:
        msg = (
            f"the operators are for hidden size {operators.hidden}, the model has {skeleton.hidden_size}; "
            "fit operators for this model"
        )
        raise MismatchError(msg)
    for operator in operators.operators:
        if operator.features not in FEATURES:
            msg = (
                f"the operator of span {operator.span} reads the features {operator.features!r}; "
                f"a recovered checkpoint can hold operators on {', '.join(FEATURES)}"
            )
            raise UnsupportedModelError(msg)
    noted, digest = operators.metadata.get("base") or {}, fingerprint["digest"]
    base = noted.get("digest")
    if base is not None and base != digest:
        require_undamaged(noted, fingerprint, skeleton.index, "the operators were fitted")
        msg = (
            f"the operators were made for another checkpoint ({base[:19]}..., this one is {digest[:19]}...);"
            " give the one they were made for"
        )
        raise MismatchError(msg)


def prevailing_dtype(index: CheckpointIndex) -> torch.dtype:
    """Return the floating dtype that most bytes of the checkpoint have."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in index.weights.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.n_bytes
    return sizes.most_common(1)[0][0]


def plain_modules(
    index: CheckpointIndex, operators: OperatorSet, names: LayerNames, absorptions: Iterable[Absorption]
) -> tuple[str, ...]:
    """Return paths of the modules whose weights are written plain beside quantised ones.

    These are the linear maps of operators that stand, and those whose weight is changed.
    """
    plan = operators.plan
    changed = {*operators.replaced, *(absorption.weight for absorption in absorptions)}
    made = [names.renumbered(name, plan) for name in changed if name in index.packed]
    made += [
        names.tensor(operator.span, plan, leaf)
        for operator in standing_operators(operators)
        for leaf in leaf_names(operator)
        if leaf == "linear.weight"
    ]
    return tuple(names.in_model(name).removesuffix(".weight") for name in made if name is not None)


def count_parameters(index: CheckpointIndex, shards: Iterable[Shard], origins: Mapping[str, str]) -> int:
    """Return the parameters that written tensors hold.

    Args:
        index: The base.
        shards: What is written.
        origins: Name in the base by new name, for tensors that are copied.
    """
    first = {packed_in[0]: name for name in index.packed for packed_in in [index.parts(name)]}
    others = {part for name in index.packed for part in index.parts(name)[1:]}
    count = 0
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        origin = origins.get(tensor.name)
        if origin not in others:
            count += prod(tensor.shape if origin not in first else index.weights[first[origin]].shape)
    return count


def recovered_tensors(
    reader: TensorReader,
    used: Collection[str],
    operators: OperatorSet,
    names: LayerNames,
    dtype: torch.dtype,
    absorptions: Iterable[Absorption] = (),
) -> tuple[list[TensorSource], dict[str, str]]:
    """List what to write: the surviving tensors in the order in which they lie on disk, then the operators.

    Tensors that an operator is absorbed into are in the place of the base's. So are replaced weights, each in
    the dtype of the base's tensor. A weight that is packed in several tensors stays so unless it is changed.

    Args:
        reader: Reads the base checkpoint.
        used: The checkpoint's weights that the model uses; others are left out.
        operators: The plan and its operators.
        names: How the checkpoint names its layers.
        dtype: Dtype in which operators are written.
        absorptions: Where operators are absorbed.

    Returns:
        The tensors, and for each copied one the name it has in the base.
    """
    wanted, index = set(used), reader.index
    tensors: list[TensorSource] = []
    origins: dict[str, str] = {}
    renamed = {name: names.renumbered(name, operators.plan) for name in wanted}
    kept = {name: new for name, new in renamed.items() if new is not None}
    changed = {
        name: source
        for absorption in absorptions
        for name, source in absorption.tensors(reader, kept).items()
    }
    changed |= {
        name: stored_tensor(kept[name], torch.from_numpy(array), index.weights[name].dtype)
        for name, array in operators.replaced.items()
    }
    weights = {part: name for name in kept for part in index.parts(name)}
    for entry in sorted(index.tensors.values(), key=_place):
        weight, new = weights.get(entry.name), names.renumbered(entry.name, operators.plan)
        if weight in changed:
            # What a changed weight was packed in goes with it.
            if entry.name == index.parts(weight)[0]:
                tensors.append(changed[weight])
        elif weight is not None and new is not None:
            tensors.append(copied_tensor(reader, entry.name, new))
            origins[new] = entry.name
    for operator in standing_operators(operators):
        for leaf, array in leaf_names(operator).items():
            name = names.tensor(operator.span, operators.plan, leaf)
            tensors.append(stored_tensor(name, torch.from_numpy(array), dtype))
    return tensors, origins


def _place(entry: TensorEntry) -> tuple[str, int]:
    return entry.shard, entry.offset
