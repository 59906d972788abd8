"""Numbers that no text gives and no machine holds are refused where options are made, in every group."""

from __future__ import annotations

from typing import Any

import pytest

from ghoststream.errors import RequestError
from ghoststream.option_types import Options, parse_layers
from ghoststream.options import Compute, Method, Reduction, Search, Storage, Text, Training

pytestmark = pytest.mark.unit
GROUPS = (Text, Method, Search, Compute, Reduction, Storage, Training)
NEEDED: dict[type[Options], dict[str, Any]] = {Text: {"spec": "file:a.txt"}}
# Where a number starts a generator or counts bytes, all that fit 63 bits can be meant.
OF_ANY_SIZE = {"seed", "device_memory", "host_memory", "memory"}


def takes_numbers(group: type[Options], name: str) -> bool:
    try:
        value = getattr(group.make({**NEEDED.get(group, {}), name: 3}), name)
    except RequestError:
        return False
    return type(value) is int and name != "scheduler"


NUMBERS = [(group, name) for group in GROUPS for name in group.model_fields if takes_numbers(group, name)]


def test_numbers_are_found() -> None:
    assert {(Text, "length"), (Text, "sequences"), (Method, "rank"), (Search, "lanes")} < set(NUMBERS)


@pytest.mark.parametrize(("group", "name"), NUMBERS)
def test_impossible_numbers_are_refused_by_name(group: type[Options], name: str) -> None:
    least = 2**63 if name in OF_ANY_SIZE else 2**31
    for number in (least, 10**30, 10**5000, -1):
        with pytest.raises(RequestError, match=f"^{name}: "):
            group.make({**NEEDED.get(group, {}), name: number})


def test_ranges_of_layers_are_all_meant() -> None:
    assert parse_layers("0,10:12,30") == (0, 10, 11, 30)
    for value in ("0,30:20", "2,8:8", "5:4", ""):
        with pytest.raises(ValueError, match="names no layer"):
            parse_layers(value)
