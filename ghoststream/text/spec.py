"""The text specification: how a user names calibration and evaluation text on the command line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ghoststream.errors import TextError
from ghoststream.registry import did_you_mean
from ghoststream.text.registry import text_source_names

NAMED_SETS = ("wikitext2", "ptb", "c4")
_FORMS = (
    "file:PATH, ids:FILE.npy, hf:NAME[:CONFIG]:SPLIT[:FIELD], wikitext2, ptb, c4 (each [:SPLIT]) or"
    " python-docs[:fit|:heldout]"
)
_USUAL_SPLITS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "all"})
# A colon inside brackets belongs to a slice such as train[:1%].
_COLON = re.compile(r":(?![^\[]*\])")


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A parsed text specification.

    Attributes:
        kind: What sort of source it is; ``named`` is one of ``wikitext2``, ``ptb``, ``c4``, ``registered``
            one of :mod:`ghoststream.text.registry`.
        source: The path, the dataset's name or folder, or the name of the set or the registered source.
        config: Configuration of an ``hf`` dataset.
        split: Split of an ``hf`` or named dataset; ``fit`` or ``heldout`` of ``python-docs``.
        field: Field of an ``hf`` dataset that holds the text.
        rest: What stands behind the name of a registered source.
    """

    kind: Literal["file", "ids", "hf", "named", "python-docs", "registered"]
    source: str
    config: str | None = None
    split: str | None = None
    field: str | None = None
    rest: str = ""

    @classmethod
    def parse(cls, text: str) -> TextSpec:
        """Read a specification as written on the command line.

        ``hf:`` with three parts is ambiguous; if the second is a usual split name (``train``, ``test[:10%]``,
        ...) it is the split and the third the field, otherwise they are configuration and split. An empty
        configuration (``hf:NAME::SPLIT:FIELD``) says that there is none.

        A ``~`` behind the first colon is the user's folder: shells expand it only where a word begins.

        Raises:
            TextError: If it has none of the known forms.
        """
        kind, _, rest = text.partition(":")
        rest = os.path.expanduser(rest)  # noqa: PTH111 - Path would drop a slash at the end
        if kind == "file" and rest:
            return cls("file", rest)
        if kind == "ids" and rest:
            return cls("ids", rest)
        if kind == "hf" and rest:
            return cls._parse_hf(text, rest)
        if kind in NAMED_SETS and (rest or text == kind):
            return cls("named", kind, split=rest or None)
        if kind == "python-docs" and (rest in {"fit", "heldout"} or text == kind):
            return cls("python-docs", kind, split=rest or None)
        others = text_source_names()
        if kind in others:
            return cls("registered", kind, rest=rest)
        own = f", or a source of an installed package: {', '.join(others)}" if others else ""
        kinds = ("file", "ids", "hf", "python-docs", *NAMED_SETS, *others)
        # A file without file: is like no name, whatever it is called.
        meant = "" if kind in kinds or Path(kind).suffix else did_you_mean(kind, kinds)
        msg = f"cannot read the text specification {text!r}; write {_FORMS}{own}{meant}"
        raise TextError(msg)

    @classmethod
    def _parse_hf(cls, text: str, rest: str) -> TextSpec:
        parts = _COLON.split(rest)
        match parts:
            case [name, split] if name and split:
                return cls("hf", name, split=split)
            case [name, split, field] if name and field and _is_usual_split(split):
                return cls("hf", name, split=split, field=field)
            case [name, config, split] if name and split:
                return cls("hf", name, config=config or None, split=split)
            case [name, config, split, field] if name and split and field:
                return cls("hf", name, config=config or None, split=split, field=field)
        msg = f"cannot read the text specification {text!r}; write hf:NAME[:CONFIG]:SPLIT[:FIELD]"
        raise TextError(msg)

    @property
    def identity(self) -> str:
        """The specification without folders, for recipes: the text's digest stands for the path."""
        if self.kind in {"file", "ids"} or (self.kind == "hf" and Path(self.source).exists()):
            return self._join(Path(self.source).name)
        if self.kind == "registered" and self.rest and Path(self.rest).exists():
            return f"{self.source}:{Path(self.rest).name}"
        return str(self)

    def __str__(self) -> str:
        return self._join(self.source)

    def _join(self, source: str) -> str:
        if self.kind in {"file", "ids"}:
            return f"{self.kind}:{source}"
        if self.kind == "hf":
            config = "" if self.config is None and self.field is None else f":{self.config or ''}"
            field = "" if self.field is None else f":{self.field}"
            return f"hf:{source}{config}:{self.split}{field}"
        if self.kind == "registered":
            return f"{source}:{self.rest}" if self.rest else source
        return source if self.split is None else f"{source}:{self.split}"


def _is_usual_split(text: str) -> bool:
    return text.partition("[")[0] in _USUAL_SPLITS
