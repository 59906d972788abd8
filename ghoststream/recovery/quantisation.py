"""What a pruned model says about its quantised weights.

Layers that are left stay as they were released, so the released ``quantization_config`` holds for them. It
names modules that are not quantised, some by the number of their layer, and what an export adds or changes is
not quantised either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ghoststream.errors import UnsupportedModelError
from ghoststream.spans import PruningPlan

QUANTISATION = "quantization_config"
"""The field of a configuration."""

# Where a method lists modules that are not quantised; the first of a row is written where none is there.
_LISTS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "fp8": ("modules_to_not_convert", "ignored_layers"),
        "mxfp4": ("modules_to_not_convert",),
        "compressed-tensors": ("ignore",),
    }
)


def pruned_quantisation(said: Mapping[str, Any], layers: str, plan: PruningPlan) -> dict[str, Any]:
    """Return a ``quantization_config`` for the layers that are left.

    Args:
        said: That of the base.
        layers: Where the layers are in the model's decoder, such as ``layers``.
        plan: Which layers are removed.

    Raises:
        UnsupportedModelError: If a pattern in it names layers by their numbers.
    """
    found = dict(said)
    for key in _LISTS[said["quant_method"]]:
        if said.get(key) is not None:
            found[key] = _renumbered(said[key], layers, plan)
    if "config_groups" in said:
        found["config_groups"] = {
            name: {**group, "targets": _renumbered(group["targets"], layers, plan)}
            for name, group in (said["config_groups"] or {}).items()
        }
    return found


def with_plain_modules(said: Mapping[str, Any], modules: Iterable[str], *, head: str) -> dict[str, Any]:
    """Return a ``quantization_config`` in which more modules are not quantised.

    Args:
        said: What it says so far.
        modules: Their paths in the model.
        head: Path of the output head: without a list of their own, some methods leave it out, and with one
            they do not.
    """
    modules = sorted(modules)
    if not modules:
        return dict(said)
    keys = _LISTS[said["quant_method"]]
    key = next((key for key in keys if said.get(key) is not None), keys[0])
    listed = said.get(key)
    if listed is None:
        listed = [] if key == "ignore" else [head]
    return {**said, key: [*listed, *(name for name in modules if name not in listed)]}


def _renumbered(names: Sequence[str], layers: str, plan: PruningPlan) -> list[str]:
    numbered = re.compile(rf"(?P<before>(?:^|\.){re.escape(layers)}\.)(?P<number>\d+)(?P<after>\.[\w.]*)?")
    pattern = re.compile(rf"{re.escape(layers)}\\?\.[\[(]*\d")
    found: list[str] = []
    for name in names:
        match = (
            None if name.startswith("re:") else re.fullmatch(rf"(?P<path>[\w.]*?){numbered.pattern}", name)
        )
        if match is None:
            if pattern.search(name):
                msg = (
                    f"{QUANTISATION} says {name!r}, a pattern with the numbers of layers, which cannot be "
                    "said for the layers that are left; write the names of modules there, without patterns"
                )
                raise UnsupportedModelError(msg)
            found.append(name)
        elif int(match["number"]) in plan.kept:
            number = plan.kept.index(int(match["number"]))
            found.append(f"{match['path']}{match['before']}{number}{match['after'] or ''}")
    return found
