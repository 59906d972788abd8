"""The text that every Python ships: cleaned, and split so that nothing leaks."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from ghoststream.errors import TextError
from ghoststream.text import TextSpec, load_documents, python_docs

pytestmark = pytest.mark.unit
SHARED = "This paragraph is long enough to be told from the others by its words alone."
OTHER = "Another paragraph, just as long, that only one of the topics has, for good reasons."
THIRD = "A third paragraph, as long as the two others, with which it has nothing in common."


def paragraphs(part: str) -> set[str]:
    texts = [document.text or "" for document in load_documents(TextSpec.parse(f"python-docs:{part}"))]
    return {" ".join(block.split()) for text in texts for block in text.split("\n\n") if len(block) > 70}


def test_no_paragraph_is_in_both_parts() -> None:
    fit, heldout = paragraphs("fit"), paragraphs("heldout")
    assert fit.isdisjoint(heldout)
    assert len(fit) > len(heldout) > 50


def test_parts_make_up_the_whole() -> None:
    spec = TextSpec.parse("python-docs")
    places = {
        part: [document.place for document in load_documents(spec, part=part)]
        for part in ("all", "fit", "heldout")
    }
    assert sorted(places["all"]) == sorted(places["fit"] + places["heldout"])
    assert len(set(places["all"])) == len(places["all"])


def test_a_part_in_the_specification_comes_first() -> None:
    named = [document.place for document in load_documents(TextSpec.parse("python-docs:heldout"), part="fit")]
    assert named == [
        document.place for document in load_documents(TextSpec.parse("python-docs"), part="heldout")
    ]


def test_topics_are_clean() -> None:
    for document in load_documents(TextSpec.parse("python-docs")):
        assert document.text is not None
        assert not any(line and set(line) <= set("*=") for line in document.text.split("\n"))
        assert "\n\n\n" not in document.text
        assert document.text.endswith("\n\n")
        assert document.raw == document.text.encode()


def test_topics_within_others_are_left_out_and_sharing_ones_grouped() -> None:
    topics = {
        "whole": f"{SHARED}\n\n{OTHER}",
        "within": SHARED,
        "apart": THIRD,
        "twin": f"{OTHER}\n\n{THIRD} And so on, differently.",
        "short": "tiny",
    }
    assert python_docs.group_topics(topics) == {
        "apart": "apart",
        "twin": "twin",
        "whole": "twin",
        "short": "short",
    }


def test_chains_of_shared_paragraphs_make_one_group() -> None:
    topics = {"a": f"{SHARED}\n\n{OTHER}", "b": f"{OTHER}\n\n{THIRD}", "c": f"{THIRD}\n\n{SHARED.upper()}"}
    assert set(python_docs.group_topics(topics).values()) == {"a"}


def test_of_two_equal_topics_one_is_left() -> None:
    assert set(python_docs.group_topics({"a": SHARED, "b": SHARED})) == {"b"}


def test_cleaning() -> None:
    text = "Title\n*****\n\n\n\nSome text   \n\n   code = 1\n\nSection\n=======\n\nx ** y\n"
    assert python_docs.clean(text) == "Title\n\nSome text\n\n   code = 1\n\nSection\n\nx ** y\n\n"


def test_the_share_held_out_is_as_stated() -> None:
    parts = [python_docs.part_of(f"topic {number}") for number in range(4000)]
    assert parts.count("heldout") / 4000 == pytest.approx(python_docs.HELDOUT_SHARE, abs=0.03)


def test_a_python_without_topics_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TextError, match="ships without its help topics"):
        list(load_documents(TextSpec.parse("python-docs")))


def test_topics_come_from_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", SimpleNamespace(topics={"only": "One topic.\n"}))
    (document,) = load_documents(TextSpec.parse("python-docs"))
    assert document.text == "One topic.\n\n"
    assert document.place == "topic only"
