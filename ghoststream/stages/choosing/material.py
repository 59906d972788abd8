"""What repairs are fitted and measured on: a model, and a text that is divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ghoststream.options import Search, Text
from ghoststream.progress import Progress
from ghoststream.stages.choosing.division import divided, require_each_text
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import Ranges
from ghoststream.text import TokenSet, recipe_of

_FEW = 8
"""Windows below which standard errors are as large as the differences between plans."""


@dataclass(frozen=True)
class Division:
    """The sequences to fit on, in whole micro-batches, and the rest, to measure on.

    Attributes:
        micro_batch: Sequences in one forward.
        fitting: How those to fit on are divided; None if nothing is fitted: all are measured on.
        across_texts: Whether all windows that are measured on count, or those of the worst text.
    """

    micro_batch: int
    fitting: Ranges | None
    across_texts: str = "mean"

    @classmethod
    def make(cls, session: ModelSession, tokens: TokenSet, search: Search, *, fits: bool = True) -> Division:
        """Divide the sequences of a text; by default a quarter is held out.

        Raises:
            RequestError: If one of the two parts would be empty, or texts are to be compared and there is
                one, or one has no window to measure on.
        """
        across = search.across_texts
        if not fits:
            require_each_text(across, tokens.n_texts, tokens.n_sequences)
            return cls(session.micro_batch(tokens.length), None, across)
        micro_batch, n_fit = divided(
            tokens.n_sequences,
            search.held_out,
            session.compute.micro_batch,
            session.memory(tokens.length).choose_micro_batch,
        )
        require_each_text(across, tokens.n_texts, tokens.n_sequences - n_fit)
        return cls(micro_batch, Ranges.make(n_fit, folds=search.folds, turn=tokens.n_texts), across)

    def to_json(self) -> dict[str, Any]:
        """Return what of it can change a bit, for recipes."""
        return {
            "micro_batch": self.micro_batch,
            "fit_sequences": 0 if self.fitting is None else self.fitting.n_sequences,
            "folds": 1 if self.fitting is None else self.fitting.n_folds,
            **({} if self.across_texts == "mean" else {"across_texts": self.across_texts}),
        }


@dataclass(frozen=True)
class Material:
    """A model, and a divided text.

    Attributes:
        session: The model.
        text: Where the text comes from.
        tokens: Its windows.
        division: Which windows serve to fit, and which to measure.
        folds: Folds that a fit on all windows is asked for.
        progress: Who is told how far work on it is.
    """

    session: ModelSession
    text: Text
    tokens: TokenSet
    division: Division
    folds: int
    progress: Progress

    @classmethod
    def read(
        cls, session: ModelSession, text: Text, search: Search, progress: Progress, *, fits: bool = True
    ) -> Material:
        """Read a text and divide it, with nothing to fit on unless ``fits``.

        Raises:
            InputNotFoundError, TextError: If it cannot be read or gives too little.
            RequestError: If it cannot be divided so; see :meth:`Division.make`.
        """
        tokens = session.tokens(text, progress)
        division = Division.make(session, tokens, search, fits=fits)
        n_held = tokens.n_sequences - (0 if division.fitting is None else division.fitting.n_sequences)
        if n_held < _FEW:
            progress.log(f"note: {n_held} windows to measure on decide little; give more --sequences")
        return cls(session, text, tokens, division, search.folds, progress)

    def to_json(self) -> dict[str, Any]:
        """Return what of it can change a bit, for recipes."""
        return {
            "model": self.session.fingerprint["digest"],
            "text": recipe_of(self.text, self.tokens).to_json(),
            "tokens": self.tokens.digest,
            **self.session.describe(),
            **self.division.to_json(),
        }
