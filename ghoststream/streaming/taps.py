"""Taps: the inner activations of one decoder layer, by name, taken while the model's own code runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ghoststream.checkpoint.layer_parts import Architecture, LayerParts
from ghoststream.errors import RequestError, UnsupportedModelError
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.skeleton import Skeleton

TAPS: Mapping[str, str] = MappingProxyType(
    {
        "attention_input": "what enters attention: the normed state, or the state without a norm before",
        "attention_heads": "what enters the last linear map of attention (o_proj): the heads in order",
        "attention_output": "what the last linear map of attention gives",
        "attention_contribution": "what attention adds to the stream: after a post-norm and a multiplier",
        "mlp_input": "what enters the MLP",
        "mlp_intermediate": "what enters the last linear map of the MLP (down_proj)",
        "mlp_output": "what the last linear map of the MLP gives, or the whole block of experts",
        "mlp_contribution": "what the MLP adds to the residual stream: after a post-norm and a multiplier",
        "output": "what the layer gives: h[l + 1]",
    }
)
"""Names of the taps, and what each one is; shapes are in ``docs/taps.md``."""


@dataclass(frozen=True, slots=True)
class TapPoint:
    """Where in a layer a tap is.

    Attributes:
        path: Module inside the layer; empty for the layer itself.
        side: Whether what enters the module is taken, or what it returns.
        scale: What the layer multiplies it with before it goes on.
    """

    path: str
    side: Literal["input", "output"]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class SublayerProjection:
    """The last linear map of a layer's attention or MLP, and whether a map of its input can be absorbed.

    Where it absorbs, the sublayer adds ``scale * (a W + bias)`` to the residual stream, ``a`` being the tap
    ``attention_heads`` or ``mlp_intermediate``: adding ``A / scale`` to ``W`` adds ``a A`` there.

    Attributes:
        path: Module inside the layer; empty where there is none.
        transposed: Whether its ``weight`` is ``W^T``, of shape ``(C, I)`` (``nn.Linear``), and not ``W``,
            ``(I, C)`` (transformers' ``Conv1D``).
        scale: The multiplier between it and the residual stream.
        absorbs: Whether maps can be absorbed into it.
        reason: Why not; empty where they can.
    """

    path: str
    transposed: bool
    scale: float
    absorbs: bool
    reason: str


def tap_point(architecture: Architecture, module: nn.Module, name: str) -> TapPoint:
    """Find a tap in a decoder layer.

    Args:
        architecture: The layer's architecture.
        module: The layer, with or without weights.
        name: One of :data:`TAPS`.

    Raises:
        RequestError: If there is no tap of this name.
        UnsupportedModelError: If layers of this kind do not have it.
    """
    if name not in TAPS:
        msg = f"there is no tap {name!r}; choose from {', '.join(TAPS)}"
        raise RequestError(msg)
    parts = layer_parts(architecture, module)
    reason = parts.no_attention if name.startswith("attention") else parts.no_mlp
    if name != "output" and reason:
        msg = f"a {type(module).__name__} has no tap {name!r}: {reason}; take 'output', or another layer"
        raise UnsupportedModelError(msg)
    mixture = _is_mixture(parts, module)
    if name == "mlp_intermediate" and mixture:
        msg = (
            f"a {type(module).__name__} with experts has no tap 'mlp_intermediate': each token has "
            "activations of its own few experts; take 'mlp_output', or a layer without experts"
        )
        raise UnsupportedModelError(msg)
    scale, mlp_scale = _multiplier(parts, module), _mlp_multiplier(parts, module)
    mlp_end = parts.mlp if mixture else parts.mlp_projection
    points = {
        "attention_input": TapPoint(parts.attention, "input"),
        "attention_heads": TapPoint(parts.attention_projection, "input"),
        "attention_output": TapPoint(parts.attention_projection, "output"),
        "attention_contribution": TapPoint(
            parts.attention_post_norm or parts.attention_projection, "output", scale
        ),
        "mlp_input": TapPoint(parts.mlp, "input"),
        "mlp_intermediate": TapPoint(parts.mlp_projection, "input"),
        "mlp_output": TapPoint(mlp_end, "output"),
        "mlp_contribution": TapPoint(parts.mlp_post_norm or mlp_end, "output", mlp_scale),
        "output": TapPoint("", "output"),
    }
    return points[name]


def layer_parts(architecture: Architecture, module: nn.Module) -> LayerParts:
    """Say what is where in a decoder layer; ``module`` may be without weights."""
    modules = {name for name, _ in module.named_modules()}
    return architecture.parts(modules.__contains__)


def mlp_projection(architecture: Architecture, module: nn.Module) -> SublayerProjection:
    """Describe the last linear map of a decoder layer's MLP; ``module`` may be without weights."""
    parts, kind = layer_parts(architecture, module), type(module).__name__
    scale = _mlp_multiplier(parts, module)
    if parts.no_mlp:
        return _absent(scale, f"a {kind} has no last linear map of an MLP: {parts.no_mlp}")
    if _is_mixture(parts, module):
        return _absent(scale, f"a {kind} with experts has no single last linear map of its MLP")
    return _projection(module, parts.mlp_projection, parts.mlp_post_norm, scale, parts.multiplier)


def attention_projection(architecture: Architecture, module: nn.Module) -> SublayerProjection:
    """Describe the last linear map of a decoder layer's attention; ``module`` may be without weights."""
    parts, kind = layer_parts(architecture, module), type(module).__name__
    scale = _multiplier(parts, module)
    if parts.no_attention:
        return _absent(scale, f"a {kind} has no last linear map of attention: {parts.no_attention}")
    return _projection(module, parts.attention_projection, parts.attention_post_norm, scale, parts.multiplier)


def _absent(scale: float, reason: str) -> SublayerProjection:
    return SublayerProjection("", transposed=True, scale=scale, absorbs=False, reason=reason)


def _projection(
    module: nn.Module, path: str, norm: str | None, scale: float, multiplier: str | None
) -> SublayerProjection:
    kind, reason = type(module).__name__, ""
    if norm is not None:
        reason = f"the norm {norm} is between {path} of a {kind} and the residual stream"
    elif scale == 0.0:
        reason = f"a {kind} with {multiplier} 0 adds nothing of {path} to the residual stream"
    transposed = not isinstance(module.get_submodule(path), Conv1D)
    return SublayerProjection(path, transposed, scale, not reason, reason)


class LayerTaps:
    """Takes the named taps of one decoder layer each time it runs, for the length of the context.

    Enter it around calls of the layer, and :meth:`take` after each of them::

        with skeleton.loaded_layer(layer, weights), LayerTaps(skeleton, layer, names) as taps:
            for batch in batches:
                states = calls.layer(layer, batch, states_of(batch))
                use(taps.take(batch))

    Args:
        skeleton: The model.
        layer: Number of the decoder layer.
        names: Which of :data:`TAPS`.

    Raises:
        RequestError: If a name is unknown.
        UnsupportedModelError: If the layer does not have one of the taps.

    Memory: one micro-batch of each tap.
    """

    def __init__(self, skeleton: Skeleton, layer: int, names: Iterable[str]) -> None:
        self._module: nn.Module = skeleton.layers[layer]
        self._where = f"layer {layer} ({type(self._module).__name__})"
        self._points = {name: tap_point(skeleton.architecture, self._module, name) for name in names}
        self._taken: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, point in self._points.items():
            module = self._module.get_submodule(point.path)
            if point.side == "input":
                hook = self._input_hook(name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(name, point.scale)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._taken = {}

    def take(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the taps of the layer's last call, which was for ``batch``, and forget them.

        Returns:
            ``{name: tensor}`` in the order of the names, each ``(n, T, width)`` in memory of its own, on the
            device.

        Raises:
            UnsupportedModelError: If the layer did not call a module that a tap is at.
        """
        taken, self._taken = self._taken, {}
        missed = [name for name in self._points if name not in taken]
        if missed:
            msg = (
                f"{self._where} ran without calling {self._points[missed[0]].path!r}, so that there is no tap"
                f" {missed[0]!r}; this configuration computes it in another way"
            )
            raise UnsupportedModelError(msg)
        return {name: taken[name].reshape(*batch.ids.shape, -1) for name in self._points}

    def _input_hook(self, name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._taken[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        return keep

    def _output_hook(self, name: str, scale: float) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, result: Any) -> None:
            value = result[0] if isinstance(result, tuple) else result
            # Falcon adds the output of attention to that of the MLP in place: a copy must be taken now.
            self._taken[name] = value.clone() if scale == 1.0 else value * scale

        return keep


def _multiplier(parts: LayerParts, module: nn.Module) -> float:
    return 1.0 if parts.multiplier is None else float(getattr(module, parts.multiplier))


def _mlp_multiplier(parts: LayerParts, module: nn.Module) -> float:
    scale = _multiplier(parts, module)
    if parts.mlp_multiplier is None:
        return scale
    path, _, name = parts.mlp_multiplier.rpartition(".")
    return scale * float(getattr(module.get_submodule(path), name))


def _is_mixture(parts: LayerParts, module: nn.Module) -> bool:
    return not parts.no_mlp and hasattr(module.get_submodule(parts.mlp), "experts")
