"""The operators of a plan, and their file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ghoststream.errors import ArtifactError, NumericsError, RequestError
from ghoststream.files import json_digest
from ghoststream.files.kinds import TENSORS, require_kind
from ghoststream.files.tensor_files import TensorFile, array_digest, write_tensors
from ghoststream.spans import PruningPlan, Span
from ghoststream.statistics.features import ModelFacts, get_feature, taps_of

Weights = npt.NDArray[np.float32]
Form = Literal["linear", "diagonal", "identity"]

_ENCODING = {"encoding-type": "ghoststream-operators", "encoding-version": "3.0"}
_REPLACED = "replaced."
"""What stands in front of a base tensor's name in the file."""

_ADVICE = "restore it from a copy, or fit again"
_RANKS: Mapping[str, int | None] = {"linear": 2, "diagonal": 1, "identity": None}


@dataclass(frozen=True)
class BoundaryOperator:
    """What is inserted at one boundary: ``y = x + phi(x) W^T (+ b)``.

    Attributes:
        span: The removed span.
        form: ``linear``: ``y = x + phi(x) W^T``; ``diagonal``: ``y = x + x * w``; ``identity``: nothing.
        features: Name of the feature ``phi``.
        weight: float32: ``(C, p)`` in the layout of ``nn.Linear`` (``W = M^T``), ``(C,)`` for ``diagonal``,
            None for ``identity``.
        bias: float32 ``(C,)`` or None.
        diagnostics: JSON data: residuals in and out of sample, condition, tokens, warnings.
        norm_epsilon: Epsilon of normed features; None where the features need none.

    Raises:
        NumericsError: If a weight is NaN or infinite, in float32, or the epsilon is.
    """

    span: Span
    form: Form
    features: str = "hidden"
    weight: Weights | None = None
    bias: Weights | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    norm_epsilon: float | None = None

    def __post_init__(self) -> None:
        for name, array in (("weight", self.weight), ("bias", self.bias)):
            if array is not None and not np.isfinite(array).all():
                msg = f"the {name} of boundary {self.span} is not finite in float32; nothing was written"
                raise NumericsError(msg)
        if self.norm_epsilon is not None and not math.isfinite(self.norm_epsilon):
            msg = f"the epsilon of the normed features of boundary {self.span} is {self.norm_epsilon}"
            raise NumericsError(msg)
        rank = None if self.weight is None else self.weight.ndim
        if rank != _RANKS[self.form]:
            msg = f"an operator of form {self.form!r} at {self.span} cannot have a weight of rank {rank}"
            raise RequestError(msg)
        if self.form != "linear" and self.features != "hidden":
            msg = f"an operator of form {self.form!r} scales the hidden state itself, not {self.features!r}"
            raise RequestError(msg)

    @property
    def name(self) -> str:
        """Prefix of its tensors in the file."""
        return f"boundary.{self.span.start}-{self.span.stop}"

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps of the layer before the boundary that it reads; none if it reads the hidden state.

        Raises:
            RequestError: If its feature is not registered here.
        """
        return taps_of(self.features)

    def apply(
        self, states: npt.NDArray[np.floating[Any]], taps: npt.NDArray[np.floating[Any]] | None = None
    ) -> npt.NDArray[np.floating[Any]]:
        """Apply the operator to hidden states ``(..., C)`` in numpy, features in float64.

        Args:
            states: ``h[start]``.
            taps: The taps of layer ``start - 1`` that the features read, side by side, ``(..., width)``,
                where they read any.

        Raises:
            RequestError: If its feature is not registered here, or reads taps and none are given.
        """
        if self.weight is None:
            return states
        read = taps if self.taps else states
        if read is None:
            msg = (
                f"the features {self.features} at {self.span} are of the layer before: give its "
                f"{', '.join(self.taps)}, side by side, too"
            )
            raise RequestError(msg)
        if self.features != "hidden":
            rows = read.reshape(-1, read.shape[-1]).astype(np.float64)
            features = get_feature(self.features).rows(rows, ModelFacts(self.norm_epsilon))
            read = features.reshape(*states.shape[:-1], -1)
        change = read @ self.weight.T if self.form == "linear" else states * self.weight
        result: npt.NDArray[np.floating[Any]] = states + change
        return result if self.bias is None else result + self.bias

    def to_json(self) -> dict[str, Any]:
        """Return all but the arrays as JSON data."""
        return {
            "span": [self.span.start, self.span.stop],
            "form": self.form,
            "features": self.features,
            "norm_epsilon": self.norm_epsilon,
            "bias": self.bias is not None,
            "diagnostics": self.diagnostics,
        }


@dataclass(frozen=True)
class OperatorSet:
    """The operators of one pruning plan.

    Attributes:
        plan: The plan.
        kind: Name of the operator kind.
        boundaries: One operator for each span of the plan, in its order; ``identity`` ones included.
        hidden: Hidden size C.
        metadata: JSON data: ``base`` (fingerprint of the dense model), ``recipe``, ``recipe_digest``,
            ``versions``.
        replaced: Weights that stand in the places of the base's, float32, by the names of their tensors in
            the base checkpoint: tensors of layers that are kept, and of the final norm. Layers have the
            base's numbers.

    Raises:
        RequestError: If there is not one operator a span, in order.
        NumericsError: If a replaced weight is NaN or infinite.

    Memory: ``4 p C`` bytes for each linear operator, and four for each element that is replaced.
    """

    plan: PruningPlan
    kind: str
    boundaries: tuple[BoundaryOperator, ...]
    hidden: int
    metadata: dict[str, Any] = field(default_factory=dict)
    replaced: Mapping[str, Weights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in self.replaced.items():
            if not np.isfinite(array).all():
                msg = f"the weight for {name} is not finite in float32; nothing was written"
                raise NumericsError(msg)
        spans = tuple(operator.span for operator in self.boundaries)
        if spans != self.plan.spans:
            msg = (
                f"operators for {list(map(str, spans))} do not fit the plan {self.plan}; give one a span, in "
                "order"
            )
            raise RequestError(msg)

    @property
    def operators(self) -> tuple[BoundaryOperator, ...]:
        """The operators that change something: all but the ``identity`` ones."""
        return tuple(operator for operator in self.boundaries if operator.form != "identity")

    @property
    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Diagnostics by span, as written (``"[13,19)"``)."""
        return {str(operator.span): operator.diagnostics for operator in self.boundaries}

    @property
    def warnings(self) -> tuple[str, ...]:
        """All warnings of all boundaries."""
        return tuple(
            text for operator in self.boundaries for text in operator.diagnostics.get("warnings", ())
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """What decided every bit of them; empty where it is not known."""
        return dict(self.metadata.get("recipe") or {})

    @property
    def digest(self) -> str:
        """Digest of the recipe; empty where there is none."""
        return json_digest(self.recipe) if self.recipe else ""

    def save(self, path: Path) -> None:
        """Write one sealed safetensors file with one metadata key.

        Tensors are ``boundary.{start}-{stop}.weight`` (and ``.bias``), and ``replaced.{name}`` for a tensor
        of the base. Equal content gives equal bytes. The file appears whole or not at all.

        Raises:
            DiskFullError: If no space is left.
        """
        metadata = {
            **_ENCODING,
            **self.metadata,
            "kind": self.kind,
            "hidden": self.hidden,
            "plan": self.plan.to_json(),
            "boundaries": [operator.to_json() for operator in self.boundaries],
        }
        write_tensors(path, self.arrays(), metadata)

    def arrays(self) -> dict[str, Weights]:
        """Return all arrays by the names of their tensors in the file, float32 and contiguous."""
        arrays = {f"{_REPLACED}{name}": array for name, array in self.replaced.items()}
        for operator in self.operators:
            for part, array in (("weight", operator.weight), ("bias", operator.bias)):
                if array is not None:
                    arrays[f"{operator.name}.{part}"] = array
        return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}

    def content_digest(self) -> str:
        """Return the digest of what they are, without what is known of how they were made."""
        arrays = {name: array_digest(array) for name, array in self.arrays().items()}
        return json_digest({"boundaries": [one.to_json() for one in self.boundaries], "arrays": arrays})

    @classmethod
    def load(cls, path: str | Path) -> OperatorSet:
        """Read what :meth:`save` wrote, and check the digests of the header, the recipe and every tensor.

        Raises:
            InputNotFoundError: If there is no such file.
            RequestError: If it looks like something else.
            ArtifactError: If it is no operators file, damaged, or written by a newer version.
        """
        path = Path(path)
        require_kind(path, TENSORS, "an operators file of `ghoststream fit`")
        with TensorFile(path, advice=_ADVICE) as file:
            metadata = file.metadata
            _require_encoding(metadata, path)
            arrays: dict[str, Weights] = {name: file.read(name) for name in file.digests}
        try:
            _require_recipe(metadata, path)
            boundaries = tuple(_boundary(item, arrays) for item in metadata.pop("boundaries"))
            plan = PruningPlan.from_json(metadata.pop("plan"))
            kind, hidden = str(metadata.pop("kind")), int(metadata.pop("hidden"))
            rest = {key: value for key, value in metadata.items() if key not in _ENCODING}
            _require_objects(rest, ("base", "recipe", "versions"))
            replaced = {
                name.removeprefix(_REPLACED): array
                for name, array in arrays.items()
                if name.startswith(_REPLACED)
            }
            return cls(plan, kind, boundaries, hidden, rest, replaced)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ArtifactError):
                raise
            msg = f"{path} lacks a part of an operator file ({error}); delete it and fit again"
            raise ArtifactError(msg) from error


