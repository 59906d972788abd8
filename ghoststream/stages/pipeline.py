"""Pipeline files: a :class:`~ghoststream.options.Recovery` written down in YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from ghoststream.errors import GhoststreamError, InputNotFoundError, RequestError
from ghoststream.files import read_input
from ghoststream.option_types import Options
from ghoststream.options import Recovery


class _Loader(yaml.SafeLoader):
    """Reads YAML in which a mapping has each key once; numbers to the base of 60 are refused."""

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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        """Return a mapping.

        Raises:
            ConstructorError: If a key stands in it twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"it holds {key.value!r} twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.refuse_base_60)


def load_pipeline(path: Path, changes: Sequence[str] = ()) -> Recovery:
    """Read and check a pipeline file.

    Args:
        path: The file.
        changes: What takes the place of its fields, such as ``"calibration.sequences=64"``; values are YAML.

    Raises:
        RequestError: If a field is missing, unknown or out of range; or a change is not of this form.
        GhoststreamError: What :func:`read_fields` raises.
    """
    data = read_fields(path, "pipeline", "pipelines/README.md")
    for change in changes:
        _set(data, change)
    return Recovery.make({"name": path.stem, **data}, where=f"{path} is not a pipeline")


def read_fields(path: Path, kind: str, page: str) -> dict[str, Any]:
    """Read the fields of a YAML file.

    Args:
        path: The file.
        kind: What it is, for messages.
        page: Where that is described.

    Raises:
        InputNotFoundError: If there is no such file.
        RequestError: If it may not be read, is not YAML, holds a field twice, or no fields.
        MachineError: If reading fails.
    """
    try:
        data = yaml.load(read_input(path).decode(), _Loader)
    except InputNotFoundError as error:
        msg = f"there is no {kind} file {path}; check the path"
        raise InputNotFoundError(msg) from error
    except GhoststreamError:
        raise
    except RecursionError as error:
        msg = f"{path} is not a {kind}: it is nested too deeply; see {page}"
        raise RequestError(msg) from error
    # The parser raises more than its own kind: of dates, numbers, bytes and depth that it cannot read.
    except Exception as error:
        msg = f"{path} is not YAML: {shorten(str(error), 400, placeholder='...')}"
        raise RequestError(msg) from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        msg = f"{path} is not a {kind}: it holds no fields; see {page}"
        raise RequestError(msg)
    return data


def _set(data: dict[str, Any], change: str) -> None:
    """Change one field of what a file says."""
    name, equals, text = change.partition("=")
    *groups, field = name.split(".")
    if not equals or not all((*groups, field)):
        msg = f"--set {change} is not of the form FIELD=VALUE, such as calibration.sequences=64"
        raise RequestError(msg)
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        msg = f"--set {change}: the value is not YAML: {shorten(str(error), 200, placeholder='...')}"
        raise RequestError(msg) from error
    for group in groups:
        data[group] = _as_fields(data.get(group))
        data = data[group]
    data[field] = value


def _as_fields(group: Any) -> dict[Any, Any]:
    """Return a group of a file by its fields, whose short form may stand there."""
    if isinstance(group, dict):
        return dict(group)
    if group is None or isinstance(group, bool):
        return {}
    # A number stands for the steps of a training, anything else for the specification of a text.
    return {"steps" if isinstance(group, int) else "spec": group}


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
