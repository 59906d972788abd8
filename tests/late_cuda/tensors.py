"""Tensors that say ``cuda:0`` and hold memory of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from tests.late_cuda.memory import Block
from tests.late_cuda.streams import CUDA, Stream


class Engine(Protocol):
    """Who runs operations on tensors of the device."""

    def dispatch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any: ...


class DeviceTensor(torch.Tensor):
    """A tensor of the device; ``elem`` holds its values once the work in front of them has run."""

    elem: torch.Tensor
    block: Block
    engine: Engine
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Self], elem: torch.Tensor, block: Block, engine: Engine) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.elem, made.block, made.engine = elem, block, engine
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        msg = (
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )
        raise TypeError(msg)

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]  # ours, as torch.cuda's is
        self.block.uses.add(stream)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as torch's guide has it
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        given = kwargs or {}
        there = args[0] if args and type(args[0]) is cls else tensors_in((args, given))[0]
        return there.engine.dispatch(func, args, given)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return nested arguments or results with something else in the place of each that is no container."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([mapped(change, one) for one in value])
    if kind is dict:
        return {key: mapped(change, one) for key, one in value.items()}
    return change(value)


def flat(value: Any) -> list[Any]:
    """Return what is in nested arguments or results, in order."""
    found: list[Any] = []
    mapped(found.append, value)
    return found


def tensors_in(values: Any) -> list[DeviceTensor]:
    """Return the tensors of the device in nested arguments."""
    return [one for one in flat(values) if type(one) is DeviceTensor]


def on_host(values: Any) -> Any:
    """Return nested arguments with what the device's tensors hold in their places."""
    return mapped(lambda one: one.elem if type(one) is DeviceTensor else one, values)


def on_meta(values: Any) -> Any:
    """Return nested arguments with tensors without memory in the places of all."""

    def convert(one: Any) -> Any:
        if isinstance(one, DeviceTensor):
            return torch.empty_strided(one.elem.size(), one.elem.stride(), dtype=one.dtype, device="meta")
        if isinstance(one, torch.Tensor) and one.ndim > 0:
            return one.to("meta")
        return one

    return mapped(convert, values)


def kind_of(values: Any) -> Any:
    """Return what the shape of a result depends on, to be compared."""

    kind = type(values)
    if kind is tuple or kind is list:
        return tuple(map(kind_of, values))
    if kind is dict:
        return tuple((key, kind_of(one)) for key, one in values.items())
    if isinstance(values, torch.Tensor):
        return (values.shape, values.stride(), values.dtype, values.device)
    return (kind, values)


@dataclass(frozen=True)
class Shape:
    """A tensor's sizes, which memory is taken for when it is wanted."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def take(self) -> torch.Tensor:
        """Return host memory that no kernel has written to: NaN is not a number by chance."""
        made = torch.empty_strided(self.size, self.stride, dtype=self.dtype)
        return made.fill_(float("nan")) if made.is_floating_point() else made
