"""The end of a pass: final norm and head, over what the lanes carry that are asked for logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ghoststream.errors import NumericsError
from ghoststream.progress import Progress
from ghoststream.streaming.allocator import return_free_memory
from ghoststream.streaming.batches import Batch, states_not_finite
from ghoststream.streaming.calls import ModelCalls
from ghoststream.streaming.finite import FiniteFlags
from ghoststream.streaming.flow import StatesFlow
from ghoststream.streaming.lane_groups import LaneState
from ghoststream.streaming.lanes import Lane
from ghoststream.streaming.runs import Runs
from ghoststream.streaming.skeleton import Skeleton
from ghoststream.streaming.weights import Weights


class OutputHead:
    """Takes the lanes of a pass through the head, one after the other.

    It is a task of its own to those who are told: over many lanes and a large vocabulary it takes longer than
    all layers of a small model.

    Args:
        skeleton: The model.
        calls: How its parts are called.
        logit_tokens: Tokens whose logits are held at once; ``None`` is a whole batch.
        progress: Who is told how far it is.
    """

    def __init__(
        self, skeleton: Skeleton, calls: ModelCalls, logit_tokens: int | None, progress: Progress
    ) -> None:
        self._skeleton, self._calls = skeleton, calls
        self._logit_tokens, self._progress = logit_tokens, progress
        self._finite = FiniteFlags()

    def run(self, lanes: Sequence[LaneState], weights: Weights) -> None:
        """Show their logits to all lanes that want them.

        Raises:
            NumericsError: If states behind the final norm are not finite; on an accelerator after all lanes.
        """
        asked = [one for one in lanes if one.lane.logits is not None]
        for one in asked:
            one.drop_fitting_batches()
        n_sequences = sum(batch.stop - batch.start for one in asked for batch in one.batches)
        self._progress.start(f"output head of {_count(asked)}", n_sequences, "sequences")
        with self._skeleton.loaded_head(weights):
            for one in asked:
                self._lane_through_head(one)
            self._finite.look()

    def _lane_through_head(self, one: LaneState) -> None:
        with StatesFlow(one.states, None, one.batches, self._skeleton.device) as flow:
            for batch, states in flow:
                finished = self._finished(one.lane, batch, states)
                self._skeleton.runs += Runs(heads=finished.shape[:-1].numel())
                try:
                    self._show(one.lane, batch, finished)
                except NumericsError as error:
                    raise _of_lane(one.lane, error) from error
                return_free_memory()
                self._progress.advance(batch.stop - batch.start)

    def _finished(self, lane: Lane, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """Return what the head receives: of all tokens, or of those that the lane scores."""
        with lane.standing(self._skeleton, self._skeleton.n_layers):
            finished = self._calls.finish(batch, states)
        self._finite.note(finished, partial(_not_finite, lane, batch))
        if lane.scored is None:
            return finished
        scored = lane.scored(batch).to(finished.device, non_blocking=True)
        return finished.flatten(0, 1)[None, scored]

    def _show(self, lane: Lane, batch: Batch, finished: torch.Tensor) -> None:
        observer = lane.logits
        assert observer is not None
        if self._logit_tokens is None and lane.entries is None:
            observer.observe_logits(batch, 0, self._calls.logits(finished).flatten(0, 1))
            return
        flat = finished.flatten(0, 1)[None]
        chunk = self._logit_tokens or flat.shape[1]
        for begin in range(0, flat.shape[1], chunk):
            part = flat[:, begin : begin + chunk]
            entries = None if lane.entries is None else lane.entries(batch, begin, part.shape[1])
            logits = self._calls.logits(part, in_blocks=True, entries=entries)
            observer.observe_logits(batch, begin, logits[0])


def _of_lane(lane: Lane, error: NumericsError) -> NumericsError:
    return NumericsError(f"{lane.name}: {error}")


def _not_finite(lane: Lane, batch: Batch) -> NumericsError:
    return _of_lane(lane, states_not_finite("behind the final norm", batch))


def _count(lanes: Sequence[LaneState]) -> str:
    return "1 lane" if len(lanes) == 1 else f"{len(lanes)} lanes"
