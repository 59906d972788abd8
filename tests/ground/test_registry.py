from __future__ import annotations

import pytest

import ghoststream
from ghoststream.errors import RequestError
from ghoststream.registry import Registry

pytestmark = pytest.mark.unit


def test_entries_are_found_by_name_and_names_are_sorted() -> None:
    registry: Registry[list[int]] = Registry("list")
    first, second = [1], [1]
    registry.register("b", first)
    registry.register("a", second)
    assert registry.get("b") is first
    assert registry.get("a") is second
    assert registry.names() == ("a", "b")


@pytest.mark.parametrize(("kind", "named"), [("operator", "an operator"), ("token weight", "a token weight")])
def test_a_name_stays_with_the_entry_that_took_it(kind: str, named: str) -> None:
    registry: Registry[list[int]] = Registry(kind)
    entry, equal = [1], [1]
    registry.register("mine", entry)
    registry.register("mine", entry)
    with pytest.raises(
        RequestError, match=f"^{named} named 'mine' is registered already; choose another name$"
    ):
        registry.register("mine", equal)
    assert registry.get("mine") is entry


def test_the_package_lists_what_it_loads_late() -> None:
    assert set(dir(ghoststream)) == set(ghoststream.__all__)


def test_a_name_that_is_not_known_is_told_what_is() -> None:
    registry: Registry[int] = Registry("criterion")
    registry.register("b", 2)
    registry.register("a", 1)
    with pytest.raises(RequestError, match=r"^there is no criterion 'c'; known are a, b$"):
        registry.get("c")
    registry.register("streamline", 3)
    with pytest.raises(RequestError, match=r"known are a, b, streamline; did you mean streamline\?$"):
        registry.get("streamlin")
