"""``config.json`` before it is believed, and in words when transformers cannot make a model of it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.errors import ArtifactError, CheckpointError, GhoststreamError, UnsupportedModelError
from ghoststream.files import read_json, system_error
from ghoststream.files.kinds import FOLDER, require_kind
from ghoststream.spans import MOST_LAYERS

CONFIG_NAME = "config.json"
GHOSTED = "ghosted_"
"""What a recovered model puts in front of the ``model_type`` of its base."""
_LAYERS = frozenset({"num_hidden_layers", "n_layer", "num_layers", "n_layers"})
_READ = re.compile(r"\b(?:config|self|cls)\.(\w+)")


def read_config(root: Path) -> dict[str, Any]:
    """Read the configuration of a checkpoint as it is written, and bound what is allocated by it.

    Raises:
        CheckpointError: If the file is missing, damaged, not an object, or names more layers than any model
            has.
        RequestError: If it may not be read, is not a regular file, or the folder is something else.
        MachineError: If reading fails.
    """
    path = root / CONFIG_NAME
    try:
        # transformers reads and writes infinite numbers there.
        data = read_json(path, finite=False)
    except FileNotFoundError as error:
        if root.is_dir():
            require_kind(root, FOLDER, "a model folder")
        msg = (
            f"{root} has no {CONFIG_NAME}: it is not a complete checkpoint folder; download or copy it again"
        )
        raise CheckpointError(msg) from error
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(data, dict):
        msg = f"{path} is not a JSON object: it is damaged; download or copy it again"
        raise CheckpointError(msg)
    for name, value in _entries(data):
        if name in _LAYERS and isinstance(value, int | float) and not value <= MOST_LAYERS:
            msg = (
                f"{path} says {name} {shorten(str(value), 40, placeholder='...')}, and no model has more "
                f"than {MOST_LAYERS:,} layers: it is damaged; download or copy it again"
            )
            raise CheckpointError(msg)
    return data


def plain_type(config: Any) -> str:
    """Return the ``model_type`` of a configuration, without what a recovered model puts in front of it."""
    return str(config.model_type).removeprefix(GHOSTED)


def require_layers(index: CheckpointIndex, layers_path: str, n_layers: int) -> None:
    """Check that a checkpoint has tensors of as many layers as its configuration says, before they are built.

    Args:
        index: The checkpoint.
        layers_path: Where the layers are in the model's decoder, such as ``layers``.
        n_layers: What the configuration says.

    Raises:
        CheckpointError: If it has fewer.
    """
    pattern = re.compile(rf"(?:^|\.){re.escape(layers_path)}\.(\d{{1,9}})\.")
    found = {int(match[1]) for name in index.tensors if (match := pattern.search(name)) is not None}
    if len(found) < n_layers:
        msg = (
            f"{index.root} holds {len(found)} decoder layers, its {CONFIG_NAME} says {n_layers}: they do not "
            "belong together"
        )
        raise CheckpointError(msg)


@contextmanager
def configured(root: Path, *, doing: str) -> Iterator[None]:
    """Turn whatever transformers raises about a model into an error that names its configuration.

    Validation, building and running of a model raise errors of any kind where a value does not fit.

    Args:
        root: The checkpoint folder.
        doing: What transformers cannot do, for the message.

    Raises:
        UnsupportedModelError: If it raises something that is neither ours nor the system's.
        MachineError: If memory or disk fail.
    """
    try:
        yield
    except GhoststreamError:
        raise
    except Exception as error:
        said = system_error(error, root, doing="read")
        if said is not None:
            raise said from error
        reason = shorten(f"{type(error).__name__}: {error}", 400, placeholder="...")
        field = _field(root, error)
        named = "" if field is None else f", first its field {field!r}"
        msg = (
            f"transformers cannot {doing} in {root} ({reason}); check its {CONFIG_NAME}{named}, or choose "
            "another --attention"
        )
        raise UnsupportedModelError(msg) from error


def _entries(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield every name and value of a configuration and of those inside it."""
    rest = [data]
    while rest:
        one = rest.pop()
        if isinstance(one, Mapping):
            yield from one.items()
            rest.extend(one.values())


def _field(root: Path, error: BaseException) -> str | None:
    """Return the field of the configuration that an error is about, if its words or its frames say so."""
    try:
        fields = read_config(root)
    except GhoststreamError:
        return None
    text = str(error)
    for name in fields:
        if len(name) > 3 and re.search(rf"\b{re.escape(name)}\b", text):
            return name
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/transformers/" not in frame.filename:
            continue
        found = [name for name in _READ.findall(frame.line or "") if name in fields]
        if found:
            return str(found[0])
    return None
