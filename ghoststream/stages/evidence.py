"""What the select stage hands to a criterion: statistics of the store, residuals of repairs, weights of the model."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.errors import MismatchError, RequestError
from ghoststream.files import FileLock, atomic_write_json, json_digest, read_json
from ghoststream.machine import free_host_memory
from ghoststream.operators.diagnostics import describe
from ghoststream.operators.ridge import mean_diagonal
from ghoststream.operators.solver import solve_ridge
from ghoststream.progress import Progress
from ghoststream.selection import Repair, Residual
from ghoststream.spans import Span
from ghoststream.stages.session import ModelOptions, ModelSession
from ghoststream.statistics import (
    DEFAULT_BLOCK_TOKENS,
    BoundaryMoments,
    FoldedMoments,
    HiddenStateSource,
    Reducer,
    SumState,
    reduce_boundaries,
    reduce_whole,
    store_digest,
)


@dataclass(frozen=True)
class Engine:
    """Where reductions run, and how much they may take; see :func:`ghoststream.select`."""

    scheduler: Any
    workers: int | None
    memory: int | None
    progress: Progress

    @property
    def budget(self) -> int | None:
        """Bytes for moments: what was given, else half of what is free here; None for no bound."""
        if self.memory is not None or self.scheduler is not None:
            return self.memory
        return free_host_memory() // 2


class StoreEvidence:
    """A store, the model that it was made of, and a place for partial results; see :class:`~ghoststream.selection.Evidence`.

    Args:
        store_uri: Path or URL of the store.
        source: The same, open.
        model: The checkpoint and how to open it; None if none was given.
        engine: Where reductions run.
        out: The plan file, beside which partial moments are kept; None for a temporary folder.
    """

    def __init__(
        self,
        store_uri: str,
        source: HiddenStateSource,
        model: tuple[str | Path, ModelOptions] | None,
        engine: Engine,
        out: Path | None,
    ) -> None:
        self._store_uri, self._source, self._model = store_uri, source, model
        self._engine, self._out = engine, out

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self._source.n_layers

    def reduce(self, reducer: Reducer) -> SumState:
        """Return a statistic over all sequences."""
        engine = self._engine
        return reduce_whole(
            self._store_uri,
            reducer,
            scheduler=engine.scheduler,
            workers=engine.workers,
            progress=engine.progress,
        )

    def residuals(self, spans: tuple[Span, ...], repair: Repair) -> Mapping[Span, Residual]:
        """Return what a repair leaves at each span.

        Memory: what :func:`~ghoststream.statistics.reduce_boundaries` states, within the budget; then, for one span at a
        time, ``56 C^2`` bytes: its moments, one fold, the total without it, and a solution.
        """
        engine = self._engine
        with self._work_folder() as work:
            moments = reduce_boundaries(
                self._store_uri,
                spans,
                feature=repair.features,
                weights=repair.weights,
                folds=repair.folds,
                scheduler=engine.scheduler,
                workers=engine.workers,
                workdir=work,
                memory=engine.budget,
                progress=engine.progress,
            )
            engine.progress.start("residuals", len(spans), "candidates")
            found = {}
            for span in spans:
                found[span] = self._residual(moments[span], repair, work)
                engine.progress.advance(1)
            engine.progress.finish()
        return found

    def layer_weights(self, layer: int) -> Iterator[torch.Tensor]:
        """Yield the tensors of one layer, as they are stored."""
        skeleton = self._session.skeleton
        for name in skeleton.keys.sources(f"{skeleton.architecture.layers_path}.{layer}"):
            yield skeleton.reader.read(name)

    @cached_property
    def _session(self) -> ModelSession:
        if self._model is None:
            msg = "this criterion reads the weights of the model; give the checkpoint that the store was made of (--model)"
            raise RequestError(msg)
        session = ModelSession(*self._model)
        made_of = (self._source.fingerprint.get("checkpoint") or {}).get("digest")
        if made_of != session.fingerprint["digest"]:
            msg = (
                f"the store {self._store_uri} was made of another checkpoint ({made_of}) than {session.root} "
                f"({session.fingerprint['digest']}); give the one that it was made of"
            )
            raise MismatchError(msg)
        return session

    def _residual(self, moments: FoldedMoments, repair: Repair, work: Path) -> Residual:
        request = {
            "store": store_digest(self._source),
            "repair": asdict(repair),
            "block_tokens": DEFAULT_BLOCK_TOKENS,
        }
        name = json_digest(request).removeprefix("sha256:")[:16]
        path = work / f"residual-{name}-{moments.span.start}-{moments.span.stop}.json"
        if path.is_file():
            return Residual(**read_json(path))
        residual = _fit(moments, repair.ridge)
        atomic_write_json(path, asdict(residual))
        return residual

    @contextmanager
    def _work_folder(self) -> Iterator[Path]:
        if self._out is None:
            with tempfile.TemporaryDirectory(prefix="ghoststream-") as folder:
                yield Path(folder)
            return
        with FileLock(self._out.with_name(f".{self._out.name}.lock"), guarded=self._out):
            work = _work_of(self._out)
            work.mkdir(exist_ok=True)
            yield work


def discard_work(out: Path) -> None:
    """Remove what was kept beside a plan file while it was made."""
    shutil.rmtree(_work_of(out), ignore_errors=True)


def _work_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _fit(moments: FoldedMoments, ridge: float) -> Residual:
    def solve(part: BoundaryMoments) -> npt.NDArray[np.float64]:
        absolute = ridge * mean_diagonal(part)
        return solve_ridge(part.gram, part.cross, absolute, what=f"boundary {part.span}").matrix

    def missed(part: BoundaryMoments, matrix: npt.NDArray[np.float64]) -> float:
        return part.linear_residual(matrix)

    _, report = describe(moments, moments.total(), solve, missed)
    inside, outside = report["relative_residual"], report["relative_residual_out_of_sample"]
    # From relative to the gap to relative to the target.
    share = math.sqrt(report["relative_gap_energy"])
    return Residual(
        in_sample=inside * share,
        held_out=None if outside is None else outside * share,
        explained=1.0 - (inside if outside is None else outside) ** 2,
    )
