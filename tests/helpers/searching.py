"""What searches by running a model are given: a text as token ids, and its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ghoststream.options import Compute, Text
from ghoststream.progress import SilentProgress
from ghoststream.stages.session import ModelSession
from ghoststream.text import TokenSet

L, S, HELD, T = 6, 14, 4, 24
"""Layers of the tiny model; windows, how many of them are held out, and tokens of a window."""
MICRO_BATCH = 2


def save_windows(folder: Path) -> Path:
    """Write the windows (``all.npy``), those that are fitted on (``fit.npy``) and those held out."""
    tokens = np.random.default_rng(0).integers(3, 128, size=(S, T))
    np.save(folder / "all.npy", tokens)
    np.save(folder / "fit.npy", tokens[: S - HELD])
    np.save(folder / "held.npy", tokens[S - HELD :])
    return folder


def on_windows(ids: Path) -> dict[str, Any]:
    """Return the keywords that make a request of all windows."""
    return {"calibration": f"ids:{ids / 'all.npy'}", "sequences": S, "length": T, "micro_batch": MICRO_BATCH}


def open_model(model: Path, ids: Path) -> tuple[ModelSession, TokenSet]:
    """Return the model, open, and the tokens of all windows."""
    session = ModelSession(model, Compute(micro_batch=MICRO_BATCH))
    text = Text(spec=f"ids:{ids / 'all.npy'}", sequences=S, length=T)
    return session, session.tokens(text, SilentProgress())
