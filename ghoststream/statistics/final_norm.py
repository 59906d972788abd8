"""The norm behind the last layer, for statistics of states that have been through it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ghoststream.files import json_digest
from ghoststream.files.tensor_files import array_digest

if TYPE_CHECKING:
    from torch import nn

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FinalNorm:
    """The norm of a model, computed in float32.

    transformers gives the last of its ``hidden_states`` behind this norm. Published code that reads them
    compares ``h[l]`` with ``norm(h[L])``.

    Attributes:
        layer: ``L``, the number of the hidden state that it takes.
        digest: Of its weights.
        module: The norm.
    """

    layer: int
    digest: str
    module: nn.Module = field(compare=False, repr=False)

    @classmethod
    def of(cls, module: nn.Module, layer: int) -> FinalNorm:
        """Return the norm that a module with its weights computes; the module itself is not kept."""
        own = copy.deepcopy(module).float().cpu()
        weights = {name: array_digest(weight.detach().numpy()) for name, weight in own.named_parameters()}
        return cls(layer, json_digest({"norm": str(own), "weights": weights}), own)

    def apply(self, rows: Rows) -> Rows:
        """Return the normed rows, ``(n, C)``."""
        import torch

        with torch.no_grad():
            normed: Rows = self.module(torch.from_numpy(rows)).numpy()
        return normed
