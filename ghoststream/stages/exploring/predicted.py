"""Memory and speed of a model without some layers, predicted from the sizes of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ghoststream.checkpoint.sizes import ModelSizes
from ghoststream.costs import FitShape
from ghoststream.operators import make_operator
from ghoststream.options import Method
from ghoststream.recovery.features import ABSORBED
from ghoststream.spans import PruningPlan
from ghoststream.statistics import get_feature
from ghoststream.statistics.features import HIDDEN_AND_MLP


@dataclass(frozen=True, slots=True)
class Predicted:
    """What is predicted of a repaired model; fields are those of a point of the report."""

    weight_bytes: int
    decode_speedup: float
    prefill_speedup: float
    cache_share: float


def predict(sizes: ModelSizes, plan: PruningPlan, methods: Sequence[Method], itemsize: int) -> Predicted:
    """Predict memory and speed of the model without the layers of a plan, with its operators.

    One token after the other waits for all weights that it is multiplied with: the layers that are left, of a
    mixture the experts that act, the operators that stand, and the head. The tokens of a prompt go through
    these together, so that arithmetic counts, and the head is needed for the last one only. Products of
    attention between tokens fall with the layers too, and are left out, as is all that is no product.

    Args:
        sizes: The model.
        plan: What is removed.
        methods: How each boundary is repaired.
        itemsize: Bytes of an element of an operator in the recovered checkpoint.
    """
    standing = sum(standing_elements(method, sizes.hidden) for method in methods)
    gone = sum(sizes.layers[layer].stored_bytes for layer in plan.removed)
    dense = sum(layer.acting for layer in sizes.layers)
    left = dense - sum(sizes.layers[layer].acting for layer in plan.removed) + standing
    head = sizes.vocabulary * sizes.hidden
    return Predicted(
        sizes.checkpoint_bytes - gone + standing * itemsize,
        (dense + head) / (left + head),
        dense / left,
        len(plan.kept) / plan.n_layers,
    )


def standing_elements(method: Method, hidden: int) -> int:
    """Return the weights of the operator of a boundary that stand in the model, and are not absorbed."""
    kind = make_operator(method)
    if kind.features == HIDDEN_AND_MLP.name:
        width = hidden
    elif kind.features in ABSORBED:
        return 0
    else:
        width = get_feature(kind.features).width(hidden)
    return kind.cost(FitShape(hidden, width, 0)).write_bytes // 4 + hidden * method.intercept
