"""Features: what an operator reads at a boundary (design: ``phi``)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError

Array = npt.NDArray[np.float64]


class Feature(Protocol):
    """A map of hidden states to features, row by row."""

    name: str

    def width(self, hidden: int) -> int:
        """Return the number of features p for a hidden size C."""

    def rows(self, states: Array) -> Array:
        """Map hidden states ``(n, C)`` float64 to features ``(n, p)`` float64, C-contiguous."""


class HiddenFeature:
    """``phi(x) = x``: the feature of the paper (arXiv 2605.15491)."""

    name = "hidden"

    def width(self, hidden: int) -> int:
        """Return ``hidden``."""
        return hidden

    def rows(self, states: Array) -> Array:
        """Return the states themselves."""
        return states


_FEATURES: dict[str, Feature] = {}


def register_feature(feature: Feature) -> Feature:
    """Make a feature known under its name.

    Raises:
        RequestError: If the name is taken by another feature.
    """
    known = _FEATURES.setdefault(feature.name, feature)
    if known is not feature:
        msg = f"a feature named {feature.name!r} is registered already; choose another name"
        raise RequestError(msg)
    return feature


def get_feature(name: str) -> Feature:
    """Return a registered feature.

    Raises:
        RequestError: If there is none of this name.
    """
    try:
        return _FEATURES[name]
    except KeyError:
        msg = f"there is no feature {name!r}; known are {', '.join(sorted(_FEATURES))}"
        raise RequestError(msg) from None


register_feature(HiddenFeature())
