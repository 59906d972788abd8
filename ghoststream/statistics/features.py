"""Features: what an operator reads at a boundary (design: ``phi``).

A user's own is a class of a few lines::

    class Magnitudes(Feature):
        name = "magnitudes"

        def rows(self, states, facts):
            return np.abs(states)

    register_feature(Magnitudes())

An installed package names such an object as an entry point of the group ``ghoststream.features``.

A feature whose ``taps`` are not empty reads inner activations of the layer before the boundary
(``docs/taps.md``) in the place of the hidden states: ``taps`` is a tuple of their names, ``width`` is given
the width of all of them together, ``rows`` the taps side by side in that order, ``(n, width)``.

A recovered checkpoint can hold operators on the features of this file only: on others an operator can be
fitted, judged by its residuals and applied by the user's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import NumericsError, RequestError
from ghoststream.registry import Registry
from ghoststream.spans import Span
from ghoststream.statistics.matrices import like, row_energy

Array = npt.NDArray[np.float64]

STATE_TAP = "output"
"""The tap that is the hidden state at the boundary itself: what the layer before gives."""


@dataclass(frozen=True)
class ModelFacts:
    """What a feature may know of the model beside its hidden states.

    Attributes:
        norm_epsilon: Epsilon of the model's norms; None where the store does not say it.
    """

    norm_epsilon: float | None = None

    @classmethod
    def of(cls, fingerprint: Mapping[str, Any]) -> ModelFacts:
        """Read the facts off the fingerprint of a store."""
        value = (fingerprint.get("model") or {}).get("norm_epsilon")
        return cls(None if value is None else float(value))


class Feature:
    """A map of hidden states to features, row by row.

    Attributes:
        name: Name by which it is registered.
        taps: Taps of the layer before the boundary that are read in the place of the hidden states; none by
            default.
        on_device: Whether ``rows`` takes tensors on a device too, and returns one. Otherwise, where states
            are on one, rows are computed on the host.
        needs_epsilon: Whether ``rows`` needs the epsilon of the model's norms.
    """

    name: str
    taps: tuple[str, ...] = ()
    on_device: bool = False
    needs_epsilon: bool = False

    def width(self, hidden: int) -> int:
        """Return the number of features p for a hidden size C (for taps, their width together).

        By default as many.
        """
        return hidden

    def rows(self, states: Any, facts: ModelFacts) -> Any:
        """Map hidden states ``(n, C)`` float64 to features ``(n, p)`` float64, C-contiguous.

        A tensor of states has the dtype that they are kept in, and features may have it too.
        """
        raise NotImplementedError


class HiddenFeature(Feature):
    """``phi(x) = x``: the feature of the paper (arXiv 2605.15491)."""

    name = "hidden"
    on_device = True

    def rows(self, states: Any, facts: ModelFacts) -> Any:
        """Return the states themselves."""
        del facts
        return states


class NormedFeature(Feature):
    """``phi(x) = x / sqrt(mean(x^2) + eps)``, ``eps`` that of the model's own norms; no learned scale."""

    name = "normed"
    on_device = True
    needs_epsilon = True

    def rows(self, states: Any, facts: ModelFacts) -> Any:
        """Return the states divided by their root mean square.

        Raises:
            RequestError: If the epsilon is not known.
        """
        return states * like(_inverse_rms(states, facts), states)


class HiddenAndNormedFeature(Feature):
    """``phi(x) = (x, x / sqrt(mean(x^2) + eps))``, of width ``2 C``.

    It can do what either of the two can, and more.
    """

    name = "hidden+normed"
    on_device = True
    needs_epsilon = True

    def width(self, hidden: int) -> int:
        """Return ``2 * hidden``."""
        return 2 * hidden

    def rows(self, states: Any, facts: ModelFacts) -> Any:
        """Return the states and, beside them, the normed states.

        Raises:
            RequestError: If the epsilon is not known.
        """
        size = states.shape[1]
        both = like(np.empty((len(states), 2 * size)), states)
        both[:, :size] = states
        both[:, size:] = states * like(_inverse_rms(states, facts), states)
        return both


