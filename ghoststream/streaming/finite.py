"""Whether values are finite: said at once on the CPU, and for many batches together on an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ghoststream.errors import NumericsError

Fault = Callable[[], NumericsError]
"""Makes the error that says where a value is that is not finite."""


class FiniteFlags:
    """Looks for NaN and infinity in the states of one batch after the other.

    On the CPU :meth:`note` raises at once. On an accelerator it only launches the look: the host would have
    to wait for the batch to be computed, and meanwhile nothing more would be launched. :meth:`look` waits,
    once for all that was noted. Call it before anything is made of these states that stays.

    Memory: one byte for each batch that was noted.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[torch.Tensor, Fault]] = []

    def note(self, values: torch.Tensor, fault: Fault) -> None:
        """Look at values, or begin to.

        Args:
            values: The values, of any shape, at least one.
            fault: The error to raise if one is NaN or infinite.

        Raises:
            NumericsError: If one is, and the values are the CPU's.
        """
        flag = finite_flag(values)
        if values.device.type != "cpu":
            self._noted.append((flag, fault))
        elif not bool(flag):
            raise fault()

    def look(self) -> None:
        """Wait for what was noted.

        Raises:
            NumericsError: That of the first batch, in the order of the notes, which is not finite.
        """
        noted, self._noted = self._noted, []
        if not noted:
            return
        for good, (_, fault) in zip(torch.stack([flag for flag, _ in noted]).tolist(), noted, strict=True):
            if not good:
                raise fault()


def finite_flag(values: torch.Tensor) -> torch.Tensor:
    """Return whether all values are finite, bool ``()``, on their device: they are read once."""
    # Both ends are NaN where a value is.
    low, high = torch.aminmax(values)
    return low.isfinite() & high.isfinite()
