"""The machine of an estimate: this one, one that is known by name, or one that a file describes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import yaml
from pydantic import Field

from ghoststream.errors import RequestError
from ghoststream.files import atomic_write_bytes
from ghoststream.machine import free_device_memory, free_disk, free_host_memory, processors
from ghoststream.option_types import Bytes, Count, Options, option
from ghoststream.options import Dtype
from ghoststream.stages.pipeline import read_fields

if TYPE_CHECKING:
    import torch

THIS = "this"
"""Name of the machine that the estimate is made on."""

_KNOWN = Path(__file__).with_name("machines.yaml")
_PAGE = "docs/scaling.md#a-machine-file"

Speed = Annotated[Bytes, Field(ge=1)]
Flops = Annotated[float, Field(gt=0)]


class Rates(Options):
    """How fast a machine is: bytes and floating-point operations a second."""

    title: ClassVar[str] = "Rates of a machine"

    disk_read: Speed = option(..., "Bytes a second that the disk of the checkpoint gives.")
    disk_write: Speed = option(..., "Bytes a second that a disk takes.")
    writer: Speed = option(
        ..., "Bytes a second of hidden states that are encoded, checked and hashed for a store, disk apart."
    )
    elementwise: Speed = option(
        ..., "Bytes a second that activations and norms move where layers are computed."
    )
    bus: Speed | None = option(None, "Bytes a second from host to accelerator; left out without one.")
    flops: dict[Dtype, Flops] = option(
        ..., "FLOP a second of matrix products where layers are computed, by compute type."
    )
    float64: Flops = option(..., "FLOP a second of float64 products on the host, where maps are solved.")
    device_float64: Flops | None = option(None, "The same on the accelerator.")


class Machine(Options):
    """What a recovery may take on a machine, and how fast that is."""

    title: ClassVar[str] = "Machine"

    name: str = option(..., "What the machine is called.")
    device_memory: Bytes | None = option(None, "Free memory of the accelerator; left out without one.")
    host_memory: Bytes = option(..., "Free memory of the host.")
    processors: Count = option(..., "Processors that serve.")
    threads: Count | None = option(
        None, "Processors that its rates were measured with, where that is not all of them."
    )
    disk: Bytes | None = option(None, "Free disk; it is not checked where this is left out.")
    rates: Rates | None = option(None, "How fast it is; without, no times are given.")

    @property
    def is_here(self) -> bool:
        """Whether it is the one that this process runs on."""
        return self.name == THIS

    @property
    def has_device(self) -> bool:
        """Whether layers are computed on an accelerator."""
        return self.device_memory is not None

    def free_disk(self, place: Path | None) -> int | None:
        """Return the bytes that are free at a place; None where nobody knows, as in a remote store."""
        if place is None:
            return None
        return free_disk(place) if self.is_here else self.disk

    def at_work(self, tasks: int) -> float:
        """Return the share of the processors of its rates that so many tasks, of one each, keep at work."""
        return min(1.0, tasks / (self.threads or self.processors))

    def side_by_side(self, workers: int) -> int:
        """Return how many of its workers the processors serve at a time, each as fast as the rates say."""
        return min(workers, max(1, self.processors // (self.threads or self.processors)))

    def on(self, device: str) -> Machine:
        """Return the machine as a request uses it: without its accelerator where it asks for the CPU.

        Args:
            device: One device.

        Raises:
            RequestError: If it asks for an accelerator and there is none.
        """
        if device == "cpu" and self.has_device:
            msg = (
                f"the rates of {self.name} are those of its accelerator, so nothing can be said of --device "
                "cpu there; leave it out, or describe the machine without device_memory in a file"
            )
            raise RequestError(msg)
        if device not in ("auto", "cpu") and not self.has_device:
            msg = (
                f"{self.name} has no device_memory, and --device {device} asks for an accelerator; leave it "
                "out, or choose another --machine"
            )
            raise RequestError(msg)
        return self

    def save(self, path: Path) -> None:
        """Write the machine as a file that :func:`find_machine` reads."""
        name = path.stem if self.is_here else self.name
        data = self.model_dump(mode="json", exclude_none=True) | {"name": name}
        atomic_write_bytes(path, yaml.safe_dump(data, sort_keys=False).encode())


@cache
def known_machines() -> Mapping[str, Machine]:
    """Return the machines that are known by name."""
    data: dict[str, Any] = yaml.safe_load(_KNOWN.read_text(encoding="utf-8"))
    return {name: Machine.make({"name": name, **fields}, where=name) for name, fields in data.items()}


def find_machine(name: str) -> Machine:
    """Return a machine by its name or by its file.

    Raises:
        InputNotFoundError: If it is neither.
        RequestError: If the file is not YAML, or a field is missing, unknown or out of range.
    """
    if name in known_machines():
        return known_machines()[name]
    path = Path(name)
    if not path.exists() and not path.suffix:
        msg = f"there is no machine {name!r}; choose {THIS}, {', '.join(known_machines())} or a file"
        raise RequestError(msg)
    fields = read_fields(path, "machine", _PAGE)
    found = Machine.make({"name": path.stem, **fields}, where=f"{path} is not a machine")
    if found.is_here:
        msg = f"{path} is called {THIS}, which is the machine that runs; give it another name"
        raise RequestError(msg)
    if found.has_device and found.rates is not None and found.rates.bus is None:
        msg = f"{path} has device_memory and no rates.bus; say how many bytes a second reach the device"
        raise RequestError(msg)
    return found


def this_machine(device: torch.device | None, rates: Rates | None = None) -> Machine:
    """Return the machine of this process, with what is free now.

    Args:
        device: The accelerator; None for the CPU.
        rates: How fast it was measured to be.
    """
    memory = None if device is None else free_device_memory(device)
    threads = None
    if rates is not None:
        import torch

        threads = torch.get_num_threads()
    return Machine(
        name=THIS,
        device_memory=memory,
        host_memory=free_host_memory(),
        processors=processors(),
        threads=threads,
        disk=None,
        rates=rates,
    )
