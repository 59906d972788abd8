"""Loading an adapter with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint, require_undamaged
from ghoststream.checkpoint.hub import resolve_checkpoint
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.errors import MismatchError, RequestError
from ghoststream.recovery import load_recovered
from ghoststream.recovery.names import is_adapter


def load(base: str | Path, adapter: str | Path, *, revision: str | None = None, **options: Any) -> Any:
    """Load the recovered model of a base and an adapter, with transformers.

    Its weights are those of the form ``custom`` to the bit. Those that are not in the adapter are mapped from
    the files of the base; removed layers are not read.

    Args:
        base: Folder or hub id of the model that the adapter was made of.
        adapter: Folder that ``--form adapter`` wrote.
        revision: Branch, tag or commit of a base on the hub.
        **options: What ``from_pretrained`` takes: ``dtype``, ``device_map``, ``attn_implementation`` ...

    Returns:
        The model, in evaluation mode.

    Raises:
        RequestError: If ``adapter`` is no adapter.
        MismatchError: If it was made of another model.
        CheckpointError: If the base changed since then.
        ArtifactError: If the adapter is damaged.
        GhoststreamError: What finding the base raises.

    Memory: the model that is left, once.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(adapter)
    info = load_recovered(folder) if is_adapter(folder) else None
    if info is None:
        msg = f"{folder} is no adapter; give a folder that --form adapter wrote"
        raise RequestError(msg)
    root = resolve_checkpoint(base, revision=revision).root
    index = CheckpointIndex.open(root)
    found = checkpoint_fingerprint(root, index)
    if found["digest"] != info.base["digest"]:
        require_undamaged(info.base, found, index, f"{folder} was made of it")
        msg = f"{folder} was made of another model than {base}; give the one that it was made of"
        raise MismatchError(msg)
    return AutoModelForCausalLM.from_pretrained(folder, base=str(root), **options)
