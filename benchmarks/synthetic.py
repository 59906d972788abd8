"""Write a Llama-shaped checkpoint with random weights, a shard at a time, without ever holding the model.

    python benchmarks/synthetic.py OUT --preset 3gb

Token ids for calibration are written beside it (``ids.npy``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ghoststream.testing.synthetic import save_ids, save_synthetic

PRESETS: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
    "1.5gb": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14, "vocab_size": 32000},
    "3gb": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 32, "vocab_size": 32000},
    "70b-shape": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 3,
        "vocab_size": 32000,
    },
}


def make(out: Path, preset: str, *, n_sequences: int = 64, length: int = 512) -> Path:
    """Write the checkpoint of a preset unless it is there already; returns its folder."""
    save_synthetic(out, **PRESETS[preset])
    save_ids(out / "ids.npy", sequences=n_sequences, length=length, vocab_size=PRESETS[preset]["vocab_size"])
    return out


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="3gb")
    options = parser.parse_args()
    print(make(options.out, options.preset))


if __name__ == "__main__":
    main()
