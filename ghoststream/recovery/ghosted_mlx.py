"""Recovered models for mlx-lm: a pruned model of mlx-lm with linear operators at its pruning boundaries.

This file needs mlx-lm only; it is copied beside the weights, and named in ``config.json`` as ``model_file``.
mlx-lm runs it where it is trusted::

    from mlx_lm import generate, load

    model, tokenizer = load("recovered", trust_remote_code=True)

The model is mlx-lm's own of the base's type. Layers in front of which an operator stands are of a subclass,
which applies the operator first. ``config["ghost_operators"]`` lists the operators, as
``modeling_ghosted.py`` describes them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.utils import MODEL_REMAPPING

KNOWN = (("linear", "hidden"), ("linear", "normed"), ("linear", "hidden+normed"), ("diagonal", "hidden"))


class GhostOperator(nn.Module):
    """The map at a boundary: ``y = x + phi(x) W^T (+ b)``, or ``y = x + x * w (+ b)``.

    Args:
        width: Hidden size of the model.
        entry: The operator, as ``ghost_operators`` has it.

    Raises:
        ValueError: If it is unknown to this file.
    """

    def __init__(self, width: int, entry: dict[str, Any]) -> None:
        super().__init__()
        form, self.features = entry["form"], entry["features"]
        if (form, self.features) not in KNOWN:
            msg = f"operator of form {form!r} with features {self.features!r} is unknown to this file"
            raise ValueError(msg)
        self.norm_epsilon = entry.get("norm_epsilon")
        if form == "linear":
            n_features = 2 * width if self.features == "hidden+normed" else width
            self.linear = nn.Linear(n_features, width, bias=entry["bias"])
        else:
            self.weight = mx.zeros((width,))
            if entry["bias"]:
                self.bias = mx.zeros((width,))

    def __call__(self, x: Any) -> Any:
        """Apply the map, after the one before it if there is one."""
        if "before" in self:
            x = self.before(x)
        if "linear" in self:
            return x + self.linear(self._read(x))
        change = x * self.weight
        return x + (change + self.bias if "bias" in self else change)

    def _read(self, x: Any) -> Any:
        if self.features == "hidden":
            return x
        normed = mx.fast.rms_norm(x, None, self.norm_epsilon)
        return normed if self.features == "normed" else mx.concatenate([x, normed], axis=-1)


@functools.cache
def _with_ghost(base: Any) -> Any:
    """Subclass a layer's or norm's class so that its ``ghost`` acts on its first argument."""

    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return base.__call__(self, self.ghost(x), *args, **kwargs)

    return type(f"Ghosted{base.__name__}", (base,), {"__call__": call})


class ModelArgs:
    """The settings of a model.

    Attributes:
        model_class: mlx-lm's class of the base's type.
        own: Its settings.
        width: Hidden size of the model.
        operators: The operators, as ``ghost_operators`` has them.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        base_type = config["ghost_base_model_type"]
        module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(base_type, base_type)}")
        self.model_class = module.Model
        self.own = module.ModelArgs.from_dict({**config, "model_type": base_type})
        self.width, self.operators = config["hidden_size"], config["ghost_operators"]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """Read them from a configuration, as mlx-lm asks."""
        return cls(config)


def Model(args: ModelArgs) -> Any:
    """Return mlx-lm's model with the operators in their places; mlx-lm asks for this name."""
    model = args.model_class(args.own)
    for entry in args.operators:
        module = model.model
        for name in entry["module"].split("."):
            module = module[int(name)] if name.isdecimal() else getattr(module, name)
        made = GhostOperator(args.width, entry)
        if "ghost" in module:
            ghost = module.ghost
            while "before" in ghost:
                ghost = ghost.before
            ghost.before = made
        else:
            module.ghost = made
            base: Any = type(module)
            module.__class__ = _with_ghost(base)
    return model
