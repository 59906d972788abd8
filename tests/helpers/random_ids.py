"""Random tokens as a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def random_ids(folder: Path, sequences: int, length: int) -> str:
    """Write the same random tokens, which every tiny model knows, as ``FOLDER/ids.npy``.

    Returns:
        Their text specification.
    """
    path = folder / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(sequences, length)))
    return f"ids:{path}"
