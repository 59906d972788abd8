"""The form that is an ordinary checkpoint: every operator has disappeared in a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ghoststream.errors import RequestError
from ghoststream.options import Method
from ghoststream.recovery.forms.custom import Custom
from ghoststream.statistics.features import MLP, MLP_OUTPUT

if TYPE_CHECKING:
    from ghoststream.operators import OperatorSet
    from ghoststream.streaming import Skeleton

_FOLDING = (MLP.name, MLP_OUTPUT.name)
_ADVICE = (
    f"the operator none and least-squares on the features {MLP.name} or {MLP_OUTPUT.name} fold: recover "
    f"again with --operator auto, or with --operator least-squares --features {MLP.name}, or write the form "
    "custom"
)


class Folded(Custom):
    """Without a module of its own a model holds operators on ``mlp`` and ``mlp_output``, and none at all.

    An operator that reads the hidden state ``x`` has nowhere to go: a layer adds to ``x`` what it makes of
    ``norm(x)``, and no weight of it multiplies ``x`` itself.
    """

    name = "folded"
    meaning = "ordinary checkpoint of the base's architecture, without code"
    loads = "whatever loads the base: transformers, PEFT, quantisers, llama.cpp's converter, engines"
    cost = "nothing"

    def holds(self, features: str, model_type: str) -> bool:
        """Say whether operators on some features disappear in a weight."""
        del model_type
        return features in _FOLDING

    def check_methods(self, methods: Sequence[Method]) -> None:
        """Check that the methods fit nothing but what folds.

        Raises:
            RequestError: If one fits something else.
        """
        self._require_features(methods, _FOLDING, "cannot be folded into a weight", _ADVICE)

    def check(self, operators: OperatorSet, skeleton: Skeleton) -> None:
        """Check that nothing stands beside the layers.

        Raises:
            RequestError: If an operator does, or one of an earlier removal.
        """
        from ghoststream.recovery.absorbing import standing_operator

        for operator in operators.boundaries:
            if standing_operator(operator) is not None:
                msg = (
                    f"the operator of {operator.span} ({operator.form} on {operator.features}) cannot be "
                    f"folded into a weight; {_ADVICE}"
                )
                raise RequestError(msg)
        for entry in getattr(skeleton.config, "ghost_operators", None) or ():
            if entry["layer"] not in operators.plan.removed:
                msg = (
                    f"an operator of an earlier removal stands in {skeleton.root} in front of "
                    f"{entry['module']}, and cannot be folded into a weight; recover from the first base "
                    "again, or write the form custom"
                )
                raise RequestError(msg)
