"""Operations on tensors of the device: each is a task of a stream, and its result NaN until it has run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.late_cuda.memory import Block, Memory
from tests.late_cuda.streams import Queues, Task
from tests.late_cuda.tensors import DeviceTensor, Shape, flat, kind_of, mapped, on_host, on_meta, tensors_in

aten = torch.ops.aten

# The host learns a value or a size.
_SYNCING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::masked_select",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
    "aten::item",
}
_INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
_SMALL_BYTES = 64 * 1024
"""A copy of pageable memory up to this size goes with its command; of a larger one CUDA waits."""


@dataclass(frozen=True)
class Kind:
    """What is known of an operation: whether it gives views, writes, or lets the host wait."""

    name: str
    syncing: bool
    view: bool
    composite_view: bool
    written: tuple[tuple[int, str], ...]
    n_returns: int


@functools.cache
def _kind_of(func: Any) -> Kind:
    schema = func._schema
    name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
    view = any(one.alias_info is not None for one in schema.returns)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    written = tuple(
        (at, one.name)
        for at, one in enumerate(schema.arguments)
        if one.alias_info is not None and one.alias_info.is_write
    )
    syncing = not _SYNCING.isdisjoint((name, schema.name))
    return Kind(name, syncing, view, composite and view, written, len(schema.returns))


class Operations:
    """Runs operations of torch on the device.

    Operands on both sides, and what would need a copy that nobody asked for, raise what CUDA raises.
    """

    def __init__(self, queues: Queues, memory: Memory) -> None:
        self._queues, self._memory = queues, memory
        self._known: dict[Any, Any] = {}

    def factory(self, op: Any, *args: Any, fill: bool = True, **kwargs: Any) -> Any:
        """Make a tensor on the device."""
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            msg = f"{op} on CUDA with {args} {kwargs}: not simulated"
            raise NotImplementedError(msg)
        with torch.inference_mode(False):
            elem = op(*args, **{**kwargs, "device": "cpu", "pin_memory": False})
            if fill and elem.is_floating_point():
                elem.fill_(float("nan"))
        return self._wrap(elem)

    def dispatch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one operation of which an operand is on the device."""
        with self._queues.lock, torch.inference_mode(False), torch.no_grad():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        kind = _kind_of(func)
        if kind.name == "aten::_to_copy":
            return self._to_copy(*args, **kwargs)
        if kind.name == "aten::copy_":
            return self._copy(*args, **kwargs)
        if kind.composite_view:
            return func.decompose(*args, **kwargs)
        self._require_one_side(kind.name, args, kwargs)
        if kind.syncing:
            self._queues.wait(self._queues.current(), kind.name)
            return self._wrap_all(func(*on_host(args), **on_host(kwargs)))
        if kind.written:
            return self._in_place(func, kind, args, kwargs)
        if kind.view:
            return self._view(func, kind.name, args, kwargs)
        return self._functional(func, kind.name, args, dict(kwargs))

    def _require_one_side(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        tensors = [one for one in flat((args, kwargs)) if isinstance(one, torch.Tensor)]
        here = [one for one in tensors if not isinstance(one, DeviceTensor)]
        if len(here) == len(tensors) or all(one.is_meta or one.ndim == 0 for one in here):
            return
        if name.split(".")[0] in _INDEXING and isinstance(args[0], DeviceTensor):
            self._queues.waits.count(f"{name} by an index of the host")
            return
        shapes = [(tuple(one.shape), str(one.device)) for one in tensors]
        msg = (
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}: {shapes})"
        )
        raise RuntimeError(msg)

    def _to_copy(
        self, source: DeviceTensor, *, dtype: Any = None, device: Any = None, **options: Any
    ) -> torch.Tensor:
        target = source.device if device is None else torch.device(device)
        kind = source.dtype if dtype is None else dtype
        kept = {key: value for key, value in options.items() if key == "memory_format"}
        if target.type == "meta":
            return torch.empty_strided(source.size(), source.stride(), dtype=kind, device="meta")
        if target.type == "cuda":
            to_dtype = {"dtype": kind, **kept}
            made: torch.Tensor = self._functional(
                aten._to_copy.default, "aten::_to_copy", (source,), to_dtype
            )
            return made
        stream = self._queues.current()
        self._queues.put(stream, Task(lambda: None, "copy to host", [source.block]))
        self._queues.wait(stream, "copy to pageable memory")
        copied: torch.Tensor = aten._to_copy.default(source.elem, dtype=kind, **kept)
        return copied

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        stream, waits = self._queues.current(), None
        blocks = [one.block for one in tensors_in((target, source))]
        into = target.elem if isinstance(target, DeviceTensor) else target.detach()
        what = source.elem if isinstance(source, DeviceTensor) else source.detach()
        if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
            pass
        elif isinstance(target, DeviceTensor):
            if source.is_pinned():  # read when the copy runs
                waits = None if non_blocking else "copy of page-locked memory that is not asynchronous"
            else:
                what = what.clone()
                small = what.numel() * what.element_size() <= _SMALL_BYTES
                waits = None if small else "copy of pageable memory"
        elif not (non_blocking and target.is_pinned()):
            waits = "copy to the host that is not asynchronous"
        self._queues.put(stream, Task(lambda: into.copy_(what), "copy", blocks))
        if waits is not None:
            self._queues.wait(stream, waits)
        return target

    def _in_place(self, func: Any, kind: Kind, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        inner_args, inner_kwargs = on_host(args), on_host(kwargs)
        blocks = [one.block for one in tensors_in((args, kwargs))]
        task = Task(lambda: func(*inner_args, **inner_kwargs), kind.name, blocks)
        self._queues.put(self._queues.current(), task)
        written = [args[at] if at < len(args) else kwargs.get(name) for at, name in kind.written]
        given = [one for one in written if one is not None]
        return None if kind.n_returns == 0 else given[0] if kind.n_returns == 1 else tuple(given)

    def _view(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = func(*on_host(args), **on_host(kwargs))
        owners = {one.untyped_storage().data_ptr(): one.block for one in tensors_in((args, kwargs))}

        def wrap(one: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            owner = owners.get(one.untyped_storage().data_ptr())
            if owner is None:
                msg = f"{name} copied: not simulated"
                raise NotImplementedError(msg)
            return self._wrap(one, owner)

        return mapped(wrap, result)

    def _functional(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cuda":
            return func(*on_meta(args), **{**on_meta(kwargs), "device": device})
        inner_args = on_host(args)
        inner_kwargs = {**on_host(kwargs), **({} if device is None else {"device": "cpu"})}
        run = _only_on_cuda(func, name, args)
        shapes = self._shapes(name, run, args, kwargs)
        if shapes is None:
            self._queues.wait(self._queues.current(), f"{name} without a shape")
            return self._wrap_all(run(*inner_args, **inner_kwargs))
        places = mapped(lambda one: one.take() if isinstance(one, Shape) else one, shapes)

        def fill() -> None:
            found = run(*inner_args, **inner_kwargs)
            for into, of in zip(flat(places), flat(found), strict=True):
                if isinstance(into, torch.Tensor):
                    assert (into.shape, into.dtype) == (of.shape, of.dtype), name
                    into.copy_(of)

        wrapped = self._wrap_all(places)
        blocks = [one.block for one in tensors_in((args, kwargs, wrapped))]
        self._queues.put(self._queues.current(), Task(fill, name, blocks))
        return wrapped

    def _shapes(self, name: str, run: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the shapes of a result; None for one whose shape is only known by computing it."""
        kind = (name, kind_of(args), kind_of(kwargs))
        if kind not in self._known:
            meta = {} if kwargs.get("device") is None else {"device": "meta"}
            try:
                found = run(*on_meta(args), **{**on_meta(kwargs), **meta})
            except (NotImplementedError, RuntimeError):
                found = None
            self._known[kind] = mapped(_shape, found)
        return self._known[kind]

    def _wrap(self, elem: torch.Tensor, block: Block | None = None) -> DeviceTensor:
        return DeviceTensor(elem, block or self._memory.block(elem.untyped_storage().nbytes()), self)

    def _wrap_all(self, values: Any) -> Any:
        return mapped(lambda one: self._wrap(one) if isinstance(one, torch.Tensor) else one, values)


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Shape(tuple(value.size()), value.stride(), value.dtype)
    return value


def _only_on_cuda(func: Any, name: str, args: Sequence[Any]) -> Any:
    """Return what computes an operation, where the CPU has none: in the type that is wanted."""
    if name == "aten::histc" and not args[0].is_floating_point():
        return lambda values, *rest, **kwargs: func(values.float(), *rest, **kwargs).to(values.dtype)
    if name in ("aten::mm.dtype", "aten::bmm.dtype"):
        return lambda left, right, kind: torch.matmul(left.to(kind), right.to(kind))
    if name in ("aten::addmm.dtype", "aten::baddbmm.dtype"):
        return lambda added, left, right, kind, *, beta=1, alpha=1: (
            beta * added + alpha * torch.matmul(left.to(kind), right.to(kind))
        )
    return func
