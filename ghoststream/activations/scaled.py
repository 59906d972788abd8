"""Hidden states as 8-bit integers: ``integers * channel scale * token scale``, each sequence for itself.

A scale for each channel alone would not do. The first token of a window is a massive activation in most
models: a few of its channels are hundreds of times as large as those of other tokens, which would all be
rounded to zero there. So each token is divided by its root mean square first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_LARGEST = 127
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Below it a float32 has fewer bits, and what is rounded by it can leave the integers."""


def quantise(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn the hidden states of one sequence into integers and scales, on the device where they are.

    The scale of a token is its root mean square over channels. That of a channel is a 127th of its largest
    value in tokens so divided. The integers are rounded to nearest, so a value comes back with an error of
    at most half the product of its two scales.

    Args:
        states: ``(T, C)``, floating.

    Returns:
        Integers int8 ``(T, C)`` within ±127; scales of channels float32 ``(1, C)``; scales of tokens float32
        ``(T, 1)``, NaN where a value of the token is not finite, so that none of it comes back.

    Memory: The states four times in float32.
    """
    wide = states.float()
    # In float64 no square overflows, and the order of summing does not show once it is rounded.
    norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True, dtype=torch.float64)
    tokens = (norms / wide.shape[1] ** 0.5).float().clamp_(min=_SMALLEST_SCALE)
    lost = ~tokens.isfinite()
    shares = wide / tokens
    if bool(lost.any()):
        shares.masked_fill_(lost, 0)
    channels = (shares.abs().amax(0, keepdim=True) / _LARGEST).clamp_(min=_SMALLEST_SCALE)
    integers = shares.div_(channels).round_().to(torch.int8)
    return integers, channels, tokens.masked_fill_(lost, torch.nan)


def dequantise(
    integers: npt.NDArray[Any], channels: npt.NDArray[Any], tokens: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Turn integers ``(n, T, C)`` and their scales, ``(n, 1, C)`` and ``(n, T, 1)``, into float32 states.

    Memory: The result.
    """
    states = integers.astype(np.float32)
    states *= channels
    states *= tokens
    return states
