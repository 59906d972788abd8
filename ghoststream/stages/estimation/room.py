"""What a pass leaves to fits, and which ways to repair `auto` leaves out for lack of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghoststream.costs import beside_work_bytes, staging_bytes
from ghoststream.stages.choosing.room import LeftOut, Room, fits_of, left_out

if TYPE_CHECKING:
    from ghoststream.stages.estimation.job import Job


def computing_bytes(job: Job, logits: int = 0) -> int:
    """Return what a pass takes where layers are computed, beside states and fits."""
    unit = job.sizes.unit_bytes
    packed = 0 if job.machine.has_device else job.sizes.packed_bytes
    return 2 * unit + max(unit // 2, job.micro_batch * job.work_bytes) + packed + logits


def beside_device_bytes(job: Job) -> int:
    """Return what a pass takes on the host of an accelerator, beside states, buffers and fits."""
    return staging_bytes(job.sizes.unit_bytes) + job.sizes.packed_bytes


def on_their_way_bytes(job: Job) -> int:
    """Return what it takes on an accelerator besides: states on their way, and libraries."""
    return beside_work_bytes(job.micro_batch * job.text.length * job.token_bytes)


def room_of(job: Job, sharing: int = 1) -> Room:
    """Return what a pass leaves to a fit, as a recovery would find it.

    Args:
        job: The recovery.
        sharing: Passes that share the memory of the host.
    """
    compute, machine = job.recovery.compute, job.machine
    host = machine.host_memory * 9 // 10 if compute.host_memory is None else compute.host_memory
    host //= sharing
    if machine.device_memory is None:
        taken = computing_bytes(job)
        return Room(host - taken, 0, compute.host_memory is not None, taken)
    device = machine.device_memory * 9 // 10 if compute.device_memory is None else compute.device_memory
    taken = beside_device_bytes(job)
    left = max(0, device - computing_bytes(job) - on_their_way_bytes(job))
    is_given = compute.host_memory is not None and compute.device_memory is not None
    return Room(host - taken, left, is_given, taken)


def too_large(job: Job) -> tuple[LeftOut, ...]:
    """Return what `auto` leaves out, the largest first."""
    fits = fits_of(job.sizes, job.fit_ranges, job.ways, length=job.text.length, races=job.races)
    return left_out(fits, room_of(job, job.crew.here))
