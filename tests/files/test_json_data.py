"""JSON as its standard has it; what Python reads besides is refused with the reason."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.files import canonical_json, canonical_object, parse_json

pytestmark = pytest.mark.unit
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_json_can_hold_is_read_as_the_library_reads_it(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"a": 1, "b": {"x": 1, "x": 2}}', "key 'x' twice"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e400]", "1e400 is too large"),
        ("[" + "9" * 5000 + "]", "5,000 digits"),
        (b'"\xff"', "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_anything_else_is_a_value_error(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(text)


def test_infinite_numbers_are_read_where_they_are_meant() -> None:
    assert parse_json("[Infinity, 1e400]", finite=False) == [math.inf, math.inf]


@given(st.dictionaries(st.text(), VALUES))
def test_an_object_of_spelled_parts_is_spelled_as_a_whole(data: dict[str, object]) -> None:
    assert canonical_object({key: canonical_json(value) for key, value in data.items()}) == canonical_json(
        data
    )
