"""What every test shares: no network, one thread, repeatable examples, tiny checkpoints made once a
session."""

from __future__ import annotations

import os

# Before anything imports torch, numpy or huggingface_hub.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
        # Results of libraries that look at the terminal must not depend on who runs the tests.
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
)

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.helpers.fixtures"]

settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("soak", deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", autouse=True)
def _quiet_libraries() -> None:
    """One thread for torch, no progress bars of transformers on stderr."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny random checkpoint of a family, made on first use. Do not write into it."""
    from ghoststream.testing.models import save_tiny

    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny(model_type, tmp_path_factory.mktemp(model_type) / "model")
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_checkpoint: Callable[[str], Path]) -> Path:
    """Folder of a tiny Llama with 6 layers, hidden size 32, in 7 shards. Do not write into it."""
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_checkpoint: Callable[[str], Path]) -> Path:
    """Folder of a tiny GPT-2 (tied embeddings, learned positions). Do not write into it."""
    return tiny_checkpoint("gpt2")
