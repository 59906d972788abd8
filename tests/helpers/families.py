"""The families that a test runs over: in the main suite all but some hybrids, in the soak suite those too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ghoststream.testing.models import TINY_CONFIGS

# Their recurrent layers are slow in PyTorch. Nemotron-H, Qwen3-Next and LFM2-MoE stand for their kinds.
SOAKED = frozenset(
    {
        "bamba",
        "falcon_h1",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "llama4_text",
        "mamba2",
        "qwen3_5_moe_text",
        "qwen3_5_text",
    }
)


def families(names: Iterable[str] = TINY_CONFIGS) -> list[Any]:
    """Return the families as parameters of a test, in order; some are marked ``soak``."""
    return [pytest.param(name, marks=pytest.mark.soak if name in SOAKED else ()) for name in sorted(names)]


def families_of(items: Iterable[pytest.Item]) -> list[str]:
    """Return the families that a session runs over, by the tests that it runs."""
    soaking = any(item.get_closest_marker("soak") is not None for item in items)
    return [name for name in TINY_CONFIGS if soaking or name not in SOAKED]
