"""A CUDA device that is not there, for a torch that was built without CUDA.

Its tensors say ``cuda:0`` and hold memory of the host. Its numbers are the CPU's, bit for bit. It adds
what a CPU forgives: device and host are two places (:mod:`tests.late_cuda.operations`), and nothing has run
before somebody waited (:mod:`tests.late_cuda.streams`).

The hooks of :mod:`tests.late_cuda.hooks` must be loaded before torch is imported: a process has the device
from its beginning, or not at all.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any
from unittest import mock

import torch

from tests.late_cuda.memory import Memory
from tests.late_cuda.operations import Operations, aten
from tests.late_cuda.streams import Event, Order, Queues, Stream


class LateCuda:
    """The device, which is there from :meth:`start` on.

    Attributes:
        queues: Its streams, and the host's waits.
        memory: What is taken of it, and what was given back too early.
    """

    def __init__(self, hooks: ctypes.CDLL) -> None:
        self._hooks = hooks
        self.queues = Queues()
        self.memory = Memory(self.queues)
        self._operations = Operations(self.queues, self.memory)

    def start(self) -> None:
        """Let torch have the device."""
        self._register()
        for name, value in self._stand_ins().items():
            mock.patch(name, value).start()

    def reset(self, order: Order) -> None:
        """Begin anew, as on a card that nobody has used, with the work of streams in an order."""
        self.queues.reset(order)
        self.queues.waits.reset()
        self.memory.reset()
        self._hooks.late_cuda_page_locked_reset()

    @property
    def page_locked_live(self) -> int:
        """Bytes of page-locked memory now, in powers of two."""
        return int(self._hooks.late_cuda_page_locked_live())

    @property
    def page_locked_peak(self) -> int:
        """The most there were."""
        return int(self._hooks.late_cuda_page_locked_peak())

    def _register(self) -> None:
        """Take the factories of torch, in all threads, and what copies to the device."""
        operations = self._operations
        self._fallback = torch.library.Library("_", "IMPL")
        self._fallback.fallback(operations.factory, "CUDA")
        self._aten = torch.library.Library("aten", "IMPL")
        for overload in ("default", "start", "start_step"):  # whose kernels resize an empty tensor
            op = getattr(aten.arange, overload)
            made = functools.partial(operations.factory, op, fill=False)
            self._aten.impl(op.name().removeprefix("aten::"), made, "CUDA")
        self._aten.impl("copy_", lambda *a, **k: operations.dispatch(aten.copy_.default, a, k), "CUDA")

    def _stand_ins(self) -> dict[str, Any]:
        memory, queues = self.memory, self.queues
        # Classes, as annotations of transformers join them to other types.
        stream = type(
            "Stream",
            (Stream,),
            {"__init__": lambda one, *_: Stream.__init__(one, queues, f"stream {len(queues.streams)}")},
        )
        event = type("Event", (Event,), {"__init__": lambda one, **_: Event.__init__(one, queues)})
        return {
            "torch.cuda._lazy_init": lambda: None,
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.is_initialized": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.get_device_capability": lambda *_: (9, 0),
            "torch.cuda.get_device_name": lambda *_: "none",
            "torch.cuda.mem_get_info": lambda *_: memory.free(),
            "torch.cuda.memory_allocated": lambda *_: memory.allocated,
            "torch.cuda.memory_reserved": lambda *_: memory.reserved,
            "torch.cuda.max_memory_allocated": lambda *_: memory.peak,
            "torch.cuda.max_memory_reserved": lambda *_: memory.reserved,
            "torch.cuda.reset_peak_memory_stats": lambda *_: None,
            "torch.cuda.host_memory_stats": dict,
            "torch.cuda.Stream": stream,
            "torch.cuda.Event": event,
            "torch.cuda.current_stream": lambda *_: queues.current(),
            "torch.cuda.default_stream": lambda *_: queues.default,
            "torch.cuda.stream": queues.on,
            "torch.cuda.synchronize": lambda *_: queues.drain_all(),
            "torch.cuda.empty_cache": memory.empty_cache,
            # Which look for the device's file.
            "ghoststream.statistics.devices.may_have_accelerator": lambda: True,
            "ghoststream.stages.estimation.estimate.may_have_accelerator": lambda: True,
            # A module that moves makes its parameters anew, as it does for tensors of another kind.
            "torch.__future__.get_overwrite_module_params_on_conversion": lambda: True,
        }
