"""Operators that disappear in the last linear map of the MLP of the layer before their boundary.

With ``a`` for what enters that map, ``W`` ``(I, C)`` for its weight, ``b`` for its bias and ``s`` for the
multiplier in front of the residual stream, the layer adds ``m = s (a W + b)``. An operator
``y = x + a A + c`` on the features ``mlp`` is in the model if ``W + A / s`` and ``b + c / s`` take their
places; ``y = x + m A + c`` on ``mlp_output`` if ``W (I + A)`` and ``b (I + A) + c / s`` do. Of
``y = x + x A + a B + c`` on ``hidden+mlp`` a part disappears, ``W + B' / s`` with ``B' = B (I + A)^-1``, and
``x + x A + c`` stands at the boundary (:mod:`ghoststream.operators.joint`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.reader import TensorReader
from ghoststream.checkpoint.writer import TensorSource
from ghoststream.errors import MismatchError, NumericsError, UnsupportedModelError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.operators.joint import absorbed_part, is_joint, lost_in_rounding, standing_part
from ghoststream.recovery.features import ABSORBED
from ghoststream.spans import Span
from ghoststream.statistics.features import HIDDEN_AND_MLP, MLP, MLP_OUTPUT
from ghoststream.streaming import mlp_projection
from ghoststream.streaming.skeleton import Skeleton

_PANEL = 1024
_BLOCK_ELEMENTS = 2**22
"""Of the new weight, that are made at a time: 32 MiB in float64."""


@dataclass(frozen=True)
class Absorption:
    """Where an operator disappears, or the part of it that does.

    Attributes:
        operator: The operator, whole.
        weight: Name of the weight in the base checkpoint.
        bias: Name of the bias there; None if the map has none.
        transposed: Whether the weight lies as ``(C, I)`` and not as ``(I, C)``.
        scale: The multiplier between the map and the residual stream.
        dtype: Dtype in which the part that stands is written; None where it stays in float32.
    """

    operator: BoundaryOperator
    weight: str
    bias: str | None
    transposed: bool
    scale: float
    dtype: torch.dtype | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the place as JSON data."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "transposed": self.transposed,
            "scale": self.scale,
        }

    def tensors(self, reader: TensorReader, names: Mapping[str, str]) -> dict[str, TensorSource]:
        """Return what to write in the place of the base's tensors, by their names in the base.

        Sums and products are taken in float64 and rounded once, to the tensor's own dtype; ``B'`` is in
        float32.

        Args:
            reader: Reads the base checkpoint.
            names: Name in the new checkpoint by name in the base.

        Memory: while the weight is written, blocks of it; of ``mlp_output``, and where it is packed, also the
        weight;
        of ``hidden+mlp`` what :func:`~ghoststream.operators.joint.absorbed_part` states, and from then on its
        result.
        """
        found = {self.weight: self._source(reader, self.weight, names[self.weight], self._weight_blocks)}
        bias = self.changed_bias
        if bias is not None:
            found[bias] = self._source(reader, bias, names[bias], self._bias_blocks)
        return found

    @property
    def changed_bias(self) -> str | None:
        """Name of the bias in the base checkpoint, if there is one and the operator changes it."""
        return self.bias if self.operator.features == MLP_OUTPUT.name or self._has_constant else None

    @property
    def _has_constant(self) -> bool:
        return self.operator.bias is not None and not is_joint(self.operator)

    @cached_property
    def part(self) -> BoundaryOperator:
        """What is absorbed: the operator, or a part of it.

        Raises:
            NumericsError: If an operator on ``hidden+mlp`` cannot be taken apart.
        """
        whole = self.operator
        return absorbed_part(whole, rounded(standing_part(whole), self.dtype)) if is_joint(whole) else whole

    def require_precise(self, index: CheckpointIndex) -> None:
        """Check that the absorbed part of an operator is larger than its rounding to the weight's dtype.

        Raises:
            NumericsError: If it is not, or cannot be made.
        """
        dtype = index.weights[self.weight].dtype
        growth, largest = self.part.diagnostics["growth"], 2.0 / torch.finfo(dtype).eps
        if growth > largest:
            raise NumericsError(lost_in_rounding(self.operator, growth, f"{self.weight} in {dtype}", largest))

    def _source(self, reader: TensorReader, name: str, new_name: str, blocks: Any) -> TensorSource:
        entry = reader.weight(name)

        def chunks(room: memoryview) -> Iterator[memoryview]:
            del room
            for block in blocks(reader, entry.shape):
                stored = block.to(entry.dtype).contiguous().reshape(-1)
                yield memoryview(stored.view(torch.uint8).numpy())

        return TensorSource(new_name, entry.dtype_name, entry.shape, chunks)

    def _weight_blocks(self, reader: TensorReader, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """Yield rows of the new weight in float64."""
        change = torch.from_numpy(_array(self.part.weight))
        mixes = self.operator.features == MLP_OUTPUT.name
        is_packed = self.weight in reader.index.packed
        # A product of a number and its scale has more bits than the dtype that is written.
        whole = reader.read(self.weight, torch.float32 if is_packed else None) if mixes or is_packed else None
        step = max(1, _BLOCK_ELEMENTS // shape[1])
        for first in range(0, shape[0], step):
            rows = slice(first, min(first + step, shape[0]))
            if whole is None or not mixes:
                part = change[rows] if self.transposed else change[:, rows].T
                numbers = torch.arange(rows.start, rows.stop)
                own = reader.rows(self.weight, numbers, torch.float64) if whole is None else whole[rows]
                yield own.double() + part.double() / self.scale
            elif self.transposed:
                yield whole[rows].double() + _product(change[rows].double(), whole)
            else:
                yield whole[rows].double() + whole[rows].double() @ change.double().T

    def _bias_blocks(self, reader: TensorReader, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        del shape
        bias = reader.read(str(self.bias), torch.float64)
        if self.operator.features == MLP_OUTPUT.name:
            bias = bias + torch.from_numpy(_array(self.operator.weight)).double() @ bias
        if self._has_constant:
            bias = bias + torch.from_numpy(_array(self.operator.bias)).double() / self.scale
        yield bias


def rounded(operator: BoundaryOperator, dtype: torch.dtype | None) -> BoundaryOperator:
    """Return an operator on the hidden state as it is once it was written in a dtype."""
    weight = torch.from_numpy(_array(operator.weight)).to(dtype or torch.float32)
    return replace(operator, weight=weight.float().numpy())


def find_absorption(
    skeleton: Skeleton, operator: BoundaryOperator, dtype: torch.dtype | None = None
) -> Absorption:
    """Find where an operator on :data:`ABSORBED` features goes.

    Args:
        skeleton: The base.
        operator: The operator.
        dtype: Dtype in which the part of it that stands, if there is one, is written; None for float32.

    Raises:
        UnsupportedModelError: If the architecture has a norm or a mixture there, or no bias for the
            operator's constant.
        MismatchError: If the operator is of another width.
    """
    absorption = require_absorbable(
        skeleton, operator.span, operator.features, constant=operator.bias is not None, operator=operator
    )
    shape = skeleton.index.weights[absorption.weight].shape
    wide, hidden = shape[::-1] if absorption.transposed else shape
    widths = {MLP.name: wide, MLP_OUTPUT.name: hidden, HIDDEN_AND_MLP.name: hidden + wide}
    asked, found = widths[operator.features], _array(operator.weight).shape[1]
    if found != asked:
        msg = (
            f"the operator on {operator.features} at {operator.span} has {found} features, and {asked} "
            f"enter or leave {absorption.weight}; fit operators for this model"
        )
        raise MismatchError(msg)
    return replace(absorption, dtype=dtype)


def require_absorbable(
    skeleton: Skeleton,
    span: Span,
    features: str,
    *,
    constant: bool = False,
    operator: BoundaryOperator | None = None,
) -> Absorption:
    """Check that an operator on :data:`ABSORBED` features can be absorbed at a boundary, before it is fitted.

    Args:
        skeleton: The base.
        span: The removed span.
        features: Name of the features.
        constant: Whether the operator has a constant.
        operator: The operator, once there is one; the identity until then.

    Raises:
        UnsupportedModelError: If there is no layer before, or the architecture has a norm or a mixture there,
            or no bias for the constant.
    """
    place = f"operators on the features {features} cannot be absorbed at {span}"
    if span.start == 0:
        msg = f"{place}: there is no layer before it; use features of the hidden state, or another span"
        raise UnsupportedModelError(msg)
    found = mlp_projection(skeleton.architecture, skeleton.layers[span.start - 1])
    if not found.absorbs:
        msg = f"{place}: {found.reason}; use features of the hidden state"
        raise UnsupportedModelError(msg)
    path = f"{skeleton.architecture.layers_path}.{span.start - 1}.{found.path}"
    names = skeleton.keys.names
    if f"{path}.weight" not in names:
        msg = (
            f"{place}: the checkpoint does not hold {path}.weight as one tensor; use features of the hidden "
            "state"
        )
        raise UnsupportedModelError(msg)
    bias = names.get(f"{path}.bias")
    if constant and bias is None and features != HIDDEN_AND_MLP.name:
        msg = f"{place}: {path} has no bias that could take up the constant; fit without an intercept"
        raise UnsupportedModelError(msg)
    fitted = operator or BoundaryOperator(span, "identity")
    return Absorption(fitted, names[f"{path}.weight"], bias, found.transposed, found.scale)


def find_absorptions(
    skeleton: Skeleton, operators: OperatorSet, dtype: torch.dtype | None = None
) -> dict[Span, Absorption]:
    """Return the absorptions of a plan's operators, by span, as :func:`find_absorption` does.

    Those on other features are left out.

    Raises:
        NumericsError: If an operator on ``hidden+mlp`` cannot be taken apart, or what is absorbed is lost in
            rounding.
    """
    absorptions = {
        operator.span: find_absorption(skeleton, operator, dtype)
        for operator in operators.operators
        if operator.features in ABSORBED
    }
    for absorption in absorptions.values():
        if is_joint(absorption.operator):
            absorption.require_precise(skeleton.index)
    return absorptions


def require_precise_weight(skeleton: Skeleton, operator: BoundaryOperator) -> None:
    """Check that an operator on :data:`ABSORBED` features fits the precision of its weight.

    Raises:
        NumericsError: If it cannot.
        UnsupportedModelError, MismatchError: What :func:`find_absorption` raises.
    """
    if is_joint(operator):
        find_absorption(skeleton, operator).require_precise(skeleton.index)


def is_absorbed(operator: BoundaryOperator) -> bool:
    """Say whether an operator is one that is absorbed, whole or in part."""
    return operator.form != "identity" and operator.features in ABSORBED


def standing_operator(operator: BoundaryOperator) -> BoundaryOperator | None:
    """Return what of an operator stands at its boundary as a module; None if nothing does."""
    if is_joint(operator):
        return standing_part(operator)
    return None if operator.form == "identity" or is_absorbed(operator) else operator


def _product(rows: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return ``rows @ whole`` in float64, a panel of columns at a time."""
    result = torch.empty(len(rows), whole.shape[1], dtype=torch.float64)
    for first in range(0, whole.shape[1], _PANEL):
        columns = slice(first, first + _PANEL)
        result[:, columns] = rows @ whole[:, columns].double()
    return result


def _array(values: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(values, dtype=np.float32)
