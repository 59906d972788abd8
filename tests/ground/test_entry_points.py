"""What an installed package of a few lines adds, and what is said of one that is broken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from ghoststream.errors import RequestError
from ghoststream.registry import Registry
from ghoststream.testing.states import random_states, store_of
from tests.helpers.installed_package import install_package, with_packages

pytestmark = pytest.mark.integration

PACKAGE = """
import numpy as np
from ghoststream.operators import BoundaryOperator, OperatorKind
from ghoststream.selection import Choice, Criterion
from ghoststream.spans import Span
from ghoststream.statistics import Feature
from ghoststream.text import Document

class Halved(OperatorKind):
    def fit(self, moments):
        weight = np.full(moments.total().gap_sum.shape, -0.5, dtype=np.float32)
        return BoundaryOperator(moments.span, "diagonal", weight=weight)

class Second(Criterion):
    meaning = "the second layer goes"
    def choose(self, evidence, remove):
        return Choice.highest([(Span(layer, layer + 1), -abs(layer - 1.0)) for layer in range(4)], remove)

class Doubled(Feature):
    name = "doubled"
    def rows(self, states, facts):
        return 2.0 * states

class Thrice:
    name = "thrice"
    def values(self, tokens):
        return np.full(len(tokens.inputs), 3.0)

doubled, thrice = Doubled(), Thrice()

def count(rest, part):
    for number in range(int(rest or 2)):
        yield Document(f"{part} {number}", b"x", f"number {number}")
"""
ENTRY_POINTS = """
[ghoststream.operators]
halved = tiny:Halved
[ghoststream.criteria]
second = tiny:Second
[ghoststream.features]
doubled = tiny:doubled
misnamed = tiny:doubled
[ghoststream.token_weights]
thrice = tiny:thrice
[ghoststream.text_sources]
count = tiny:count
broken = tiny_that_is_not_there:count
"""
USE = """
import sys
import numpy as np
from ghoststream.errors import RequestError
from ghoststream.operators import make_operator, operator_names
from ghoststream.options import Method
from ghoststream.selection import criterion_names, make_criterion
from ghoststream.spans import Span
from ghoststream.statistics import get_feature, get_token_weight, reduce, store_ranges
from ghoststream.text import TextSpec, load_documents

assert "halved" in operator_names() and "second" in criterion_names()
assert "tiny" not in sys.modules, "names alone import nothing"
store = sys.argv[1]
kind = make_operator(Method(operator="halved", token_weights="thrice"))
moments = kind.reduce(store, [Span(1, 2)], store_ranges(store))[Span(1, 2)]
assert moments.total().weight == 3.0 * moments.total().n_tokens
assert (kind.fit(moments).apply(np.ones(5)) == 0.5).all()
assert make_criterion("second").choose(None, 1).chosen == (Span(1, 2),)
plain = Method(operator="least-squares", ridge=0.0)
wide, same = (make_operator(plain.model_copy(update={"features": name})) for name in ("doubled", "hidden"))
fits = [kind.fit(kind.reduce(store, [Span(1, 2)], store_ranges(store))[Span(1, 2)]) for kind in (wide, same)]
np.testing.assert_allclose(2.0 * fits[0].weight, fits[1].weight, rtol=1e-5)
spec = TextSpec.parse("count:3")
assert (str(spec), spec.identity) == ("count:3", "count:3")
assert [(one.place, one.text) for one in load_documents(spec, part="fit")] == [
    (f"fit {n}", f"number {n}") for n in range(3)
]
assert len(list(load_documents(TextSpec.parse("count")))) == 2
for ask, what in (
    (lambda: [*load_documents(TextSpec.parse("broken"))], "source 'broken' of the installed package tiny "),
    (lambda: get_feature("misnamed"), "package tiny calls itself 'doubled'"),
    (lambda: TextSpec.parse("counts:3"), "or a source of an installed package: broken, count"),
):
    try:
        ask()
    except RequestError as error:
        assert what in str(error), error
        print(error)
    else:
        raise AssertionError(what)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder like ``site-packages``, with the package and what its installer would have written."""
    return install_package(tmp_path, "tiny", PACKAGE, ENTRY_POINTS)


def test_an_installed_package_adds_one_of_each(installed: Path) -> None:
    store = store_of(installed / "store", random_states(4, (6, 8, 5)))
    done = subprocess.run(
        [sys.executable, "-c", USE, store],
        env=with_packages(installed),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(tiny_that_is_not_there:count) cannot be imported: ModuleNotFoundError(" in done.stdout
    assert "correct, update or uninstall that package" in done.stdout


def offering(monkeypatch: pytest.MonkeyPatch, points: Sequence[EntryPoint]) -> Registry[object]:
    monkeypatch.setattr("ghoststream.registry.entry_points", lambda *, group: tuple(points))
    return Registry("thing", group="ghoststream.things")


def test_two_packages_cannot_give_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("it", value, "ghoststream.things") for value in ("numpy:pi", "numpy:e")]
    registry = offering(monkeypatch, points)
    assert registry.names() == ("it",)
    with pytest.raises(RequestError, match=r"the thing 'it' is in several packages: .*uninstall all but one"):
        registry.get("it")


def test_what_is_registered_comes_first_and_what_is_loaded_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = offering(monkeypatch, [EntryPoint("it", "numpy:pi", "ghoststream.things")])
    assert registry.get("it") is registry.get("it") is np.pi
    other = offering(monkeypatch, [EntryPoint("it", "numpy:pi", "ghoststream.things")])
    other.register("it", "mine")
    assert other.get("it") == "mine"
