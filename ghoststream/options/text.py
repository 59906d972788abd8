"""Options of a text, and of where hidden states come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ghoststream.errors import RequestError
from ghoststream.option_types import OR_SPEC, SPEC_FORMS, Count, Length, Options, one_or_several, option

Bos = Literal["auto", "always", "never", "stream"]
TextPart = Literal["all", "fit", "heldout"]


class Text(Options):
    """Which token windows are cut from which text, or from several texts.

    Two defaults depend on the role of the text: :meth:`to_calibrate` and :meth:`to_evaluate`.
    """

    title: ClassVar[str] = "Text"

    spec: Annotated[str | tuple[str, ...], BeforeValidator(one_or_several)] = option(
        ...,
        f"file:PATH, ids:FILE.npy, wikitext2, c4, hf:NAME ...\nIn full: {SPEC_FORMS}, or NAME[:REST] of an "
        "installed package. To calibrate, several: each gives its share of the windows, and they take turns.",
    )
    sequences: Count | None = option(
        None, "Windows of text. Default: 128 to calibrate, all to evaluate.", usual=True, metavar="S"
    )
    length: Length = option(512, "Tokens of a window.", usual=True, metavar="T")
    pack: bool = option(
        True,
        "Join documents into full windows, or one document a window.\nWindows of one document are as long as "
        "the longest one, at most --length.",
    )
    bos: Bos = option(
        "auto",
        "Whether windows begin with the begin-of-text token: auto, always, never or stream.\nauto: each does "
        "where the tokenizer puts it in front of a text. always: each does. never: none does. stream: the "
        "first one does, as where a whole text is tokenised at once.",
    )
    part: TextPart | None = option(
        None, "Part of a text with a standard split. Default: fit to calibrate, heldout to evaluate."
    )

    @model_validator(mode="after")
    def _one_stream(self) -> Self:
        if self.bos == "stream" and not self.pack:
            msg = "--bos stream joins documents, and --no-pack does not; use --bos auto"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _enough_for_each(self) -> Self:
        n_texts, wanted = len(self.specs), self.to_calibrate().sequences or 0
        if n_texts > 1 and wanted < n_texts:
            msg = f"{n_texts} texts cannot share {wanted} windows; give --sequences {n_texts} or more"
            raise ValueError(msg)
        return self

    @classmethod
    def of(cls, text: TextLike) -> Text:
        """Return the text of a specification or of several, or the text itself.

        Raises:
            RequestError: If there is no specification.
        """
        if isinstance(text, Text):
            return text
        given: object = text
        if not isinstance(given, Sequence):
            msg = (
                "a text is given by a specification such as 'file:PATH', by several of them, or by "
                f"Text(spec=...), and not by {'None' if given is None else type(given).__name__}"
            )
            raise RequestError(msg)
        return cls.make({"spec": text})

    @property
    def specs(self) -> tuple[str, ...]:
        """The specifications: mostly one."""
        return (self.spec,) if isinstance(self.spec, str) else self.spec

    def to_calibrate(self) -> Text:
        """Return the text with the defaults of one that is calibrated on."""
        return self._with(128 if self.sequences is None else self.sequences, self.part or "fit")

    def to_evaluate(self) -> Text:
        """Return the text with the defaults of one that is measured on.

        Raises:
            RequestError: If it is several texts.
        """
        one_text(self)
        return self._with(self.sequences, self.part or "heldout")

    def _with(self, sequences: int | None, part: TextPart) -> Text:
        return self.model_copy(update={"sequences": sequences, "part": part})


TextLike = Text | str | Sequence[str]
"""A text, or its specification alone; to calibrate on, several specifications too."""


def one_text(text: Text | None) -> Text | None:
    """Check that a text is one, since figures are of one.

    Raises:
        RequestError: If it is several.
    """
    if text is not None and len(text.specs) > 1:
        found = f"{', '.join(text.specs)} are {len(text.specs)} texts"
        msg = f"{found}, and figures are of one; measure on each by itself"
        raise RequestError(msg)
    return text


class Source(Options):
    """Where hidden states come from: an activation store, or a model that is run over a text.

    With a store, ``model`` is what it was captured from, for those criteria and operators that read its
    weights too.
    """

    model: str | Path | None = Field(default=None, description="Checkpoint folder or hub id.")
    store: str | Path | None = Field(default=None, description="Activation store.")
    calibration: Annotated[Text | None, OR_SPEC] = Field(default=None, description="Text to calibrate on.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.store is None) == (self.calibration is None):
            both = self.store is not None
            msg = "give --store, or --model and --calibration" + (", not both" if both else "")
            raise ValueError(msg)
        if self.calibration is not None and self.model is None:
            msg = "--calibration needs the --model that is run over it"
            raise ValueError(msg)
        return self
