"""Passes that measure repairs on held-out text.

Their figures are kept beside the result until that is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghoststream.files import read_kept, read_sealed_json, write_sealed_json
from ghoststream.stages.choosing.auto import choose_methods, preference
from ghoststream.stages.choosing.material import Material
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.rounds import SampleShare, share_of_positions
from ghoststream.stages.choosing.shares import Measuring, measure_shares
from ghoststream.stages.choosing.ways import EVERY, Ways
from ghoststream.stages.output import Output
from ghoststream.stages.workers import Workers
from ghoststream.statistics import Ranges
from ghoststream.streaming import Runs
from ghoststream.text import TokenSet

Row = Mapping[str, Any]
Ranked = Sequence[tuple[Repair, Row]]
"""Repairs and their figures, best first."""


@dataclass(frozen=True)
class Sample:
    """A part of a divided text: its first sequences to fit on, and its first to measure on, whole batches.

    Of each sequence to measure on, ``positions`` is the share of the predictions whose losses are taken.
    """

    n_fit: int
    n_held: int
    positions: float = 1.0

    @property
    def is_of_all_positions(self) -> bool:
        """Whether the losses of all predictions are taken."""
        return self.positions == 1.0

    def __str__(self) -> str:
        positions = "" if self.is_of_all_positions else f", at {self.positions:.0%} of their positions"
        return f"fitted on {self.n_fit} windows and measured on {self.n_held}{positions}"


_CANDIDATES = "candidates"


class Trial:
    """Measures repairs in passes over a model; one that was measured before is not measured again.

    Args:
        material: The model and the text.
        lanes: Most repairs in one pass; all if ``None``.
        output: The result that the figures are for; they are kept beside it. Not kept if ``None``.
        residuals: Whether figures say what each operator leaves of its gap.
        crew: Workers that take candidates; the passes are run here if ``None``.
        ways: The ways to repair that ``auto`` tries.

    Attributes:
        passes: Passes over the weights that it took.
        runs: What was computed in them.
        details: What a criterion saw beside the figures, as JSON data for the plan file.
    """

    def __init__(
        self,
        material: Material,
        *,
        lanes: int | None,
        output: Output | None,
        residuals: bool = False,
        crew: Workers | None = None,
        ways: Ways = EVERY,
    ) -> None:
        self._crew, self.ways = crew, ways
        self.session, self.tokens = material.session, material.tokens
        self.division, self.progress = material.division, material.progress
        self._lanes, self._output, self._residuals = lanes, output, residuals
        self._dense_loss: float | None = None
        self._rows: dict[str, Row] = {}
        self._asked: set[str] = set()
        self.passes, self.runs = 0, Runs()
        self.details: dict[str, Any] = {}
        self._load()

    @property
    def dense_loss(self) -> float | None:
        """Loss of the dense model on the sequences that are measured on; None before the first pass."""
        return self._dense_loss

    def rows(self) -> list[Row]:
        """Return all figures so far, best first."""
        return sorted(self._rows.values(), key=preference)

    def sample(self, share: SampleShare) -> Sample:
        """Return a part of the sequences, in whole micro-batches; see :class:`SampleShare`."""
        fitting, batch = self.division.fitting, self.division.micro_batch
        n_fit = 0 if fitting is None else fitting.n_sequences
        n_held = self.tokens.n_sequences - n_fit
        hidden, length = self.session.skeleton.hidden_size, self.tokens.length
        wanted = share.of(n_fit, n_held, hidden=hidden, length=length, n_texts=self.tokens.n_texts)
        # The last micro-batch of those that are held out may be a short one.
        fit, held = (min(n, -(-w // batch) * batch) for n, w in zip((n_fit, n_held), wanted, strict=True))
        return Sample(fit, held, 1.0 if share.every_position else self._positions())

    def _positions(self) -> float:
        skeleton = self.session.skeleton
        shapes = (shape for layer in range(skeleton.n_layers) for shape in skeleton.layer_shapes(layer))
        return share_of_positions(sum(map(math.prod, shapes)), skeleton.vocab_size * skeleton.hidden_size)

    def measure(self, repairs: Sequence[Repair], sample: Sample | None = None) -> list[Row]:
        """Return the figures of repairs, in their order; on all sequences, or on a sample of them."""
        size = self._lanes or max(1, len(repairs))
        names = {repair.key: _key(repair, sample) for repair in repairs}
        # As many as an undisturbed search takes, whatever was measured before.
        self.passes += -(-len(set(names.values()) - self._asked) // size)
        self._asked |= set(names.values())
        waiting = [repair for repair in repairs if names[repair.key] not in self._rows]
        for first in range(0, len(waiting), size):
            self._pass(waiting[first : first + size], sample)
        return [self._rows[names[repair.key]] for repair in repairs]

    def rank(self, repairs: Sequence[Repair], sample: Sample | None = None) -> list[tuple[Repair, Row]]:
        """Return repairs and their figures, best first; measured as by :meth:`measure`."""
        rows = self.measure(repairs, sample)
        return sorted(zip(repairs, rows, strict=True), key=lambda pair: preference(pair[1]))

    def round(self, title: str, repairs: Iterable[Repair], sample: Sample) -> Ranked:
        """Say what is measured, measure each repair once, and return them best first."""
        own = list({repair.key: repair for repair in repairs}.values())
        self.progress.log(f"{title}: {len(own)} candidates, {sample}")
        return self.rank(own, sample)

    def refine(self, repairs: Sequence[Repair]) -> list[tuple[Repair, Row]]:
        """Choose how each boundary is fitted; return the repairs with the methods that won, best first."""
        return self.rank(choose_methods(self.session, repairs, self.measure, ways=self.ways))

    def tell(self, repair: Repair, row: Row) -> None:
        """Say how far the search is."""
        by_text = ", ".join(map(_shown, row.get("gaps_by_text", ())))
        found = f"loss {row['gap']:+.4f} nats a token against the dense model"
        self.progress.log(f"best so far: {repair.plan}, {found}{by_text and f' (by text {by_text})'}")

    def _pass(self, repairs: Sequence[Repair], sample: Sample | None) -> None:
        self.progress.log(f"repairing and measuring {len(repairs)} candidates in one pass")
        measuring = Measuring(
            *self._part(sample),
            self.division.micro_batch,
            1.0 if sample is None else sample.positions,
            self._residuals,
        )
        if self._crew is None:
            dense, candidates, runs = measuring.of(self.session, repairs, self.progress)
        else:
            dense, candidates, runs = measure_shares(
                self._crew, self.session, measuring, repairs, self.progress
            )
        self.runs += runs
        self._dense_loss = dense.loss
        across = self.division.across_texts
        self._rows |= {_key(one.repair, sample): one.to_json(across) for one in candidates}
        notes = self.kept(_CANDIDATES)
        if self._output is not None and notes is not None:
            kept = {
                "recipe_digest": self._output.digest,
                "dense_loss": dense.loss,
                "candidates": self._rows,
                "runs": asdict(self.runs),
                "base": self.session.base(None, self.progress),
            }
            write_sealed_json(notes, kept)

    def _part(self, sample: Sample | None) -> tuple[TokenSet, Ranges | None]:
        if sample is None:
            return self.tokens, self.division.fitting
        held = 0 if self.division.fitting is None else self.division.fitting.n_sequences
        rows = [*range(sample.n_fit), *range(held, held + sample.n_held)]
        if sample.n_fit == held:
            return self.tokens.take(rows), self.division.fitting
        # No folds: the ridge is that of so many tokens, which serves to order candidates of one method.
        return self.tokens.take(rows), Ranges.make(sample.n_fit, folds=1)

    def kept(self, name: str) -> Path | None:
        """Return the file of something that is kept until the result is written; None if nothing is."""
        output = self._output
        return None if output is None else output.work / f"{name}-{output.short_digest}.json"

    def _load(self) -> None:
        notes = self.kept(_CANDIDATES)
        if self._output is None or notes is None:
            return
        found = read_kept(_read_notes, notes)
        if found is not None and found[0] == self._output.digest:
            _, self._dense_loss, self._rows, base, self.runs = found
            self.session.expect(base, f"{notes} was written")


def _shown(gap: float | None) -> str:
    return "unknown" if gap is None else f"{gap:+.4f}"


def _key(repair: Repair, sample: Sample | None) -> str:
    if sample is None:
        return repair.key
    positions = "" if sample.is_of_all_positions else f", {sample.positions!r} of the positions"
    return f"{repair.key} on {sample.n_fit} and {sample.n_held}{positions}"


def _read_notes(path: Path) -> tuple[str, float, dict[str, Row], dict[str, Any], Runs]:
    found = read_sealed_json(path)
    rows, base = dict(found["candidates"]), dict(found["base"])
    return found["recipe_digest"], found["dense_loss"], rows, base, Runs(**found["runs"])
