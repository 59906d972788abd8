"""Pipeline files: a :class:`~ghoststream.options.Recovery` written down in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.option_types import Options
from ghoststream.options import Recovery


class _Loader(yaml.SafeLoader):
    """Reads YAML; numbers to the base of 60, which nobody means, are refused."""

    def refuse_base_60(self, node: yaml.ScalarNode) -> Any:
        """Return a number, unless it is what YAML 1.1 makes of ``13:19``."""
        if ":" in node.value:
            msg = (
                f"line {node.start_mark.line + 1}: YAML reads {node.value} as a number to the base of 60; "
                f'quote it: "{node.value}"'
            )
            raise yaml.YAMLError(msg)
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.refuse_base_60)


def load_pipeline(path: Path) -> Recovery:
    """Read and check a pipeline file.

    Raises:
        InputNotFoundError: If there is no such file.
        RequestError: If it is not YAML, or a field is missing, unknown or out of range.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
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


def with_runtime(recovery: Recovery, model: str | None, **groups: Options) -> Recovery:
    """Return a recovery; what the command line says of model and machine takes the place of the file's.

    Args:
        recovery: What the file says.
        model: Checkpoint folder or hub id; the file's if ``None``.
        **groups: Groups of the recovery, by field, of which what was given counts.
    """
    changes: dict[str, Any] = {} if model is None else {"model": model}
    for name, group in groups.items():
        given = {field: getattr(group, field) for field in group.given()}
        if given:
            changes[name] = getattr(recovery, name).model_copy(update=given)
    return recovery.model_copy(update=changes)
