"""Write a Llama-shaped checkpoint with random weights, a shard at a time, without ever holding the model.

    python benchmarks/random_checkpoint.py --preset 6gb [OUT]
    python benchmarks/random_checkpoint.py --preset 6gb --remove

Token ids for calibration are written beside it (``ids.npy``), and a tokenizer of one word, without which some
tools refuse a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

PLACE = Path("/tmp/ghoststream-bench")
"""Where checkpoints of presets are kept between runs."""

_INDEX = "model.safetensors.index.json"

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
    "1.5gb": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14, "vocab_size": 32000},
    "3gb": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 32, "vocab_size": 32000},
    "6gb": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 32000},
    "70b-shape": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 3,
        "vocab_size": 32000,
        "head_size": 128,
        "heads_per_key": 8,
    },
    # As many layers of a 70B as leave room for two of them, and for a pass, in a quarter of the checkpoint.
    "70b-layers": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 14,
        "vocab_size": 16384,
        "head_size": 128,
        "heads_per_key": 8,
        "decay": 0.3,
        "sink": True,
    },
    # The proportions of a 70B: 80 layers, the MLP 3.5 times as wide as the stream, heads of 128.
    "70b-in-small": {
        "hidden_size": 1536,
        "intermediate_size": 5376,
        "num_hidden_layers": 80,
        "vocab_size": 16384,
        "head_size": 128,
        "heads_per_key": 4,
        "decay": 0.3,
        "sink": True,
    },
}


def make(out: Path, preset: str, *, n_sequences: int = 64, length: int = 512) -> Path:
    """Write the checkpoint of a preset unless it is there already, and its token ids; returns its folder."""
    from ghoststream.testing.synthetic import save_ids, save_synthetic

    save_synthetic(out, **PRESETS[preset])
    _use_standard_names(out)
    if not (out / "tokenizer.json").is_file():
        _save_tokenizer(out)
    save_ids(out / "ids.npy", sequences=n_sequences, length=length, vocab_size=PRESETS[preset]["vocab_size"])
    return out


def place_of(preset: str) -> Path:
    """Return where the checkpoint of a preset is kept."""
    return PLACE / preset


def _use_standard_names(out: Path) -> None:
    """Give shards the hub's names (``model-00001-of-00030.safetensors``), which some tools take apart."""
    index = json.loads((out / _INDEX).read_text(encoding="utf-8"))
    found = sorted(set(index["weight_map"].values()))
    names = {name: f"model-{n:05d}-of-{len(found):05d}.safetensors" for n, name in enumerate(found, start=1)}
    for old, new in names.items():
        if (out / old).is_file():
            (out / old).rename(out / new)
    index["weight_map"] = {key: names[name] for key, name in index["weight_map"].items()}
    (out / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _save_tokenizer(out: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(out)


def main() -> None:
    """Parse the command line and write or remove the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=None)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="3gb")
    parser.add_argument("--remove", action="store_true", help="remove the preset's checkpoint")
    options = parser.parse_args()
    out = options.out or place_of(options.preset)
    if options.remove:
        shutil.rmtree(out, ignore_errors=True)
    else:
        print(make(out, options.preset))


if __name__ == "__main__":
    main()
