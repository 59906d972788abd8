"""What distillation needs of the dense model, by one pass and on disk: a prefix and top logits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.errors import ArtifactError
from ghoststream.evaluation import default_logit_tokens
from ghoststream.files import (
    disk_errors,
    file_digest,
    fsync_path,
    read_kept,
    read_sealed_json,
    require_free_space,
    write_sealed_json,
)
from ghoststream.progress import Progress
from ghoststream.spans import PruningPlan
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import Batch, Lane, PassOptions, StreamedPass, make_batches
from ghoststream.text import TokenSet


class Teacher:
    """The dense model's states ``h[start]`` and its ``top`` largest logits, for every token of a text.

    Args:
        folder: Where they are kept: ``states.npy`` (bytes of the states at compute dtype, ``(S, T, C b)``),
            ``logits.npy`` (float32, ``(S, T, top)``) and ``entries.npy`` (int32, the same shape);
            ``teacher.json``, with their digests and those of the model's tensors, is written last.
        session: The model.
        start: Position of the states.
        top: How many logits; at most the vocabulary.

    Memory: a micro-batch of each; files are mapped. Disk: ``S T (C b + 8 top)`` bytes.
    """

    def __init__(self, folder: Path, session: ModelSession, start: int, top: int) -> None:
        self._folder, self._session, self._start = folder, session, start
        self._top = min(top, session.skeleton.vocab_size)
        self._marker = folder / "teacher.json"
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def prepare(self, tokens: TokenSet, micro_batch: int, progress: Progress) -> None:
        """Open what a run before this has kept, or run the dense model once and keep it.

        Raises:
            BudgetError: If the disk has too little space, or a pass does not fit the memory given.
            DiskFullError: If no space is left.
            NumericsError: If a state is not finite.
            CheckpointError: If a tensor that was read already is not what it was when the model ran.
        """
        shapes = self._shapes(tokens)
        described = {name: [list(shape), dtype] for name, (shape, dtype) in shapes.items()}
        found = read_kept(self._read_marker, self._marker)
        if found is not None and found["arrays"] == described:
            self._session.expect(found["base"], f"{self._marker} was written")
        else:
            # Removed whole, as are links in the place of a file, which must not be written through.
            for name in shapes:
                self._path(name).unlink(missing_ok=True)
            self._marker.unlink(missing_ok=True)
            self._run(tokens, micro_batch, progress)
            for name in shapes:
                fsync_path(self._path(name))
            digests = {name: file_digest(self._path(name)) for name in shapes}
            base = self._session.base(None, progress)
            write_sealed_json(self._marker, {"arrays": described, "digests": digests, "base": base})
        self._arrays = {name: np.load(self._path(name), mmap_mode="r") for name in shapes}

    def states(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return ``h[start]`` of some sequences, ``(n, T, C)`` at compute dtype."""
        raw = torch.from_numpy(self._arrays["states"][rows])
        return raw.view(self._session.skeleton.dtype)

    def top(self, rows: npt.NDArray[np.int64], first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest logits and their entries for some tokens.

        They are those of tokens ``[first, first + count)`` of the sequences ``rows``, flattened.
        """
        length = self._arrays["logits"].shape[1]
        flat = np.arange(first, first + count)
        place = rows[flat // length], flat % length
        values, entries = self._arrays["logits"][place], self._arrays["entries"][place]
        return torch.from_numpy(values), torch.from_numpy(entries.astype(np.int64))

    def wants(self, position: int) -> bool:
        """Whether the states at this position are kept."""
        return position == self._start

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of one batch."""
        del position
        self._arrays["states"][batch.start : batch.stop] = states.cpu().contiguous().view(torch.uint8).numpy()

    def finished(self, position: int) -> None:
        """Do nothing: files are forced to disk at the end."""

    def failed(self) -> None:
        """Do nothing: without ``teacher.json`` the files are made again."""

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        """Keep the largest logits of some tokens."""
        values, entries = logits.float().topk(self._top, dim=-1)
        flat = np.arange(first, first + int(logits.shape[0]))
        length = int(batch.ids.shape[1])
        place = batch.start + flat // length, flat % length
        self._arrays["logits"][place] = values.cpu().numpy()
        self._arrays["entries"][place] = entries.cpu().numpy()

    def _run(self, tokens: TokenSet, micro_batch: int, progress: Progress) -> None:
        skeleton, shapes = self._session.skeleton, self._shapes(tokens)
        needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        require_free_space(self._folder, needed, "the dense model's states and logits")
        batches = make_batches(tokens.ids, tokens.mask, micro_batch)
        lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=(self,), logits=self)
        factory = self._session.memory(tokens.length, scratch=self._folder).states_factory(batches)
        options = PassOptions(
            logit_tokens=default_logit_tokens(skeleton.vocab_size, skeleton.unit_bytes), progress=progress
        )
        with disk_errors(self._folder, needed):
            self._arrays = {name: _allocated(self._path(name), *shapes[name]) for name in shapes}
            StreamedPass(skeleton, batches, [lane], factory, options).run()
            for array in self._arrays.values():
                array.flush()  # type: ignore[attr-defined]  # they are memmaps

    def _shapes(self, tokens: TokenSet) -> dict[str, tuple[tuple[int, ...], str]]:
        skeleton, shape = self._session.skeleton, tokens.ids.shape
        return {
            "states": ((*shape, skeleton.hidden_size * skeleton.dtype.itemsize), "uint8"),
            "logits": ((*shape, self._top), "float32"),
            "entries": ((*shape, self._top), "int32"),
        }

    def _read_marker(self, path: Path) -> dict[str, Any]:
        """Read what is kept of a run before this, and check the files that it names."""
        found = read_sealed_json(path)
        found = {name: found[name] for name in ("arrays", "digests", "base")}
        for name, digest in found["digests"].items():
            array = self._path(name)
            if not array.is_file() or file_digest(array) != digest:
                msg = f"{array} is not what was written there"
                raise ArtifactError(msg)
        return found

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"


def _allocated(path: Path, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Make a mapped file whose blocks are taken now; on a full disk a signal would end the process later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
