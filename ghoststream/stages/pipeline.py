"""Pipeline files: a :class:`~ghoststream.options.Recovery` written down in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.options import Recovery, Reduction


def load_pipeline(path: Path) -> Recovery:
    """Read and check a pipeline file.

    Raises:
        InputNotFoundError: If there is no such file.
        RequestError: If it is not YAML, or a field is missing, unknown or out of range.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        msg = f"there is no pipeline file {path}; check the path"
        raise InputNotFoundError(msg) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path} is not YAML: {' '.join(str(error).split())}"
        raise RequestError(msg) from error
    if not isinstance(data, dict):
        msg = f"{path} is not a pipeline: it holds no fields; see pipelines/README.md"
        raise RequestError(msg)
    return Recovery.make({"name": path.stem, **data}, where=f"{path} is not a pipeline")


def with_runtime(recovery: Recovery, model: str | None, given: Mapping[str, Any]) -> Recovery:
    """Return a recovery; what the command line says of model and machine takes the place of the file's.

    Args:
        recovery: What the file says.
        model: Checkpoint folder or hub id; the file's if ``None``.
        given: Fields of :class:`~ghoststream.options.Compute` and :class:`~ghoststream.options.Reduction`.
    """
    parts = {"compute": recovery.compute, "reduction": recovery.reduction}
    changes: dict[str, Any] = {} if model is None else {"model": model}
    for name, part in parts.items():
        own = {
            key: value
            for key, value in given.items()
            if (key in Reduction.model_fields) == (name == "reduction")
        }
        if own:
            changes[name] = part.model_copy(update=own)
    return recovery.model_copy(update=changes)
