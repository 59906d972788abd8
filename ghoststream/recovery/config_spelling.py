"""The configuration of a recovered model in the words of its base, and in those of transformers 4.

transformers 5 reads ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` and writes ``rope_parameters`` and
``dtype`` in their place. transformers 4 and other readers know the former only, and compute with their own
defaults where these are missing. So both are written.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from ghoststream.recovery.config_surgery import carry_over
from ghoststream.spans import PruningPlan

_DTYPE, _ROPE = "dtype", "rope_parameters"
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Settings that some architectures name the one way in transformers 4 and the other way in 5.
_RENAMED = frozenset({"num_experts", "num_local_experts"})
# Architectures of transformers 4 that take a `type` and a `factor` and nothing else.
_TYPE_AND_FACTOR = frozenset({"olmo", "olmo2"})
# Entries of `rope_parameters` that had keys of their own.
_OWN_KEYS = frozenset({"rope_theta", "partial_rotary_factor"})


def spell_both_ways(
    written: Mapping[str, Any], base: Any, raw: Mapping[str, Any], plan: PruningPlan
) -> dict[str, Any]:
    """Add to a configuration what its base's file says in other words, and the words of transformers 4.

    What would change the meaning of ``written`` to the installed transformers is left out.

    Args:
        written: The configuration as the installed transformers writes it.
        base: The base's configuration as transformers read it.
        raw: The base's configuration as it is in its file.
        plan: Which layers were removed.

    Returns:
        ``written`` and what was added.
    """
    aliases = {alias: written[name] for alias, name in base.attribute_map.items() if name in written}
    own = carry_over(raw, base, plan) | {alias: value for alias, value in aliases.items() if alias in raw}
    older = _words_of_4(written, str(base.model_type))
    older |= {alias: value for alias, value in aliases.items() if alias in _RENAMED}
    for added in ({**older, **own}, own, older):
        both = {**added, **written}
        if _means_the_same(type(base), both, written):
            return both
    return dict(written)


def finite_form(data: Any) -> Any:
    """Return a configuration as JSON can hold it: infinite numbers in the way in which transformers does.

    transformers has this as a private method only.
    """
    if isinstance(data, float) and not math.isfinite(data):
        return {"__float__": "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"}
    if isinstance(data, Mapping):
        return {key: finite_form(value) for key, value in data.items()}
    return [finite_form(value) for value in data] if isinstance(data, list | tuple) else data


def without_usual_infinities(data: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """Leave out infinite numbers that are defaults: transformers 4 cannot read them as 5 writes them."""
    infinite = {key for key, value in data.items() if "__float__" in str(finite_form(value))}
    usual = config_class().to_dict() if infinite else {}
    return {
        key: value
        for key, value in data.items()
        if key not in infinite or finite_form(value) != finite_form(usual.get(key))
    }


def _words_of_4(written: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    dtype, rope = written.get(_DTYPE), written.get(_ROPE)
    words: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
    if not isinstance(rope, Mapping) or not rope:
        return words
    if _FULL in rope and _SLIDING in rope:
        full, sliding = rope[_FULL], rope[_SLIDING]
        if set(rope) != {_FULL, _SLIDING} or _scaling(sliding) is not None:
            return words
        if model_type.startswith("gemma3"):
            words["rope_local_base_freq"] = sliding["rope_theta"]
        elif sliding["rope_theta"] != full["rope_theta"]:
            return words
        rope = full
    if "rope_theta" not in rope:
        return words
    scaling = _scaling(rope)
    if scaling is not None and model_type in _TYPE_AND_FACTOR:
        scaling.pop("rope_type")
    words |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    if "partial_rotary_factor" in rope:
        words["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if model_type == "gpt_neox":
        words |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    return words


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    rest = {key: value for key, value in rope.items() if key not in _OWN_KEYS}
    kind = rest.get("rope_type", "default")
    return None if kind == "default" else {**rest, "type": kind}


def _means_the_same(config_class: Any, both: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Say whether transformers reads the same from both; reading changes what it is given."""
    try:
        found = config_class(**copy.deepcopy(dict(both))).to_dict()
    except (TypeError, ValueError, KeyError, AttributeError):
        return False
    wanted: dict[str, Any] = config_class(**copy.deepcopy(dict(written))).to_dict()
    ignored = ("type",)  # an older name of rope_type, which transformers 5 keeps beside it
    return all(_without(found.get(key), ignored) == _without(value, ignored) for key, value in wanted.items())


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return value
