"""The last linear maps of attention and MLP, whose weights can take up a map of what enters them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ghoststream.errors import UnsupportedModelError
from ghoststream.streaming import Skeleton, attention_projection, mlp_projection

ATTENTION, MLP = "attention_heads", "mlp_intermediate"
"""Taps of what enters them."""


@dataclass(frozen=True)
class Projection:
    """A last linear map of a sublayer: it adds ``s (a W + b)`` to the residual stream.

    Attributes:
        layer: Number of the decoder layer.
        tap: Name of the tap that enters it, :data:`ATTENTION` or :data:`MLP`.
        weight: Name of ``W`` in the checkpoint.
        transposed: Whether it lies as ``(C, p)`` and not as ``(p, C)``.
        scale: The multiplier ``s`` between it and the residual stream.
    """

    layer: int
    tap: str
    weight: str
    transposed: bool
    scale: float

    def change(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return what to add to the weight so that the layer adds ``a A`` to the stream.

        Args:
            matrix: ``A^T``, shape ``(C, p)``.
        """
        return (matrix if self.transposed else matrix.T) / self.scale


def require_projections(skeleton: Skeleton, layer: int) -> tuple[Projection, Projection]:
    """Return the last linear maps of attention and MLP of a layer.

    Raises:
        UnsupportedModelError: If one of them cannot take up a map: a norm or a mixture is there, or the
            checkpoint does not hold its weight as one tensor.
    """
    architecture, module = skeleton.architecture, skeleton.layers[layer]
    found = []
    for tap, described in (
        (ATTENTION, attention_projection(architecture, module)),
        (MLP, mlp_projection(architecture, module)),
    ):
        place = f"layer {layer} cannot be refitted"
        if not described.absorbs:
            msg = f"{place}: {described.reason}; leave --refit out"
            raise UnsupportedModelError(msg)
        path = f"{architecture.layers_path}.{layer}.{described.path}.weight"
        if path not in skeleton.keys.names:
            msg = f"{place}: the checkpoint does not hold {path} as one tensor; leave --refit out"
            raise UnsupportedModelError(msg)
        found.append(Projection(layer, tap, skeleton.keys.names[path], described.transposed, described.scale))
    return found[0], found[1]
