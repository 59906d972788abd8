"""Options of how a model is run, what is kept of it, and where that is reduced."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_serializer

from ghoststream.option_types import Bytes, Count, Layers, Options, option

Dtype = Literal["float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "bfloat16", "float16", "int8"]


def dtype_name(dtype: Any) -> str:
    """Return what options, recipes and files call a torch dtype: ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


class Compute(Options):
    """How a model is opened and run.

    Device, memory and scratch change no bit of a result on one kind of device.
    """

    title: ClassVar[str] = "Running the model"

    dtype: Dtype | None = option(None, "Compute type. Default: the checkpoint's.", usual=True)
    attention: str | None = option(
        None, "Attention implementation, e.g. eager or sdpa. Default: transformers' choice.", metavar="NAME"
    )
    micro_batch: Count | None = option(
        None,
        "Sequences computed at once. Default: what half of the largest layer's bytes holds, at most 2,048 "
        "tokens; on an accelerator twice these bytes, and 8,192 tokens.",
        metavar="B",
    )
    device: str = option(
        "auto",
        "cpu, cuda or cuda:N; auto is CUDA where there is one.\nSeveral, such as cuda:0,cuda:1, share the "
        "windows of capture, fit and evaluate and the candidates of select and explore, each by itself or in "
        "recover.",
        usual=True,
        metavar="NAME",
    )
    device_memory: Bytes | None = option(
        None,
        "Accelerator memory that a pass may take, e.g. 20GiB. Default: nine tenths of what is free.",
        metavar="SIZE",
    )
    host_memory: Bytes | None = option(
        None,
        "Host memory that a pass may take. Default: nine tenths of what is free.\nHidden states that do not "
        "fit go to scratch.",
        usual=True,
        metavar="SIZE",
    )
    scratch: Path | None = option(
        None,
        "Folder for hidden states that do not fit. Default: the folder of the result.\nWhere nothing is "
        "written, and on the workers of a cluster, it is the temporary folder.",
        metavar="DIR",
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the hub.", metavar="REV")
    trust_remote_code: bool = option(
        False, "Allow code that comes with the model to run; for tasks also that of --include-path."
    )


class Storage(Options):
    """What an activation store keeps."""

    title: ClassVar[str] = "Activation store"

    layers: Layers | None = option(
        None, "Hidden states h[l] to keep, e.g. 10:20 or 0,13,19. Default: all of h[0..L].", metavar="LIST"
    )
    store_dtype: StoredDtype | None = option(
        None,
        "Type of the stored hidden states. Default: the compute type.\nint8: 8-bit integers with a scale for "
        "each channel and each token of a window, half the disk of bfloat16.",
    )


class Reduction(Options):
    """Where statistics of a store are reduced, and what that may take. Changes no bit."""

    title: ClassVar[str] = "Statistics of a store"

    scheduler: Any = option(
        None, "Address of a Dask scheduler, e.g. tcp://host:8786. Default: this process.", metavar="ADDRESS"
    )
    workers: Count | None = option(
        None,
        "Threads in this process. Default: as many as there are processors, and memory for.",
        metavar="W",
    )
    memory: Bytes | None = option(
        None,
        "Memory of all statistics at a time, e.g. 8GiB; less takes more sweeps over the store. Default: "
        "half of what is free.",
        metavar="SIZE",
    )

    @field_serializer("scheduler", when_used="json")
    def _address(self, scheduler: Any) -> str | None:
        """Write a ``distributed.Client`` as the address that it is connected to."""
        connected = getattr(scheduler, "scheduler", None)
        return None if scheduler is None else str(getattr(connected, "address", scheduler))
