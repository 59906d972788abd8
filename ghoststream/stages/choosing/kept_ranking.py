"""Similarities of the states around every span, found in one pass and kept until the result is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ghoststream.files import read_kept, read_sealed_json, write_sealed_json
from ghoststream.spans import Span
from ghoststream.stages.choosing.ranking import Similarity, rank_spans
from ghoststream.stages.choosing.rounds import RANKED_WINDOWS
from ghoststream.stages.choosing.stream_norms import StreamNorms
from ghoststream.stages.choosing.trial import Trial
from ghoststream.streaming import Runs


@dataclass(frozen=True)
class Ranking:
    """What a pass of the dense model says of every span.

    Attributes:
        spans: The spans of some lengths, and how alike the states around them are.
        norms: How large the dense model's hidden states are, as JSON data.
        runs: What was computed for it.
    """

    spans: Mapping[Span, Similarity]
    norms: Mapping[str, Any]
    runs: Runs

    @classmethod
    def make(cls, trial: Trial, sizes: Sequence[int], title: str) -> Ranking:
        """Rank the spans of some lengths, or return what an earlier attempt at the same result has found.

        Args:
            trial: Whose model and text they are of.
            sizes: The lengths.
            title: What is said before they are ranked.

        Raises:
            CheckpointError: If the model is not what it was then.
            NumericsError: If a state is not finite.
            BudgetError: If two layers and a micro-batch do not fit the memory given.

        Memory: that of :func:`~ghoststream.stages.choosing.ranking.rank_spans`.
        """
        place = trial.kept("ranking")
        found = None if place is None else read_kept(_read, place)
        if found is not None:
            ranking, base = found
            trial.session.expect(base, f"{place} was written")
            return ranking
        session = trial.session
        before = session.skeleton.runs
        tokens = trial.tokens.take(range(min(RANKED_WINDOWS, trial.tokens.n_sequences)))
        lengths = ", ".join(map(str, sizes))
        layers = f"{lengths} layer{'' if lengths == '1' else 's'}"
        trial.progress.log(f"{title} of {layers} by similarity on {tokens.n_sequences} windows")
        norms = StreamNorms(torch.from_numpy(tokens.mask))
        spans = rank_spans(
            session,
            tokens,
            sizes,
            micro_batch=trial.division.micro_batch,
            progress=trial.progress,
            beside=(norms,),
        )
        ranking = cls(spans, norms.to_json(), session.skeleton.runs - before)
        if place is not None:
            last = max(1, session.skeleton.n_layers - 1)
            write_sealed_json(place, ranking._to_json(session.base(last, trial.progress)))
        return ranking

    def _to_json(self, base: Mapping[str, Any]) -> dict[str, Any]:
        rows = [[span.start, span.stop, asdict(similarity)] for span, similarity in self.spans.items()]
        return {"spans": rows, "norms": dict(self.norms), "runs": asdict(self.runs), "base": dict(base)}


def _read(path: Path) -> tuple[Ranking, dict[str, Any]]:
    data = read_sealed_json(path)
    spans = {Span(start, stop): Similarity(**figures) for start, stop, figures in data["spans"]}
    return Ranking(spans, dict(data["norms"]), Runs(**data["runs"])), dict(data["base"])