@dataclass(frozen=True)
class TapFeature(Feature):
    """``phi = (a_1, a_2, ...)``: taps of the layer before the boundary side by side, as they are.

    Attributes:
        name: Name of the feature.
        taps: Names of the taps, in the order of the features.
    """

    name: str
    taps: tuple[str, ...]
    on_device: bool = True

    def rows(self, states: Any, facts: ModelFacts) -> Any:
        """Return the taps."""
        del facts
        return states


MLP = TapFeature("mlp", ("mlp_intermediate",))
"""What enters the last linear map (``down_proj``) of the MLP of the layer before the boundary; of its width
I."""

MLP_OUTPUT = TapFeature("mlp_output", ("mlp_contribution",))
"""What that MLP adds to the residual stream: the feature of ReplaceMe (arXiv 2505.02819)."""

HIDDEN_AND_MLP = TapFeature("hidden+mlp", (STATE_TAP, "mlp_intermediate"))
"""``phi = (x, a)``: the hidden state, and beside it what ``mlp`` reads; of width ``C + I``."""


@dataclass(frozen=True)
class SizedFeature(Feature):
    """A feature of taps whose width together is known: what reducers work with."""

    feature: Feature
    size: int
    name: str = field(init=False)
    on_device: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.feature.name)
        object.__setattr__(self, "on_device", self.feature.on_device)

    def width(self, hidden: int) -> int:
        """Return the number of features; the hidden size does not matter."""
        del hidden
        return self.feature.width(self.size)

    def rows(self, states: Any, facts: ModelFacts) -> Any:
        """Map taps ``(n, size)`` to features."""
        return self.feature.rows(states, facts)


def taps_of(name: str) -> tuple[str, ...]:
    """Return the taps that a registered feature reads, in the order of its columns.

    None if it reads the hidden states.

    Raises:
        RequestError: If there is no feature of this name.
    """
    return get_feature(name).taps


def require_layer_before(name: str, span: Span) -> None:
    """Check that there is a layer before a span, for features that are of it.

    Raises:
        RequestError: If the span begins with the first layer.
    """
    if span.start == 0:
        msg = (
            f"the features {name} are of the layer before the boundary, and {span} begins with the first "
            "layer; use features of the hidden state, or another span"
        )
        raise RequestError(msg)


def _inverse_rms(states: Any, facts: ModelFacts) -> Array:
    if facts.norm_epsilon is None:
        msg = (
            "the store does not say which epsilon the model's norms have, which normed features need; "
            "capture it again with this version, or use the features hidden"
        )
        raise RequestError(msg)
    mean_square = row_energy(states) / states.shape[1]
    inverse: Array = (1.0 / np.sqrt(mean_square + facts.norm_epsilon))[:, None]
    return inverse


_FEATURES: Registry[Feature] = Registry(
    "feature", group="ghoststream.features", name_of=lambda feature: feature.name
)

register_feature = _FEATURES.add
get_feature = _FEATURES.get
feature_names = _FEATURES.names


def require_feature(feature: Feature, hidden: int, facts: ModelFacts) -> None:
    """Check, before the work starts, that a feature gives what it promises for hidden size ``hidden``.

    Raises:
        RequestError: If the model's facts do not suffice.
        NumericsError: If a feature is of another shape or dtype than it says, or not finite.
    """
    read = feature.size if isinstance(feature, SizedFeature) else hidden
    rows = feature.rows(np.ones((2, read)), facts)
    wanted = (2, feature.width(hidden))
    if rows.shape != wanted or rows.dtype != np.float64 or not np.isfinite(rows).all():
        msg = (
            f"the feature {feature.name!r} gives {rows.dtype} of shape {rows.shape} for two rows of ones; "
            f"it must give finite float64 of shape {wanted}"
        )
        raise NumericsError(msg)


for _feature in (HiddenFeature(), NormedFeature(), HiddenAndNormedFeature(), MLP, MLP_OUTPUT, HIDDEN_AND_MLP):
    register_feature(_feature)
