"""Whatever is trained of a plan: its operators as maps, and the weights of norms, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear

from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.operators.joint import is_joint, mlp_part, standing_part
from ghoststream.recovery import build_ghost
from ghoststream.recovery.absorbing import is_absorbed
from ghoststream.recovery.modeling_ghosted import GhostOperator
from ghoststream.statistics.features import STATE_TAP
from ghoststream.streaming import BoundaryMap, ReplacedWeights, Skeleton

Array = npt.NDArray[np.float32]


class TrainedOperator(BoundaryMap):
    """An operator whose parameters are float32 and require gradients; it computes in the dtype of the states.

    It computes what the lane of the operator does, its parameters rounded to the dtype of the states. Of an
    operator that is absorbed the map of the tap itself is trained, not the change of the weight that takes it
    up: in exact arithmetic both are the same models, and this one is linear in its parameters.

    Args:
        operator: The operator; no identity.
        device: Where it is trained.

    Memory: ``4 p C`` bytes, and as much for the gradients.
    """

    def __init__(self, operator: BoundaryOperator, device: torch.device) -> None:
        standing = standing_part(operator) if is_joint(operator) else operator
        absorbed = mlp_part(operator) if is_joint(operator) else operator
        self._ghost: GhostOperator | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        if not is_absorbed(standing):
            self._ghost = build_ghost(standing, dtype=torch.float32, device=device)
            self._parameters |= {f"standing.{name}": one for name, one in self._ghost.named_parameters()}
        if is_absorbed(operator):
            (self._tap,) = self.taps = tuple(tap for tap in operator.taps if tap != STATE_TAP)
            for leaf, array in (("weight", absorbed.weight), ("bias", absorbed.bias)):
                if array is not None:
                    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
                    self._parameters[f"absorbed.{leaf}"] = nn.Parameter(tensor)
        for parameter in self._parameters.values():
            parameter.data = parameter.data.clone()  # on the CPU it shares the memory of the operator's array
            parameter.requires_grad_()

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the estimate of ``h[stop]``, where the operator reads the layer before."""
        rounded = {name: one.to(states.dtype) for name, one in self._parameters.items()}
        change = linear(taps[self._tap], rounded["absorbed.weight"], rounded.get("absorbed.bias"))
        return self._stand(states) + change

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Map ``(n, T, C)`` to the same shape; what was entered is mapped already."""
        return states if self.taps else self._stand(states)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters."""
        return self._parameters.values()

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters by name."""
        return self._parameters

    @property
    def n_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(parameter.nbytes for parameter in self._parameters.values())

    def arrays(self) -> dict[str, Array]:
        """Return ``weight`` and, if there is one, ``bias``, as the operator has them."""
        return _joined({name: parameter.detach() for name, parameter in self._parameters.items()})

    def gradients(self) -> dict[str, Array]:
        """Return the gradients of :meth:`arrays`."""
        found = {name: parameter.grad for name, parameter in self._parameters.items()}
        return _joined({name: gradient for name, gradient in found.items() if gradient is not None})

    def take(self, operator: BoundaryOperator) -> None:
        """Put the parameters of another operator of the same shapes in place."""
        given = TrainedOperator(operator, torch.device("cpu")).named_parameters()
        for name, parameter in self._parameters.items():
            parameter.data.copy_(given[name].data)

    def _stand(self, states: torch.Tensor) -> torch.Tensor:
        if self._ghost is None:
            return states
        prefix = "standing."
        rounded = {
            name.removeprefix(prefix): one.to(states.dtype)
            for name, one in self._parameters.items()
            if name.startswith(prefix)
        }
        mapped: torch.Tensor = functional_call(self._ghost, rounded, (states,))
        return mapped


def _joined(values: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, value in values.items():
        leaf, array = name.rpartition(".")[2], value.cpu().numpy()
        # Of two weights the standing one comes first; there is one bias at most.
        found[leaf] = np.concatenate([found[leaf], array], axis=1) if leaf in found else array
    return found


class TrainedNorms:
    """Weights of the norms behind the first span, and of the final norm; asks a backward pass for gradients.

    Args:
        skeleton: The model.
        operators: The plan. Weights that its operators replace already begin as these.

    Memory: four bytes for each weight of a norm, and as much for the gradients.
    """

    def __init__(self, skeleton: Skeleton, operators: OperatorSet) -> None:
        self._names: dict[tuple[int, str], str] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for position, leaf, name in _norm_weights(skeleton, operators):
            given = operators.replaced.get(name)
            own = skeleton.reader.read(name, torch.float32) if given is None else torch.from_numpy(given)
            self._names[position, leaf] = name
            self.parameters[name] = nn.Parameter(own.to(skeleton.device).clone())

    def wants(self, layer: int, name: str, weight: torch.Tensor) -> bool:
        """Whether a parameter of a layer, or of the final norm (layer ``L``), is trained."""
        del weight
        return (layer, name) in self._names

    def observe(self, layer: int, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Keep the gradient of one weight."""
        del weight
        self.parameters[self._names[layer, name]].grad = gradient

    def arrays(self) -> dict[str, Array]:
        """Return the weights by the names of their tensors in the base."""
        return {name: one.detach().cpu().numpy().copy() for name, one in self.parameters.items()}


def lane_weights(
    skeleton: Skeleton, operators: OperatorSet, norms: TrainedNorms | None
) -> ReplacedWeights | None:
    """Return what a lane has in the places of the model's weights: what is trained, and what was given."""
    given = {name: torch.from_numpy(np.ascontiguousarray(one)) for name, one in operators.replaced.items()}
    found: dict[str, torch.Tensor] = {**given, **({} if norms is None else norms.parameters)}
    return ReplacedWeights(skeleton, found) if found else None


def _norm_weights(skeleton: Skeleton, operators: OperatorSet) -> Iterator[tuple[int, str, str]]:
    """Yield position, name in the layer and name in the checkpoint of the weights of all norms."""
    layers, norm = skeleton.architecture.layers_path, skeleton.architecture.final_norm_path
    kept = [layer for layer in operators.plan.kept if layer >= operators.plan.spans[0].stop]
    places = [(layer, f"{layers}.{layer}") for layer in kept]
    for position, path in [*places, (skeleton.n_layers, norm)]:
        whole = skeleton.model.get_submodule(path)
        for inner, module in whole.named_modules():
            if "norm" not in type(module).__name__.lower():
                continue
            for leaf, _ in module.named_parameters(recurse=False):
                name = f"{inner}.{leaf}".removeprefix(".")
                source = skeleton.keys.names.get(f"{path}.{name}")
                if source is not None:
                    yield position, name, source