def _require_encoding(metadata: Mapping[str, Any], path: Path) -> None:
    found = {key: metadata.get(key) for key in _ENCODING}
    if found["encoding-type"] != _ENCODING["encoding-type"]:
        msg = (
            f"{path} is not an operator file (encoding-type {found['encoding-type']!r}); give what fit wrote"
        )
        raise ArtifactError(msg)
    if str(found["encoding-version"]).split(".")[0] != _ENCODING["encoding-version"].split(".")[0]:
        msg = (
            f"{path} is written in version {found['encoding-version']} of its format, this ghoststream reads "
            f"{_ENCODING['encoding-version']}; update ghoststream, or fit again"
        )
        raise ArtifactError(msg)


def _require_recipe(metadata: Mapping[str, Any], path: Path) -> None:
    digest = json_digest(metadata.get("recipe"))
    if metadata.get("recipe_digest", digest) != digest:
        msg = f"{path}: the recipe does not have the digest that is noted beside it; {_ADVICE}"
        raise ArtifactError(msg)


def _require_objects(metadata: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(metadata.get(name, {}), Mapping):
            msg = f"{name} is no object"
            raise TypeError(msg)


def _boundary(item: Mapping[str, Any], arrays: Mapping[str, Weights]) -> BoundaryOperator:
    span = Span(*item["span"])
    name = f"boundary.{span.start}-{span.stop}"
    form: Form = item["form"]
    return BoundaryOperator(
        span,
        form,
        str(item["features"]),
        None if form == "identity" else arrays[f"{name}.weight"],
        arrays[f"{name}.bias"] if item["bias"] else None,
        dict(item["diagnostics"]),
        norm_epsilon=item.get("norm_epsilon"),
    )
