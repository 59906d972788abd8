"""What one decoder layer weighs, and what of it acts on one token: in a mixture, the chosen experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ghoststream.checkpoint.header import BITS, TensorEntry
from ghoststream.checkpoint.layer_parts import Architecture, LayerParts

_ROUTED = re.compile(r"\.experts\.")
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
_UNPACKING = {"fp8": 1.5, "mxfp4": 5.0, "pack-quantized 4": 4.0, "pack-quantized 8": 8.0, "whole": 0.9}
_IN_THREADS = frozenset({"mxfp4"})
_ACTING = ("num_experts_per_tok", "num_experts_per_token")


@dataclass(frozen=True, slots=True)
class MlpEnd:
    """The last linear map of a layer's MLP, which operators can be absorbed into.

    Attributes:
        refusal: Why none can; empty where they can.
        has_bias: Whether it has a bias, which takes up an operator's constant.
    """

    refusal: str = ""
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """One decoder layer.

    Attributes:
        stored_bytes: Its bytes in the checkpoint.
        acting: Weights that one token is multiplied with.
        passing: Elements that go into these matrices and come out of them, for one token.
        unpacking: Seconds that one core takes to make its weights of what a quantised release holds.
        unpacks_in_threads: Whether all processors make them.
        packed_bytes: Stored bytes of the largest of these weights.
    """

    stored_bytes: int
    acting: int
    passing: int
    unpacking: float = 0.0
    packed_bytes: int = 0
    unpacks_in_threads: bool = False

    def unpacking_by(self, processors: int) -> float:
        """Return the seconds that making its weights takes where so many processors serve."""
        return self.unpacking / (processors if self.unpacks_in_threads else 1)

    @classmethod
    def of(cls, entries: Collection[TensorEntry], config: Any) -> LayerSizes:
        """Measure the tensors of a layer.

        Args:
            entries: Its tensors.
            config: The configuration, which says how many experts there are and how many act.
        """
        n_experts, acting = _first(config, _EXPERTS), _first(config, _ACTING)
        share = acting / n_experts if n_experts else 1.0

        def total(size: Callable[[TensorEntry], int]) -> int:
            matrices = (one for one in entries if len(one.shape) > 1)
            return round(sum(size(one) * (share if _is_routed(one, n_experts) else 1.0) for one in matrices))

        packed = [one for one in entries if _elements(one) and _bits(one) < BITS[one.dtype_name]]
        return cls(
            sum(one.n_bytes for one in entries),
            total(_elements),
            total(_sides),
            _seconds_a_gb(config) * sum(one.n_bytes for one in packed) / 1e9,
            max(map(_at_once, packed), default=0),
            _method(config) in _IN_THREADS,
        )


def _at_once(entry: TensorEntry) -> int:
    """Return the stored bytes of a packed weight: planned experts of 8 bits lie apart in releases."""
    is_planned, is_stack = not entry.shard, len(entry.shape) == 3
    return entry.n_bytes // entry.shape[0] if is_planned and is_stack and _bits(entry) >= 8 else entry.n_bytes


def _bits(entry: TensorEntry) -> float:
    return 8 * entry.n_bytes / max(1, _elements(entry))


def _quantisation(config: Any) -> Mapping[str, Any]:
    return getattr(config, "quantization_config", None) or {}


def _method(config: Any) -> str:
    return str(_quantisation(config).get("quant_method"))


def _seconds_a_gb(config: Any) -> float:
    """Return the seconds of a core for a GB of stored bytes that a release in this form was measured to take.

    None of it waits for memory: a core moves ten times as many bytes a second.
    """
    said = _quantisation(config)
    method, form = _method(config), str(said.get("format"))
    if method != "compressed-tensors":
        return _UNPACKING.get(method, 0.0)
    bits = [(group.get("weights") or {}).get("num_bits") for group in said.get("config_groups", {}).values()]
    return _UNPACKING[f"{form} {max(map(int, filter(None, bits)), default=8)}" if "pack" in form else "whole"]


def parts_of(architecture: Architecture, layer: Collection[str]) -> LayerParts:
    """Say what is where in a layer with tensors of these names inside it."""
    return architecture.parts(lambda path: any(name.startswith(f"{path}.") for name in layer))


def mlp_end(architecture: Architecture, layer: Mapping[str, TensorEntry], config: Any) -> MlpEnd:
    """Say what operators can be absorbed into, of a layer with these tensors by their names inside it."""
    parts = parts_of(architecture, layer)
    if parts.no_mlp:
        return MlpEnd(f"there is no last linear map of an MLP: {parts.no_mlp}")
    if f"{parts.mlp_projection}.weight" not in layer:
        return MlpEnd("a layer with experts has no single last linear map of its MLP")
    if parts.mlp_post_norm is not None:
        return MlpEnd(
            f"the norm {parts.mlp_post_norm} is between {parts.mlp_projection} and the residual stream"
        )
    if parts.multiplier is not None and getattr(config, parts.multiplier, 1.0) == 0.0:
        return MlpEnd(
            f"with {parts.multiplier} 0 nothing of {parts.mlp_projection} reaches the residual stream"
        )
    return MlpEnd(has_bias=f"{parts.mlp_projection}.bias" in layer)


def _is_routed(entry: TensorEntry, n_experts: int) -> bool:
    is_stack = len(entry.shape) == 3 and entry.shape[0] == n_experts
    return is_stack or _ROUTED.search(f".{entry.name}") is not None


def _elements(entry: TensorEntry) -> int:
    return prod(entry.shape)


def _sides(entry: TensorEntry) -> int:
    *stacked, rows, columns = entry.shape
    return prod(stacked) * (rows + columns)


def _first(config: Any, names: Collection[str]) -> int:
    found = (getattr(config, name, None) for name in names)
    return int(next((value for value in found if value), 0))
