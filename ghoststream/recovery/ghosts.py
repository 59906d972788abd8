"""Operators as modules: the very class that recovered checkpoints compute with."""

from __future__ import annotations

import torch

from ghoststream.errors import RequestError
from ghoststream.operators import BoundaryOperator
from ghoststream.recovery.absorbing import is_absorbed
from ghoststream.recovery.layout import leaf_names
from ghoststream.recovery.modeling_ghosted import GhostOperator


def build_ghost(
    operator: BoundaryOperator, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> GhostOperator:
    """Make the module of an operator, so that a lane of a pass computes what the exported checkpoint does.

    Args:
        operator: The operator, its arrays in float32.
        dtype: Dtype of the hidden states that it will see; the arrays are rounded to it.
        device: Where the module lives.

    Returns:
        A module in evaluation mode that maps ``(..., C)`` to ``(..., C)``.

    Raises:
        RequestError: If the operator is the identity, or one that is absorbed into a weight, be it in part.

    Memory: ``C * p`` elements of ``dtype`` for a linear operator.
    """
    arrays = {name: torch.from_numpy(array).to(device, dtype) for name, array in leaf_names(operator).items()}
    if not arrays:
        msg = f"the operator of span {operator.span} is the identity: a lane needs no map there"
        raise RequestError(msg)
    if is_absorbed(operator):
        msg = (
            f"the operator of span {operator.span} on {operator.features} is absorbed into a weight: it has "
            "no module"
        )
        raise RequestError(msg)
    width = next(iter(arrays.values())).shape[0]
    with torch.device("meta"):
        module = GhostOperator(
            width,
            operator.form,
            operator.features,
            bias=operator.bias is not None,
            norm_epsilon=operator.norm_epsilon,
        )
    module.load_state_dict(arrays, assign=True)
    return module.requires_grad_(requires_grad=False).eval()
