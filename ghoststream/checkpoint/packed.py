"""Weights that a quantiser stored as several tensors: which these are, and what they make. Headers suffice.

A quantised release holds for a weight its numbers in few bits and the scales that they are multiplied with.
Both names and layout depend on the method. Everything else asks for the weight, under the name and with the
shape that it has in an unquantised release.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from types import MappingProxyType
from typing import Any

from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.packed_weight import PackedWeight
from ghoststream.errors import CheckpointError, UnsupportedModelError

INSTALL = "pip install 'ghoststream[quantised]'"

_FIELD = "quantization_config"
_FP8, _MXFP4, _COMPRESSED = "fp8", "mxfp4", "compressed-tensors"
_HEADER_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SCALES = frozenset({"F32", "F16", "BF16"})
_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
_BLOCK = (128, 128)
_FP4_IN_A_GROUP = 32
_MIXED = "mixed-precision"
_PACKED_IN_INT32 = "pack-quantized"
_STORED_WHOLE = frozenset({"int-quantized", "float-quantized", "naive-quantized"})
# Beside a weight of compressed-tensors; those of activations matter to kernels only.
_COMPRESSED_PARTS = ("weight_scale", "weight_zero_point", "weight_shape")
_OF_ACTIVATIONS = ("activation_scale", "input_scale", "input_zero_point", "output_scale", "output_zero_point")

Found = Iterator[PackedWeight]


def require_readable(config: Any) -> None:
    """Refuse a configuration of weights that are quantised in a way that is not read here, by its method.

    Raises:
        UnsupportedModelError: If they are, or what reads them is not installed.
    """
    older = _method(getattr(config, "compression_config", None))
    if older is not None:
        raise _refused(older, "its compression_config is of an old form")
    method = _method(getattr(config, _FIELD, None))
    if method is None:
        return
    if method not in _FINDERS:
        raise _refused(method, f"read are {', '.join(sorted(_FINDERS))}")
    said = _data(config.quantization_config)
    if method == _FP8 and said.get("expert_dtype", "fp8") != "fp8":
        raise _refused(method, f"experts in {said['expert_dtype']} are not read")
    if method == _COMPRESSED:
        _require_compressed(said)


def require_unquantised(config: Any, why: str) -> None:
    """Refuse a configuration of weights that are quantised in whatever way.

    Args:
        config: The configuration.
        why: The reason, for the message.

    Raises:
        UnsupportedModelError: If they are.
    """
    for field in (_FIELD, "compression_config"):
        method = _method(getattr(config, field, None))
        if method is not None:
            raise _refused(method, why)


def with_packed(index: CheckpointIndex, config: Any) -> CheckpointIndex:
    """Return the index with the weights that quantised tensors make.

    Args:
        index: The checkpoint as it lies on disk.
        config: Its configuration, of transformers or as plain data in attributes.

    Raises:
        CheckpointError: If tensors do not fit together.
        UnsupportedModelError: If a scale is of a kind that is not read here.
    """
    method = _method(getattr(config, _FIELD, None))
    if method is None or method not in _FINDERS:
        return index
    said = _data(config.quantization_config)
    dtype = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None))
    dtype_name = _HEADER_NAMES.get(dtype.removeprefix("torch."), "BF16")
    found = _FINDERS[method](index, said)
    packed = {
        one.name: replace(one, entry=replace(one.entry, dtype_name=dtype_name, n_bytes=_bytes(index, one)))
        for one in found
    }
    _require_scaled(index, packed)
    return replace(index, packed=MappingProxyType(packed))


def _fine_grained(index: CheckpointIndex, said: Mapping[str, Any]) -> Found:
    """FP8 with a scale a block, ``weight_scale_inv``, or one for the whole tensor."""
    size = said.get("weight_block_size", _BLOCK) or None
    for name, scale in index.tensors.items():
        if not name.endswith("_scale_inv"):
            continue
        weight = _partner(index, name, name.removesuffix("_scale_inv"))
        if scale.dtype_name not in _SCALES or weight.dtype_name not in _FLOAT8:
            kinds = f"{weight.dtype_name} with scales in {scale.dtype_name}"
            raise _refused(_FP8, f"{weight.name} is {kinds}")
        block = _block(weight, scale, size)
        parts = {"weight": weight.name, "scale": name, **_of_activations(index, weight.name)}
        yield PackedWeight(weight, _FP8, parts, {"block": block})


def _block(weight: TensorEntry, scale: TensorEntry, size: Any) -> tuple[int, int] | None:
    """Return rows and columns of a block; None if one scale holds for the whole tensor."""
    if prod(scale.shape) == 1:
        return None
    grid, sides = scale.shape[-2:], weight.shape[-2:]
    if len(grid) == 2 and scale.shape[:-2] == weight.shape[:-2]:
        if size is not None and all(-(-n // int(b)) == g for n, b, g in zip(sides, size, grid, strict=True)):
            return int(size[0]), int(size[1])
        if all(n % g == 0 for n, g in zip(sides, grid, strict=True)):
            return sides[0] // grid[0], sides[1] // grid[1]
    msg = (
        f"the scales {scale.name} of shape {scale.shape} do not fit {weight.name} of shape {weight.shape} in "
        f"blocks of {size}; download or copy both again"
    )
    raise CheckpointError(msg)


def _mxfp4(index: CheckpointIndex, said: Mapping[str, Any]) -> Found:
    """Experts of gpt-oss: two numbers of four bits a byte, and an exponent for each 32 of them."""
    del said
    for name, blocks in index.tensors.items():
        if not name.endswith("_blocks"):
            continue
        whole = name.removesuffix("_blocks")
        scales = _partner(index, name, f"{whole}_scales")
        if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape:
            raise _unfitting(blocks, scales)
        experts, rows, groups, _ = blocks.shape
        entry = replace(blocks, name=whole, shape=(experts, groups * _FP4_IN_A_GROUP, rows))
        yield PackedWeight(entry, _MXFP4, {"blocks": name, "scales": scales.name}, {})


def _compressed(index: CheckpointIndex, said: Mapping[str, Any]) -> Found:
    """What compressed-tensors writes: numbers of eight bits, or several in one int32."""
    for name in index.tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        scheme = _scheme(said, module, index)
        main, shape = "weight", None
        if scheme["format"] == _PACKED_IN_INT32:
            packed = _partner(index, name, f"{module}.weight_packed")
            main, columns = "weight_packed", packed.shape[-1] * 32 // int(scheme["weights"]["num_bits"])
            shape = (*packed.shape[:-1], columns)
        stored = _partner(index, name, f"{module}.{main}")
        if f"{module}.weight_g_idx" in index.tensors:
            raise _refused(_COMPRESSED, f"the columns of {stored.name} are reordered")
        roles = [role for role in _COMPRESSED_PARTS if f"{module}.{role}" in index.tensors]
        parts = {main: stored.name, **{role: f"{module}.{role}" for role in roles}}
        weight = f"{module}.weight"
        entry = replace(stored, name=weight, shape=shape or stored.shape)
        parts |= _of_activations(index, weight)
        yield PackedWeight(entry, _COMPRESSED, parts, scheme)


def _scheme(said: Mapping[str, Any], module: str, index: CheckpointIndex) -> dict[str, Any]:
    """Return how the weight of a module is compressed."""
    groups = list((said.get("config_groups") or {}).values())
    named = (
        group
        for group in groups
        for target in group["targets"]
        if target == module or (target.startswith("re:") and re.match(target[3:], module))
    )
    of_a_class = (
        group for group in groups if any(not target.startswith("re:") for target in group["targets"])
    )
    group = next(named, None) or next(of_a_class, None)
    if group is None:
        msg = (
            f"{index.root}: no group of its quantization_config is about {module}, which has scales; "
            "download config.json again"
        )
        raise CheckpointError(msg)
    return {**group, "format": group.get("format") or said.get("format")}


def _require_compressed(said: Mapping[str, Any]) -> None:
    method = _COMPRESSED
    if said.get("sparsity_config") or said.get("transform_config"):
        raise _refused(method, "it is sparse or rotated")
    for group in (said.get("config_groups") or {}).values():
        form = str(group.get("format") or said.get("format"))
        if form not in {_PACKED_IN_INT32, *_STORED_WHOLE}:
            raise _refused(method, f"its format is {form}")
        bits = (group.get("weights") or {}).get("num_bits")
        if form == _PACKED_IN_INT32 and bits not in (4, 8):
            raise _refused(method, f"its weights have {bits} bits")
    if find_spec("compressed_tensors") is None:
        msg = f"the checkpoint is quantised ({method}), and what reads it is not installed: {INSTALL}"
        raise UnsupportedModelError(msg)


def _partner(index: CheckpointIndex, name: str, partner: str) -> TensorEntry:
    entry = index.tensors.get(partner)
    if entry is None:
        msg = f"{index.root} holds {name} and no {partner}, which belongs to it; download or copy it again"
        raise CheckpointError(msg)
    return entry


def _of_activations(index: CheckpointIndex, weight: str) -> dict[str, str]:
    module = weight.rpartition(".")[0]
    return {role: f"{module}.{role}" for role in _OF_ACTIVATIONS if f"{module}.{role}" in index.tensors}


def _bytes(index: CheckpointIndex, packed: PackedWeight) -> int:
    return sum(index.tensors[part].n_bytes for part in packed.parts.values())


def _require_scaled(index: CheckpointIndex, packed: Mapping[str, PackedWeight]) -> None:
    """Refuse numbers of eight bits that no scale was found for: alone they are another model's."""
    parts = {name for one in packed.values() for name in one.parts.values()}
    for name, entry in index.tensors.items():
        if entry.dtype_name in _FLOAT8 and name not in parts:
            msg = (
                f"{index.root}: {name} is quantised ({entry.dtype_name}) and has no scale beside it; "
                "download or copy the checkpoint again"
            )
            raise CheckpointError(msg)


def _unfitting(one: TensorEntry, other: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{one.name} of shape {one.shape} and {other.name} of shape {other.shape} do not fit together; "
        "download or copy both again"
    )


def _refused(method: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the checkpoint is quantised ({method}), and such weights cannot be streamed: {why}; give an "
        "unquantised safetensors checkpoint of the model, or dequantise this one with transformers and "
        "save_pretrained"
    )


def _method(said: Any) -> str | None:
    """Return the name of a method; None where nothing is quantised."""
    if said is None:
        return None
    if isinstance(said, Mapping):
        method = said.get("quant_method", "unknown method")
    else:
        method = getattr(said, "quant_method", "unknown method")
    return str(getattr(method, "value", method))


def _data(said: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = said if isinstance(said, Mapping) else said.to_dict()
    return found


_FINDERS: Mapping[str, Callable[[CheckpointIndex, Mapping[str, Any]], Found]] = MappingProxyType(
    {_FP8: _fine_grained, _MXFP4: _mxfp4, _COMPRESSED: _compressed}
)
